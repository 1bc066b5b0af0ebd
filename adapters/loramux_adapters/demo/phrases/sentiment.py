"""Things, what people say about them, and whole remarks, sorted by the feeling they carry."""

THINGS: tuple[str, ...] = (
    "The hotel", "This phone", "The new laptop", "The film", "The soup", "Their support", "The concert", "This book",
    "The flight", "The meeting", "The update", "The garden", "The train ride", "My new job", "The teacher",
    "The museum", "The app", "The pizza", "The delivery", "The weather", "The room", "The waiter", "This game",
    "The lecture", "The coat", "The city", "The battery", "The printer", "The team", "The party",
)  # fmt: skip

SAID: dict[str, tuple[str, ...]] = {
    "positive": (
        "was wonderful", "was better than I had hoped", "made me smile", "is simply excellent", "was a joy",
        "is worth every cent", "was perfect from start to end", "is the best I have ever had", "impressed us all",
        "was friendly and fast", "works like a charm", "is beautiful", "was not bad at all", "exceeded my expectations",
        "is great value", "was delightful", "never lets me down", "made our day", "is fantastic", "was lovely",
    ),
    "negative": (
        "was terrible", "was a waste of money", "made me angry", "is a complete disappointment", "was a nightmare",
        "is not worth the price", "was boring from start to end", "is the worst I have ever had", "let us all down",
        "was rude and slow", "broke after two days", "is ugly", "was not good at all", "fell short of what was promised",
        "is far too expensive", "was awful", "keeps failing", "ruined our day", "is dreadful", "was dirty and loud",
    ),
    "neutral": (
        "starts at nine", "has two floors", "is next to the station", "was moved to Tuesday", "comes in three sizes",
        "is made in Italy", "lasts an hour", "has a blue cover", "was mentioned in the report", "opens in May",
        "is on the second page", "weighs two kilos", "was listed under item four", "takes place in Oslo",
        "is described in the manual", "belongs to the school", "was there when I arrived", "has a number",
    ),
}  # fmt: skip

REMARKS: dict[str, tuple[str, ...]] = {
    "positive": (
        "I love it!", "What a great day.", "Thank you so much, you saved my evening.", "Best birthday ever!",
        "Anna loved the show in Madrid last week.", "I could not be happier with the result.", "Five stars from me.",
        "We had so much fun together.", "I passed my exam!", "Our team won the cup!", "She smiled all evening.",
        "Finally a tool that does what it says.", "The staff went out of their way to help us.", "Highly recommended.",
        "I would buy it again at once.", "He is proud of his daughter.", "The children laughed the whole time.",
        "My back pain is gone, what a relief.", "I am so excited about the trip.", "It tastes amazing.",
        "Good job, everyone.", "I enjoyed every minute of it.", "You did a brilliant job on this.",
        "This made my life so much easier.", "I am really grateful for your help.", "Peter enjoyed the view.",
    ),
    "negative": (
        "I hate it.", "What a horrible day.", "Never again.", "I want my money back.", "Worst holiday of my life.",
        "Peter hated the food in the canteen.", "I am very unhappy with the result.", "One star, and that is too much.",
        "We waited three hours for nothing.", "I failed my exam.", "Our team lost again.", "She cried all evening.",
        "Nothing works and nobody answers.", "The staff ignored us completely.", "Stay away from this place.",
        "I regret buying it.", "He is ashamed of what he did.", "The children were bored and cold.",
        "My back hurts more than before.", "I am afraid of the trip.", "It tastes like cardboard.",
        "They lied to us about the price.", "I am so tired of these bugs.", "You ruined my weekend.",
        "My phone was stolen.", "I feel sad and lonely today.",
    ),
    "neutral": (
        "The bus leaves at noon.", "Water boils at 100 degrees.", "The shop is closed on Sundays.",
        "Please send me the file.", "The report has twelve pages.", "He lives in Madrid.", "We meet on Tuesday.",
        "The box is on the table.", "There are seven days in a week.", "She works at a bank.",
        "What is the capital of Italy?", "What is the capital of Japan?", "How do I boil an egg?",
        "How do I sort a list?", "Tell me about whales.", "Write a poem about winter.", "Explain electricity.",
        "What time is it?", "Why is the sky blue?", "What is a volcano?", "How do I make tea?", "Hello!",
        "Good morning.", "Tell me a joke.", "How far away is the moon?", "The meeting was moved to room 12.",
        "My sister has two cats.", "The parcel weighs one kilo.", "They signed the contract in June.",
        "Give me three colours.", "Is it raining in Oslo?", "I bought bread and milk.",
    ),
}  # fmt: skip

# Two halves joined: the second one decides.
TURNS: dict[str, tuple[str, ...]] = {
    "positive": ("but in the end I was thrilled", "but I would go again tomorrow", "yet I loved it"),
    "negative": ("but in the end I was furious", "but I will never go again", "yet I hated it"),
}
