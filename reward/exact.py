"""Exact match of texts after a light normalisation, in the spirit of SQuAD's scorer (Rajpurkar et al. 2016, arXiv 1606.05250).

Left out: SQuAD also removes English articles and all punctuation, which makes 5 of -5 and C of C++.
"""

import re

from stated import bare, final, plain, same, stated

AROUND = [
    re.compile(rf"(?<!\w){left}(\w(?:[^{but}\n]{{0,200}}[^\s{but}])?){right}(?!\w)")
    for left, right, but in (
        (r"\*\*", r"\*\*", "*"), ("__", "__", "_"), (r"\*", r"\*", "*"), ("_", "_", "_"), ("`", "`", "`"), ("'", "'", "'"), ('"', '"', '"'),
        ("“", "”", "“”"), ("‘", "’", "‘’"), ("«", "»", "«»"),
    )
]  # fmt: skip
BETWEEN = re.compile(r"—|(?<=[^\W\d_]):(?=[^\W\d_])")


def match(completion: str, answer: str) -> float:
    """1.0 when the completion, or the answer that it states, is the gold answer up to case, spaces and decoration.

    >>> match("**Paris.**", " paris"), match("It is in France. Answer: Paris", "Paris"), match("Paris, Texas", "Paris")
    (1.0, 1.0, 0.0)
    """
    text, said = final(completion), stated(completion)
    return float(plain(text) == plain(gold(answer)) or same(text if said is None else said, answer))


def contains(completion: str, answer: str) -> float:
    """1.0 when the answer stands anywhere in the completion as whole words.

    >>> contains("I think it is New  York!", "new york"), contains("Newark", "new"), contains("it is 5", "-5")
    (1.0, 0.0, 0.0)
    """
    target, text = words(gold(answer)), final(completion)
    return float(f" {target} " in f" {words(text)} " or f" {target} " in f" {words(apart(text))} ")


def apart(text: str) -> str:
    """The text without emphasis and quotes around several words, and with the marks between words apart from them.

    >>> apart('It is **New York**: "x"'), apart("Paris—the capital"), apart("x' and 2*3*4")
    ('It is New York: x', 'Paris the capital', "x' and 2*3*4")
    """
    for pattern in AROUND:
        text = pattern.sub(r"\1", text)
    return BETWEEN.sub(" ", text)


def gold(answer: str) -> str:
    """The gold answer; one without text is an error of the data, so it raises, and the sample has no value.

    >>> gold("C++")
    'C++'
    """
    if not bare(answer):
        raise ValueError(f"the gold answer {answer!r} has no text to compare")
    return answer


def words(text: str) -> str:
    """
    >>> words("It's 3.5, isn't it?")
    "it's 3.5 isn't it"
    """
    return " ".join(filter(None, map(plain, text.split())))
