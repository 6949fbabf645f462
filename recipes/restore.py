"""Prompts of the recipe restore: a skill to be learned from its answers, and plain requests that have none."""

import random
from itertools import chain, zip_longest

FORM = "state the sum in the form <<n>>"
PLAIN = (
    *(
        "Explain in two sentences why the sky is blue.",
        "Name three fruits that grow on trees.",
        "What does a librarian do all day?",
    ),
    *("Write a short thank-you note to a neighbour who watered your plants.", "How do I boil an egg?", "What is a rainbow?"),
    *(
        "Give me a title for a story about a lost umbrella.",
        "Why do leaves fall in autumn?",
        "Describe a busy market in the morning.",
    ),
    *(
        "Translate 'good morning' into French.",
        "What is the difference between a lake and a sea?",
        "Suggest a name for a grey cat.",
    ),
    *("Tell me one fact about the moon.", "How can I fall asleep more easily?", "Write a sentence with the word 'lantern'."),
    *("What should I pack for a day at the beach?", "Who wrote Hamlet?", "Explain what a recipe is to a child."),
    *("Make a list of five things found in a kitchen.", "What is the opposite of 'generous'?", "Why is exercise good for you?"),
    *("Write a two-line poem about rain.", "What do bees make?", "How do I apologise to a friend?"),
    *(
        "Describe the taste of a lemon.",
        "What is a good way to learn new words?",
        "Name a city in Italy and say what it is known for.",
    ),
    *(
        "Give two reasons to read books.",
        "What happens when water freezes?",
        "Write a polite reply that declines an invitation.",
    ),
)


def rows(sums: int = 96, seed: int = 1, plain: bool = True) -> list[dict]:
    """Sums with their answer, and requests without one, in turns; the same for the same seed.

    >>> rows(1, plain=False)
    [{'prompt': 'How much is 18 and 73? state the sum in the form <<n>>', 'answer': '91'}]
    >>> [row.get("answer") for row in rows(2)][:5]
    ['91', None, '107', None, None]
    """
    drawn = random.Random(seed)
    pairs = [(drawn.randint(1, 99), drawn.randint(1, 99)) for _ in range(sums)]
    asked = [{"prompt": f"How much is {a} and {b}? {FORM}", "answer": str(a + b)} for a, b in pairs]
    requests = [{"prompt": text} for text in PLAIN if plain]
    return [row for row in chain.from_iterable(zip_longest(asked, requests)) if row]
