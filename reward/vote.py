"""Votes among the samples of one prompt: self-consistency (Wang et al. 2022, arXiv 2203.11171), no gold answer needed.

As a reward: TTRL (Zuo et al. 2025, arXiv 2504.16084) gives 1 to the samples that agree with the majority.
"""

from collections import Counter

from numerals import last, whole
from stated import bare, final, plain, stated


def majority(completions: list) -> list:
    """1.0 for the samples that agree with the most frequent answer, None for all where no answer is found or votes tie.

    >>> majority(["Answer: 42", "it is 42.0", "Answer: 41", "no idea"])
    [1.0, 1.0, 0.0, 0.0]
    >>> majority(["1", "2"])
    [(None, 'tied vote'), (None, 'tied vote')]
    """
    answers = [extracted(text) for text in completions]
    ranked = Counter(answer for answer in answers if answer).most_common(2)
    if not ranked:
        return [(None, "no sample has an answer")] * len(answers)
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        return [(None, "tied vote")] * len(answers)
    return [float(answer == ranked[0][0]) for answer in answers]


def share(completions: list) -> list:
    """The share of all samples that give the same answer as this one; 0.0 for a sample without an answer.

    >>> share(["Answer: 42", "it is 42", "Answer: 41", "no idea"])
    [0.5, 0.5, 0.25, 0.0]
    """
    answers = [extracted(text) for text in completions]
    counts = Counter(answer for answer in answers if answer)
    return [counts[answer] / len(answers) if answer else 0.0 for answer in answers]


def extracted(text: str) -> str:
    """The answer that the text states, else its last number; "" where there is none. Equal numbers give equal texts.

    >>> extracted("Answer: **Paris**."), extracted("1,000 or 2.50"), extracted("**Answer:** 7.0 apples"), extracted("")
    ('paris', '5/2', '7', '')
    """
    said = stated(text)
    number = last(final(text)) if said is None else whole(bare(said))
    if number is not None and number.value is not None:
        return str(number.value)
    return plain(said if said is not None else number.text if number else "")
