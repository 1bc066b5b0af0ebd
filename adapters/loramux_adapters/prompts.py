"""The texts that models are compared on when none are given: eight registers, each long enough for 160 tokens.

Written for this purpose; what they say does not matter, that they differ in kind does.
"""

from __future__ import annotations

PROMPTS: tuple[str, ...] = (
    "The lighthouse keeper wrote down the weather every morning before breakfast, and again when the lamp "
    "was lit. For "
    "thirty years his columns of numbers grew: wind, pressure, the height of the swell against the second "
    "step of the "
    "landing. Nobody had asked him to. When the light was finally made automatic, a young woman from the "
    "institute came "
    "by boat to collect the instruments, and found forty-one notebooks stacked beside the stove. She sat "
    "down to read "
    "one, missed the tide, and stayed until the next morning. The series turned out to be the longest "
    "unbroken record "
    "on that coast, and the only one in which the great storm of the third winter was noted hour by hour. He "
    "had added "
    "a remark in the margin: the gulls knew first, and left at noon.",
    "def moving_average(values, window):\n    if window < 1:\n        raise ValueError('window must be at "
    "least 1')\n"
    "    total = 0.0\n    result = []\n    for index, value in enumerate(values):\n        total += value\n"
    "        if index >= window:\n            total -= values[index - window]\n        if index >= window - "
    "1:\n"
    "            result.append(total / window)\n    return result\n\n\nclass Counter:\n    def "
    "__init__(self):\n"
    "        self.counts = {}\n\n    def add(self, key):\n        self.counts[key] = self.counts.get(key, 0) "
    "+ 1\n\n"
    "    def most_common(self, n):\n        ordered = sorted(self.counts.items(), key=lambda item: "
    "(-item[1], item[0]))\n"
    "        return ordered[:n]\n\n\nif __name__ == '__main__':\n    assert moving_average([1, 2, 3, 4], 2) "
    "== [1.5, 2.5, 3.5]\n",
    "Question: A cyclist leaves the village at eight in the morning and rides at eighteen kilometres an "
    "hour. A car "
    "leaves the same village at half past nine and follows the same road at seventy-two kilometres an hour. "
    "When and "
    "where does the car overtake the cyclist? Answer: In one and a half hours the cyclist has covered "
    "twenty-seven "
    "kilometres. The car gains fifty-four kilometres every hour, so it needs half an hour to close the gap. "
    "They meet "
    "at ten o'clock, thirty-six kilometres from the village. Check: the cyclist has been riding for two "
    "hours, and two "
    "times eighteen is thirty-six. Question: How far apart are they at a quarter past ten? Answer: The car "
    "is ahead by "
    "a quarter of fifty-four kilometres, which is thirteen and a half kilometres.",
    '{"order": {"id": 48213, "customer": {"name": "R. Okafor", "city": "Leeds"}, "items": [{"sku": "KET-07", '
    '"title": '
    '"Enamel kettle, 1.5 l", "quantity": 1, "price": 34.9}, {"sku": "CUP-22", "title": "Stoneware cup", '
    '"quantity": 4, '
    '"price": 9.5}, {"sku": "TEA-03", "title": "Assam loose leaf, 250 g", "quantity": 2, "price": 7.25}], '
    '"discount": '
    '{"code": "WINTER", "percent": 10}, "total": 78.66, "paid": true, "shipped": null, "notes": ["leave with '
    "the "
    'neighbour", "fragile"]}}\n{"order": {"id": 48214, "customer": {"name": "L. Brandt", "city": "Kiel"}, '
    '"items": '
    '[{"sku": "LAMP-11", "title": "Desk lamp, brass", "quantity": 1, "price": 129.0}], "discount": null, '
    '"total": 129.0, '
    '"paid": false, "shipped": null, "notes": []}}',
    "Photosynthesis takes place in two stages. In the light-dependent reactions, pigments in the thylakoid "
    "membrane "
    "absorb photons and pass the energy to reaction centres, where water is split and oxygen is released. "
    "The electrons "
    "travel along a chain of carriers and their energy is stored as ATP and NADPH. In the second stage, the "
    "Calvin cycle, "
    "the enzyme rubisco attaches carbon dioxide to a five-carbon sugar, and the products of the first stage "
    "turn the "
    "result into triose phosphate. Because rubisco also reacts with oxygen, plants of hot climates have "
    "evolved ways of "
    "concentrating carbon dioxide around it: maize and sugar cane do so in separate cells, cacti and "
    "pineapples at a "
    "separate time of day, opening their pores only at night.",
    "User: My train was cancelled and the next one gets me to the airport forty minutes before departure. I "
    "only have "
    "hand luggage. Should I take a taxi?\nAssistant: If boarding closes twenty minutes before departure, "
    "forty minutes is "
    "tight but possible with hand luggage, as long as security is quick. I would check two things first: "
    "whether you "
    "already have a boarding pass on your phone, and how long the airport's website says the security queue "
    "is. If either "
    "answer is unfavourable, a taxi is worth the money.\nUser: I have the boarding pass, but the queue is "
    "twenty-five "
    "minutes.\nAssistant: Then take the taxi. Twenty-five minutes in the queue leaves fifteen for everything "
    "else, and the "
    "gate may be ten minutes' walk away.",
    "Der alte Bäcker am Markt öffnet um fünf Uhr, und wer früh genug kommt, darf ihm durch die Scheibe "
    "zusehen. Er "
    "spricht wenig. Le mardi, il fait des brioches, et les enfants de l'école voisine attendent devant la "
    "porte avec "
    "leurs pièces dans la main. En verano abre también por la tarde, porque entonces llegan los viajeros que "
    "bajan del "
    "tren de las seis y preguntan por el pan de nueces. Lo vende hasta que se acaba, y nunca guarda nada "
    "para sí mismo. "
    "Quando chiude, lascia una pagnotta sul davanzale: qualcuno la prende sempre, e nessuno sa chi sia.",
    "ARTICLE 4. TERM AND TERMINATION. 4.1 This Agreement takes effect on the date of the last signature and "
    "continues for "
    "twelve (12) months, after which it renews automatically for successive periods of the same length "
    "unless either party "
    "gives written notice at least sixty (60) days before the end of the current period. 4.2 Either party "
    "may terminate "
    "this Agreement for material breach if the other party fails to remedy the breach within thirty (30) "
    "days of written "
    "notice describing it. 4.3 On termination, each party shall return or destroy the confidential "
    "information of the "
    "other, and shall confirm in writing that it has done so; sections 6, 9 and 11 survive. 4.4 Fees paid in "
    "advance for "
    "the period after termination are refunded in proportion, except where the termination follows from "
    "section 4.2.",
)
