"""Sums of whole numbers with their digits turned around, of rising length: problems of known difficulty, with exact answers.

As in Lee et al. 2025 (arXiv 2502.01612), where small models label problems one digit longer than those they were trained on. Turned
around, a sum is written from its last digit on, so that each digit depends on those before it.
"""

from random import Random


def problems(first: int, last: int, each: int, seed: int = 0) -> list[dict]:
    """Return `each` sums of two numbers of `first` digits, then as many of one digit more, up to `last`; none twice.

    >>> [row["digits"] for row in problems(1, 3, 2)]
    [1, 1, 2, 2, 3, 3]
    >>> turned(12, 9)
    ('21+90=', '120')
    """
    found: dict[str, dict] = {}
    for digits in range(first, last + 1):
        draw, many = Random(f"{seed} {digits}"), len(found) + each
        while len(found) < many:
            least = 10 ** (digits - 1) if digits > 1 else 0
            prompt, answer = turned(draw.randrange(least, 10**digits), draw.randrange(least, 10**digits), digits)
            found.setdefault(prompt, {"prompt": prompt, "answer": answer, "digits": digits})
    return list(found.values())


def turned(first: int, second: int, digits: int = 2) -> tuple[str, str]:
    """Return a sum and its result, both turned around and as long as they may get, so that their length gives nothing away."""
    one, other = (str(number).zfill(digits)[::-1] for number in (first, second))
    return f"{one}+{other}=", str(first + second).zfill(digits + 1)[::-1]
