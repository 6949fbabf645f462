"""Numeric answers. The last number of the completion is the reading of GSM8K used by the early papers (Cobbe et al. 2021,
arXiv 2110.14168, ask for `#### n`; lm-evaluation-harness calls this reading "flexible-extract"). What a number is: docs/rewards.md.
"""

import re
from fractions import Fraction

from numerals import agreement, gold, last, meant, plain, read
from stated import bare, final, without_half_emphasis

LABEL = re.compile(r"[*_]{0,3}answer\s{0,9}[*_]{0,3}:[*_]{0,3}", re.IGNORECASE)


def last_number(completion: str, answer: str) -> float | tuple[float | None, str]:
    """1.0 when the last number in the completion equals the answer.

    >>> last_number("so it is #### 42", "42"), last_number("48 - 6 = 42, which is $1,042.00.", "1042")
    (1.0, 1.0)
    >>> last_number("a loss of -$5", "5"), last_number("I do not know", "42")
    (0.0, 0.0)
    """
    return agreement(last(final(completion)), gold(answer))


def answer_line(completion: str, answer: str) -> float | tuple[float | None, str]:
    """1.0 when the last line is `Answer: <n>` and <n> equals the answer: the format is part of the task, so a unit is refused.

    >>> answer_line("4 plus 38.\\nAnswer: 42", "42"), answer_line("**Answer:** $42$.", "42")
    (1.0, 1.0)
    >>> answer_line("The sum is 42", "42"), answer_line("Answer: 42\\nAnswer: 43", "42"), answer_line("Answer: 42 or so", "42")
    (0.0, 0.0, 0.0)
    """
    target = gold(answer)
    line = final(completion).strip().rpartition("\n")[2].strip()
    label = LABEL.match(line)
    number = plain(bare(without_half_emphasis(line[label.end() :].strip(), label[0]))) if label else ""
    if not number or re.search(r"[^\W\d_]", re.sub(r"(?<=\d)[eE](?=[-+\d])", "", number)):
        return 0.0
    return agreement(read(number), target)


def close(completion: str, answer: str, relative: float = 0.01) -> float | tuple[float | None, str]:
    """1.0 when the last number is within `relative` of the answer.

    >>> close("about 3.14", "3.14159"), close("about 3", "3.14159")
    (1.0, 0.0)
    """
    target, said = gold(answer), last(final(completion))
    if said is None or target.value is None:
        return 0.0
    room = abs(target.value) * Fraction(str(relative))
    near = {one for one in meant(said) if abs(one - target.value) <= room}
    if near and said.value not in near:
        return None, f"{said.text[:40]!r} may be near {answer[:40]!r}, and may not"
    return float(bool(near))
