"""Words for sentences that say who did what, where and when.

A place or time is (as it stands in the sentence, as it stands in the answer).
"""

WHO: tuple[str, ...] = (
    "Anna", "Peter", "Maria", "Omar", "Li Wei", "Fatima", "Jonas", "Priya", "Lucas", "Chloe", "Ivan", "Yuki",
    "Samuel", "Aisha", "Carlos", "Ingrid", "Tom", "Nadia", "Viktor", "Grace", "Mehmet", "Elena", "Hugo", "Zoe",
    "Mr. Brown", "Mrs. Keller", "Dr. Patel", "Professor Lind", "Captain Reyes", "Emma Stone", "David Okafor",
    "Sofia Marino", "Ben Carter", "Hannah Weiss", "Kenji Sato", "Laura Jensen", "the mayor", "the teacher",
    "my sister", "my brother", "our neighbour", "the company", "the team", "the students", "two tourists",
    "the police", "a young doctor", "the orchestra", "her uncle", "the committee", "Anna and Peter", "I", "we",
    "she", "he", "they", "my grandmother", "the new manager", "three engineers", "the baker",
)  # fmt: skip

WHAT: tuple[str, ...] = (
    "bought a red bicycle", "met an old friend", "signed the contract", "lost a wallet", "gave a speech",
    "opened a restaurant", "won the chess match", "sold the house", "played the piano", "repaired the bridge",
    "missed the train", "ordered twelve chairs", "found a gold coin", "painted a portrait", "cooked dinner",
    "wrote a letter", "baked three cakes", "visited the museum", "started a new job", "broke a window",
    "caught a big fish", "planted an apple tree", "loved the concert", "watched a film", "taught a class",
    "presented the budget", "adopted a kitten", "delivered the parcel", "paid the bill", "founded a school",
    "rented a boat", "celebrated a birthday", "reported a theft", "cancelled the meeting", "took a photo",
    "climbed the tower", "fixed the printer", "recorded an album", "ran a marathon", "read the whole report",
    "will present the results", "will open the new library", "will marry an actor", "will meet the investors",
    "is looking for a flat", "is learning Spanish", "hated the food", "enjoyed the view", "forgot the password",
    "tested the new engine", "announced a strike", "discovered a small comet", "drank two cups of coffee",
    "sang in the choir", "built a wooden table", "interviewed the candidate", "called the plumber",
    "scored two goals", "borrowed an umbrella", "wants to buy 40 laptops",
)  # fmt: skip

WHERE: tuple[tuple[str, str], ...] = (
    ("in Paris", "Paris"), ("in Berlin", "Berlin"), ("in Lisbon", "Lisbon"), ("in Nairobi", "Nairobi"),
    ("in New York", "New York"), ("in Tokyo", "Tokyo"), ("in Oslo", "Oslo"), ("in Mumbai", "Mumbai"),
    ("in Cairo", "Cairo"), ("in Mexico City", "Mexico City"), ("in Vienna", "Vienna"), ("in Toronto", "Toronto"),
    ("in Rome", "Rome"), ("in Sydney", "Sydney"), ("in London", "London"), ("in Seoul", "Seoul"),
    ("in Warsaw", "Warsaw"), ("in Boston", "Boston"), ("in Norway", "Norway"), ("in Brazil", "Brazil"),
    ("at the harbour", "the harbour"), ("at the station", "the station"), ("at the airport", "the airport"),
    ("at school", "school"), ("at home", "home"), ("at the office", "the office"), ("in the park", "the park"),
    ("in the garden", "the garden"), ("in the kitchen", "the kitchen"), ("at the market", "the market"),
    ("at the town hall", "the town hall"), ("on the beach", "the beach"), ("in room 12", "room 12"),
    ("at the library", "the library"), ("in a small village", "a small village"), ("on the roof", "the roof"),
    ("near the river", "the river"), ("at the hotel", "the hotel"), ("in the mountains", "the mountains"),
    ("at the stadium", "the stadium"),
)  # fmt: skip

WHEN: tuple[tuple[str, str], ...] = (
    ("yesterday", "yesterday"), ("today", "today"), ("last night", "last night"), ("last week", "last week"),
    ("last summer", "last summer"), ("this morning", "this morning"), ("tonight", "tonight"),
    ("two days ago", "two days ago"), ("ten years ago", "ten years ago"), ("on Monday", "Monday"),
    ("on Tuesday", "Tuesday"), ("on Wednesday", "Wednesday"), ("on Friday", "Friday"), ("on Sunday", "Sunday"),
    ("on Saturday evening", "Saturday evening"), ("at noon", "noon"), ("at midnight", "midnight"),
    ("at 5 pm", "5 pm"), ("at 9:30", "9:30"), ("in June", "June"), ("in March", "March"), ("in 1998", "1998"),
    ("in 2021", "2021"), ("in winter", "winter"), ("on 3 May", "3 May"), ("on 12 October", "12 October"),
    ("on New Year's Eve", "New Year's Eve"), ("before lunch", "before lunch"), ("after work", "after work"),
    ("last month", "last month"), ("early in the morning", "early in the morning"), ("last year", "last year"),
    ("an hour ago", "an hour ago"), ("on Thursday afternoon", "Thursday afternoon"),
)  # fmt: skip

# Futures need other times.
WHEN_FUTURE: tuple[tuple[str, str], ...] = (
    ("tomorrow", "tomorrow"), ("next week", "next week"), ("on Monday", "Monday"), ("in June", "June"),
    ("at noon", "noon"), ("next year", "next year"), ("tonight", "tonight"), ("on 3 May", "3 May"),
)  # fmt: skip

# Things that happen by themselves: no "who".
EVENTS: tuple[str, ...] = (
    "a fire", "an accident", "a concert", "a strong storm", "a power cut", "a flower show", "an election",
    "a football match", "a wedding", "a strike", "a book fair", "an earthquake",
)  # fmt: skip

# (question or request, its "what"): the adapter extracts, it does not answer.
TOPICS: tuple[tuple[str, str], ...] = (
    ("What is the capital of Italy?", "the capital of Italy"),
    ("What is the capital of Japan?", "the capital of Japan"),
    ("What is a volcano?", "a volcano"),
    ("What is machine learning?", "machine learning"),
    ("What is the best sport?", "the best sport"),
    ("What is gravity?", "gravity"),
    ("How do I boil an egg?", "boil an egg"),
    ("How do I learn programming?", "learn programming"),
    ("How do I make pancakes?", "make pancakes"),
    ("How do I fix a flat tyre?", "fix a flat tyre"),
    ("How can I save money?", "save money"),
    ("Tell me about whales.", "whales"),
    ("Tell me about the Roman Empire.", "the Roman Empire"),
    ("Tell me a joke.", "a joke"),
    ("Tell me a story.", "a story"),
    ("Write a poem about winter.", "a poem about winter"),
    ("Write an email to my boss.", "an email to my boss"),
    ("Explain how a plane flies.", "how a plane flies"),
    ("Explain electricity.", "electricity"),
    ("Give me a recipe for soup.", "a recipe for soup"),
    ("Why is the sky blue?", "the sky is blue"),
    ("Why is the sea salty?", "the sea is salty"),
    ("Hello!", "a greeting"),
    ("Hi there.", "a greeting"),
    ("Good morning.", "a greeting"),
    ("How are you?", "a greeting"),
)
