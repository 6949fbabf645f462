"""Exact match after a light normalisation: what SQuAD's scorer does (Rajpurkar et al. 2016, arXiv 1606.05250).

Left out: SQuAD also removes English articles, which is wrong for most other tasks.
"""

import re
import string


def match(completion: str, answer: str) -> float:
    """1.0 when the completion, or what follows its last `Answer:`, is the answer up to case, spaces and outer punctuation.

    >>> match("Paris.", " paris")
    1.0
    >>> match("It is a city in France. Answer: Paris", "Paris")
    1.0
    >>> match("Paris, Texas", "Paris")
    0.0
    """
    stated = re.split(r"answer\s*:", completion, flags=re.IGNORECASE)[-1]
    return float(normalised(answer) in (normalised(completion), normalised(stated)))


def contains(completion: str, answer: str) -> float:
    """1.0 when the answer stands anywhere in the completion as whole words.

    >>> contains("I think it is New  York!", "new york")
    1.0
    >>> contains("Newark", "new")
    0.0
    """
    return float(f" {words(answer)} " in f" {words(completion)} ")


def normalised(text: str) -> str:
    """
    >>> normalised("  The  END! ")
    'the end'
    """
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def words(text: str) -> str:
    """
    >>> words("It's 3.5, isn't it?")
    "it's 3.5 isn't it"
    """
    return " ".join(part for word in text.casefold().split() if (part := word.strip(string.punctuation)))
