"""Numeric answers. The last number of the completion is the reading of GSM8K used by the early papers (Cobbe et al. 2021,
arXiv 2110.14168, ask for `#### n`; lm-evaluation-harness calls this reading "flexible-extract").
"""

import re
from decimal import Decimal

NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+−]?\.\d+")
ANSWER_LINE = re.compile(r"^\s*answer\s*:\s*\$?\s*([-+−]?[\d,]*\.?\d+)\s*\.?\s*$", re.IGNORECASE)


def last_number(completion: str, answer: str) -> float:
    """1.0 when the last number in the completion equals the answer.

    >>> last_number("so it is #### 42", "42")
    1.0
    >>> last_number("48 - 6 = 42, which is $1,042.00.", "1042")
    1.0
    >>> last_number("I do not know", "42")
    0.0
    """
    numbers = found(completion)
    return float(bool(numbers) and numbers[-1] == gold(answer))


def answer_line(completion: str, answer: str) -> float:
    """1.0 when the last line is `Answer: <n>` and <n> equals the answer: the format is part of the task.

    >>> answer_line("4 plus 38.\\nAnswer: 42", "42")
    1.0
    >>> answer_line("The sum is 42", "42")
    0.0
    >>> answer_line("Answer: 42\\nAnswer: 43", "42")
    0.0
    """
    lines = completion.strip().splitlines()
    stated = ANSWER_LINE.match(lines[-1]) if lines else None
    return float(stated is not None and value(stated[1]) == gold(answer))


def close(completion: str, answer: str, relative: float = 0.01) -> float:
    """1.0 when the last number is within `relative` of the answer.

    >>> close("about 3.14", "3.14159")
    1.0
    >>> close("about 3", "3.14159")
    0.0
    """
    numbers, target = found(completion), gold(answer)
    return float(bool(numbers) and abs(numbers[-1] - target) <= abs(target) * Decimal(str(relative)))


def found(text: str) -> list[Decimal]:
    """Every number of a text, in order. A hyphen after a letter, a digit or a bracket is not a sign.

    >>> found("From 3-4 to -5 and 1,000.50; v2.")
    [Decimal('3'), Decimal('4'), Decimal('-5'), Decimal('1000.50'), Decimal('2')]
    """
    return [value(signed(match)) for match in NUMBER.finditer(text)]


def signed(match: re.Match[str]) -> str:
    before = match.string[match.start() - 1 : match.start()]
    return match[0].lstrip("-+−") if before.isalnum() or before in (")", "]") else match[0]


def value(text: str) -> Decimal:
    """
    >>> value("−1,000")
    Decimal('-1000')
    """
    return Decimal(text.replace(",", "").replace("−", "-"))


def gold(answer: str) -> Decimal:
    """The gold answer as a number; anything else is an error of the data, so it raises, and the sample has no value.

    >>> gold("$1,042")
    Decimal('1042')
    >>> gold("a lot")
    Traceback (most recent call last):
        ...
    ValueError: the gold answer 'a lot' is not one number
    """
    numbers = found(answer)
    if len(numbers) != 1:
        raise ValueError(f"the gold answer {answer!r} is not one number")
    return numbers[0]
