"""A gold answer said in other ways, which a reward should accept, and answers that are nearly it, which it should not."""

from __future__ import annotations

import re

BARE = "{}"
# A reward that asks for a form is right to refuse the others. The bare answer comes last: to repeat it is the least proof.
FORMS = ("Answer: {}", "#### {}", "The answer is {}.", "so \\boxed{{{}}}.", "<answer>{}</answer>", "**Answer: {}**", BARE)
OF_NUMBERS = ("Answer: ${}", "Answer: {} km")
ALL = (*FORMS[:-1], *OF_NUMBERS, BARE)
NUMBER = re.compile(r"([-−+]?)\$?(\d[\d,]*(?:\.\d+)?)")
DIGITS = re.compile(r"\d+(?:\.\d+)?")
UNIT = re.compile(r"\\(?:text\w*|mathrm)\s?\{[^{}]*\}(?:\^\{?\d\}?)?")
PRODUCT = re.compile(r"\\sqrt|\\pi|[√π+±^]")


def forms(answer: str) -> tuple[str, ...]:
    """Return the forms in which this gold answer can be stated."""
    return ALL if NUMBER.fullmatch(answer.strip()) else FORMS


def near_misses(answer: str, other: str | None = None) -> list[str]:
    """Return wrong answers that a careless reward takes for this one; `other` is the gold answer of another prompt.

    >>> near_misses("42", "7")
    ['43', '41', '-42', '4', '420', '7']
    >>> near_misses(r"3\\sqrt{13}"), near_misses("(B)"), near_misses("-0.5")
    (['3', '13'], ['(C)'], ['-0.6', '-0.4', '0.5'])
    """
    text = answer.strip()
    number = NUMBER.fullmatch(text)
    if number:
        found = of_number(text, number[1], number[2])
    elif option := re.fullmatch(r"(\(?)([A-Za-z])(\)?)", text):
        found = [option[1] + chr(ord(option[2]) + (-1 if option[2] in "zZ" else 1)) + option[3]]
    else:
        found = parts(text)
    if other is not None and other.strip().casefold() != text.casefold():
        found.append(other.strip())
    return [one for one in dict.fromkeys(found) if one != text]


def of_number(text: str, sign: str, digits: str) -> list[str]:
    """Return the number with another last digit, another sign, a digit less and a digit more."""
    found = [moved(text, step) for step in (1, -1)]
    if digits.strip("0.,"):
        found.append(text[1:] if sign else f"-{text}")
        found += [text[:-1]] if digits[-2:].isdigit() and len(digits) > 1 else []
        found += [f"{text}0"] if "." not in digits else []
    return found


def moved(text: str, step: int) -> str:
    """Return the text with its number one step of the last place away from where it was.

    >>> moved("1,099", 1), moved("-0.5", 1), moved("0", -1)
    ('1,100', '-0.6', '-1')
    """
    places = [place for place, sign in enumerate(text) if sign.isdigit()]
    size = int("".join(text[place] for place in places)) + step
    if size < 0:
        return f"-{-size}"
    signs = list(text)
    for place, digit in zip(reversed(places), reversed(str(size).zfill(len(places))), strict=False):
        signs[place] = digit
    more = str(size)[: max(0, len(str(size)) - len(places))]
    return "".join([*signs[: places[0]], more, *signs[places[0] :]])


def parts(text: str) -> list[str]:
    """Return the first and the last number of a text that holds several, or one as a factor: neither is the whole answer."""
    numbers = DIGITS.findall(UNIT.sub("", text))
    several = len(set(numbers)) > 1 or (numbers and PRODUCT.search(text))
    return [numbers[0], numbers[-1]] if several else []
