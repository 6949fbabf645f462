"""Which answers to one prompt agree, for the `key` of a measure step: how many can be read, and what most of k of them say gets (maj@k)."""

from vote import extracted


def answer(completions: list) -> list:
    """The number of the first sample with the same answer, as `vote.py` reads it; None for a sample without one.

    >>> answer(["Answer: 42", "Answer: 41", "it is 42.0", "no idea"])
    [0, 1, 0, None]
    """
    answers = [extracted(text) for text in completions]
    return [answers.index(one) if one else None for one in answers]
