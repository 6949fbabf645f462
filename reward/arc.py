"""ARC (Clark et al. 2018, arXiv 1803.05457; hub id allenai/ai2_arc): its questions alone, and with their choices."""


def question(raw: dict) -> dict:
    """The question without its choices and without the answer.

    >>> question({"question": "What is ice?", "choices": {"text": ["water", "stone"], "label": ["A", "B"]}, "answerKey": "A"})
    {'prompt': 'What is ice?'}
    """
    return {"prompt": raw["question"]}


def choices(raw: dict) -> dict:
    """The question with its choices, each behind its letter, and the right letter as gold.

    >>> found = choices({"question": "What is ice?", "choices": {"text": ["water", "stone"], "label": ["1", "2"]}, "answerKey": "2"})
    >>> found["prompt"].splitlines()[1:3], found["answer"]
    (['A. water', 'B. stone'], 'B')
    """
    texts, labels = raw["choices"]["text"], raw["choices"]["label"]
    letters = "ABCDEFGH"[: len(texts)]
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts))
    ending = "End with a line of the form 'Answer: <letter>'."
    return {"prompt": f"{raw['question']}\n{options}\n{ending}", "answer": letters[labels.index(raw["answerKey"])]}
