"""Exact match of texts after a light normalisation, in the spirit of SQuAD's scorer (Rajpurkar et al. 2016, arXiv 1606.05250).

Left out: SQuAD also removes English articles and all punctuation, which makes 5 of -5 and C of C++.
"""

from stated import bare, final, plain, same, stated


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
    return float(f" {words(gold(answer))} " in f" {words(final(completion))} ")


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
