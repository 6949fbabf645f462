"""Mathematical equality: numbers by the rules that all rewards here share, formulas by the math-verify library
(github.com/huggingface/Math-Verify), words as text. The rules: docs/rewards.md.

Needs `pip install math-verify` (in the extras [cpu] and [gpu]). The library's own timeout is switched off: what is too large to be
worked out is refused before sympy sees it, and the rest has a second of processor time.
"""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from numerals import CHANGE, NO_UNITS, OPERATE, Numeral, agreement, doubtful, last, plain, whole
from stated import bare, boxes, final, same, stated

SECONDS = 1.0  # of processor time to read and compare one completion; a usual one takes 0.01
LONGEST = 400  # characters of a formula
MOST_WORDS = 20  # of a gold answer
DEEPEST = 20  # brackets in brackets
MOST_POWER = 10_000  # of a number: 3^9999 has 4771 digits
SYMBOLS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "²": "^2", "³": "^3", "≤": r"\le ",
    "≥": r"\ge ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "±": r"\pm ", "°": r"^\circ ", "~": " ",
})  # fmt: skip
SPACING = re.compile(r"(?<!\\)\\(?:[,;:! ]|(?:left|right|displaystyle|quad|qquad)(?![A-Za-z]))")
DEGREES = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc)\s?\(?)(\d{1,9})\s?\^\s?\{?\\circ\}?")
ROOT = re.compile(r"√\s?(?:\(([^()]{1,99})\)|([0-9]+|[a-zA-Z]))")
QUOTED = re.compile(r"\\(?:text\w{0,9}|mathrm|mbox)\s?\{[^{}]*\}")
FRAMES = re.compile(r"\\(?:begin|end)\s?\{\w+\}")
WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:and|sin|cos|tan|cot|sec|csc|log|exp|sqrt|det|max|min|gcd|lcm|mod|inf)\b)[^\W\d_]{3,}")
UNIT = (
    r"(?:mm|cm|dm|km|kg|mg|ml|in|ft|yd|mi|lbs?|oz|mph|hrs?|min|(?:milli|centi|deci|kilo)?(?:met|lit)(?:er|re)s?|(?:kilo|milli)?grams?|"
    r"inch(?:es)?|feet|foot|yards?|miles?|units?|degrees?|radians?|percent|dollars?|cents?|euros?|pounds?|ounces?|seconds?|minutes?|hours?|"
    r"days?|weeks?|months?|years?)"
)
UNITS = re.compile(rf"([0-9}})\]a-z]|\\pi)(?:\s+(?:(?:square|cubic|sq|cu|per)\b\.?\s+)?{UNIT}\b\.?)+$")  # behind a formula
BEHIND = re.compile(r"[0-9A-Za-z})\]!]\s+[A-Za-z]{3,}\.?$")
LETTER = re.compile(r"\\text\s?\{\s?[xyzrnkpqiej]\s?\}|(?:\\[lc]?dots[a-z]?|\.\.)\s*$")  # a factor, or what goes on
NUMBER_OF = re.compile(
    r"[-+]?[\d.,]+\s+\(?(?!and\b|or\b|(?:pi|sin|cos|tan|cot|sec|csc|log|exp|sqrt)\b)[A-Za-z]{2}[A-Za-z0-9 .()]*"
)
PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
REPEATED = re.compile(r"(?<![\d.])(\d{0,20})\.(\d{0,20})\\overline\s?\{(\d{1,20})\}")
BASE = re.compile(r"_\s?\{\s?(\w+)\s?\}")
LEAD = re.compile(
    r"(?:(?:it(?: is|['’]s)|this is|about|around|exactly|approximately|roughly|precisely|just|simply)\s+){1,3}(?=[-−–$\\\d.mn])",
    re.I,
)
MINUS = re.compile(r"(?:minus|negative)\s+(?=[$\\\d.])", re.IGNORECASE)
EQUALS = re.compile(r"(?<![<>!:])={1,2}|\\equiv(?![A-Za-z])")
SEVERAL = re.compile(r"[,;&]|\b(?:and|or)\b|\\begin")
SENTENCES = re.compile(r"(?<=[.!?])\s+|\n")
DOUBT = re.compile(
    r"\b(?:not|never|no|none|neither|nor|cannot|whether|unless|either|or|maybe|perhaps|wrong|false|incorrect|impossible|unlikely)\b|n['’]t\b"
    rf"|[\d)}}$]\S*\s+(?:(?:whole|all|then|to the)\s+)?(?:power|{'|'.join(CHANGE.split())})\b\D*$"
    r"|\b(?:than|least|most|up to|instead of|over|under|above|below|nearly|almost)\b\D{0,12}\d\S*\D*$"
    r"|\b(?:sum|product|difference|quotient|ratio|average|mean) (?:of|between)\b[^=]{0,80}\b(?:and|to) \W{0,4}\d\S*\D*$"
    rf"|(?<!\\)\b(?:{'|'.join(OPERATE.split())})(?: of)?(?: the)?\W{{1,6}}\d\S*\D*$",
    re.IGNORECASE,
)
COMMA = re.compile(r"[-+]?\d+,\d+")
OPERATORS = re.compile(r"[\\^=+*/<>|_]")  # of a formula: the letters beside them are factors, not words
PLAIN_WORD = re.compile(r"(?<!\S)(?!and\b)[A-Za-z]{3,}(?![^\s,.:;])")
ALONE = re.compile(r"\s*(?![-+±]\s)[^\n]{1,99}\s*")  # one line; a sign apart from what follows may be a bullet
NEGATED = re.compile(r"\bnot\b|n't")
AS_TEXT = re.compile(r"\d\s?:\s?\d|\d\s?_\s?\{?\s?\d")  # 2:3 may be a time, and 101_2 is another number than 101


class Reading(NamedTuple):
    """One of the three things an answer can be: a number, a formula, or a text."""

    text: str
    number: Numeral | None = None
    formula: list[Any] | None = None
    kind: str = ""
    doubted: bool = False


class OutOfTime(BaseException):
    """Not an Exception: the library and sympy catch those."""


UNREADABLE = (ValueError, RecursionError, MemoryError, OverflowError, OutOfTime)


def correct(completion: str, answer: str) -> float | tuple[float | None, str]:
    """1.0 when the completion's final answer is mathematically equal to the gold answer.

    A completion that cannot be read, or not in time, is a wrong answer; a gold answer that cannot be read raises.

    >>> correct("so it is #### 42", "42"), correct("Answer: 7", "42")
    (1.0, 0.0)
    >>> correct(r"Therefore $x = \\boxed{\\frac{1}{2}}$", "0.5"), correct(r"\\boxed{\\frac{1}{3}}", "0.5")
    (1.0, 0.0)
    >>> correct("no idea", "42")
    (0.0, 'no answer is stated')
    """
    target = gold(answer)
    try:
        with at_most(SECONDS):
            said = reading_of(completion, target)
            value = compared(said, target) if said else (0.0, "no answer is stated")
            return (None, "its sentence denies, doubts or bounds it") if said and said.doubted and value == 1.0 else value
    except UNREADABLE as error:
        return 0.0, f"the answer cannot be read: {str(error) or type(error).__name__}"


@lru_cache(maxsize=256)
def gold(answer: str) -> Reading:
    """The gold answer, read strictly; one that does not equal itself is an error of the data, so it raises.

    Of a whole solution, what its box holds is the answer; prose without a box is none.

    >>> gold("42").number.value, gold(r"3\\sqrt{13}").formula, gold(r"So it is $\\boxed{2x}$.").formula
    (Fraction(42, 1), [3*sqrt(13)], [2*x])
    """
    box = boxes(answer)
    alone = bare(box[1] if box else answer)
    try:
        with at_most(3 * SECONDS):
            found = read(alone)
            sure = alone != "" and compared(read(f"${alone}$"), found) == 1.0 and len(alone.split()) <= MOST_WORDS
    except UNREADABLE as error:
        raise ValueError(f"the gold answer {answer[:80]!r} cannot be read as mathematics: {error}") from None
    if not sure:
        raise ValueError(f"the gold answer {answer[:80]!r} is no number, formula or short text that equals itself")
    return found


def reading_of(completion: str, target: Reading) -> Reading | None:
    """What the completion states, as the kind of thing that the gold answer is; of a sentence, its last formula or number."""
    said, text = stated(completion), final(completion)
    if target.number is None and target.formula is None:
        return Reading(BASE.sub(r"_\1", bare(text if said is None else said)))
    if said is None:
        return read(text) if ALONE.fullmatch(text) and not re.search(r"(?<!\S)[A-Za-z]{2}", text) else last_of(text)
    if whole(said) is None and len(PLAIN_WORD.findall(latex(said))) > 1 and not NEGATED.search(said):
        return last_of(said)
    return read(MINUS.sub("-", LEAD.sub("", bare(said), count=1), count=1)) if said else None


def last_of(text: str) -> Reading | None:
    """The last formula or number of a prose text, whichever comes last."""
    text = text.replace(r"\$", "").replace("$$", "$")
    end, formula = max(last_between(text, *pair) for pair in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")))
    number = last(text[end:])
    found = Reading(number.text, number) if number is not None else read(formula) if formula else None
    sentence = next((one for one in reversed(SENTENCES.split(text)) if re.search(r"[\d$\\]", one)), "")
    return found._replace(doubted=DOUBT.search(sentence[-LONGEST:]) is not None) if found else None


def last_between(text: str, left: str, right: str) -> tuple[int, str]:
    """Where the last formula between these two ends, and what it is; (0, "") where there is none."""
    end = text.rfind(right)
    start = text.rfind(left, 0, max(end, 0))
    return (end + len(right), text[start + len(left) : end].strip()) if start >= 0 else (0, "")


def read(text: str) -> Reading:
    """A number, a formula or a text, whichever it is; ValueError where it is a formula that cannot be read."""
    text = bare(text)
    number = whole(text)
    if number is not None and number.value is not None:
        return Reading(text, number)
    written = latex(text)
    signs = FRAMES.sub("", QUOTED.sub("", written)).strip()
    if NUMBER_OF.fullmatch(plain(text).strip()):
        return Reading(text, number or doubtful(text))
    if len(signs) < 2 or AS_TEXT.search(written) or (WORD.search(signs) and not OPERATORS.search(signs)):
        return Reading(BASE.sub(r"_\1", text), number)
    check_size(written)
    check_words(written, signs)
    value = right_side(written)
    if value is None:
        return Reading(text)
    return Reading(text, number or (doubtful(text) if COMMA.fullmatch(plain(text)) else None), parsed(value), brackets(value))


def check_words(written: str, signs: str) -> None:
    """Refuse a formula with words that may change its value: the library would drop them."""
    words = {
        word.casefold() for quoted in QUOTED.findall(written) for word in re.findall("[A-Za-z]{3,}", quoted.partition("{")[2])
    }
    words |= {word.casefold() for word in WORD.findall(signs)}
    if (
        BEHIND.search(signs)
        or LETTER.search(written)
        or words & (NO_UNITS - {"and", "but"} | {"less", "more", "fewer", "greater"})
    ):
        raise ValueError("words stand in it that are no units")


def right_side(text: str) -> str | None:
    """The formula whose value an equation states; None where sides without letters are not equal, so that it states nothing.

    >>> right_side("x=6+1=7"), right_side("42=x"), right_side("41=42"), right_side("y=2x")
    ('7', '42', None, 'y=2x')
    """
    sides = [side.strip() for side in EQUALS.split(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))]
    if len(sides) == 1 or SEVERAL.search(text):
        return text
    numeric = [side for side in sides if side and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", QUOTED.sub("", side)))]
    if len(sides) == 2 and len(numeric) < 2:
        return sides[0] if numeric == sides[:1] and re.fullmatch("[A-Za-z]", sides[1]) else text
    if not numeric or numeric[-1] != sides[-1]:
        return None
    from math_verify import verify

    value = parsed(numeric[-1])
    return numeric[-1] if all(verify(value, parsed(side), timeout_seconds=None) for side in numeric[:-1]) else None


def brackets(text: str) -> str:
    """The brackets around a tuple, an interval or a set, "," of a list without them, and "" of anything else.

    >>> brackets("x = (1, 2)"), brackets("[1,2)"), brackets(r"\\{1\\}"), brackets("1, 2"), brackets("(x+1)"), brackets("(1,2)+(3,4)")
    ('()', '[)', '{}', ',', '', '')
    """
    text = re.split(r"=|\\in(?![A-Za-z])", text)[-1].replace(r"\{", "{").replace(r"\}", "}").strip()
    steps = ({**dict.fromkeys("([{", 1), **dict.fromkeys(")]}", -1)}.get(sign, 0) for sign in text)
    depths = list(accumulate(steps))
    if 0 not in depths[:-1] and text[:1] in tuple("([{") and text[-1:] in tuple(")]}"):
        return (
            text[0] + text[-1]
            if text[0] + text[-1] != "()" or any(s == "," and d == 1 for s, d in zip(text, depths, strict=True))
            else ""
        )
    return "," if any(s == "," and d == 0 for s, d in zip(text, depths, strict=True)) else ""


def latex(text: str) -> str:
    """The text in the LaTeX that the library reads, without the units behind it.

    >>> latex("2√3 meters"), latex("−5π")
    ('2\\\\sqrt{3}', '-5\\\\pi')
    """
    text = ROOT.sub(r"\\sqrt{\1\2}", text).translate(SYMBOLS)
    text = SPACING.sub(" ", text).replace("{,}", ",").replace(r"\$", "").replace("**", "^")
    text = REPEATED.sub(repeated, PI.sub(r"\\pi ", text))
    text = DEGREES.sub(r"\1{\\frac{\2\\pi}{180}}", text)
    return UNITS.sub(r"\1", text.strip()).strip()


def repeated(match: re.Match[str]) -> str:
    """A decimal whose last digits repeat, as a fraction."""
    start, digits = int(match[1] + match[2] or 0), match[1] + match[2] + match[3]
    return rf"\frac{{{int(digits) - start}}}{{{10 ** len(match[2]) * (10 ** len(match[3]) - 1)}}}"


def check_size(text: str) -> None:
    """Refuse what sympy would work out for hours, or for ever, in one operation that nothing interrupts.

    >>> check_size("9^{9^{9}}")
    Traceback (most recent call last):
    ValueError: a power in a power
    """
    if len(text) > LONGEST or re.search(r"\d{60}", text):
        raise ValueError("it is too long")
    if max(accumulate({**dict.fromkeys("([{", 1), **dict.fromkeys(")]}", -1)}.get(sign, 0) for sign in text)) > DEEPEST:
        raise ValueError("it is nested too deeply")
    if re.search(r"!\s*[)}\]]*\s*!|\d{4,}\s*[)}\]]*\s*!|\^[^!]*[)}\]]\s*!", text):
        raise ValueError("a factorial is too large")
    product = largest = 1
    for match in re.finditer(r"(\S)\s*\^\s*", text):
        exponent = group(text, match.end())
        digits = re.findall(r"\d+", exponent)
        if re.search(r"[\d)}\]]\s*\^|!", exponent) or re.match(r"\s*\^", text[match.end() + len(exponent) :]):
            raise ValueError("a power in a power")
        if sum(map(len, digits)) > 4:
            raise ValueError("an exponent is too large")
        power = max([1, *map(int, digits)])
        if match[1].isdigit():
            largest = max(largest, power)
        elif not match[1].isalpha():
            product *= power
    if product * largest > MOST_POWER:
        raise ValueError("an exponent is too large")


def group(text: str, start: int) -> str:
    """The argument that begins at `start`: what stands in braces, or one sign."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth <= 0:
            return text[start : place + 1]
    return text[start:]


def parsed(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    found: list[Any] = parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    if not found:
        raise ValueError("it is no formula")
    return found


def compared(said: Reading, target: Reading) -> float | tuple[float | None, str]:
    """1.0 where the two are equal. A number equals a formula that has its value; a text equals only the same text."""
    if target.number and target.number.value is not None and said.number:
        return agreement(said.number, target.number)
    if as_formula(said) is None or as_formula(target) is None:
        return float(same(said.text, target.text))
    kinds = {said.kind, target.kind}
    if len(kinds) == 2 and kinds - {",", "", "{}"} and kinds != {"", "()"}:
        return 0.0
    from math_verify import verify

    return float(verify(as_formula(target), as_formula(said), timeout_seconds=None))


def as_formula(reading: Reading) -> list[Any] | None:
    if reading.number is None or reading.number.value is None:
        return reading.formula
    from sympy import Rational

    return [Rational(reading.number.value)]


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds of processor time; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise OutOfTime(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again and again: sympy may swallow one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def row(raw: dict) -> dict:
    """A row of a mathematics data set with `problem` and `solution` (or `answer`) as prompt and answer.

    >>> row({"problem": "1+1?", "solution": r"It is $\\boxed{2}$.", "level": 1})
    {'prompt': '1+1?', 'answer': '2', 'level': 1}
    """
    rest = {key: value for key, value in raw.items() if key not in ("problem", "solution", "answer")}
    answer = raw.get("answer")
    return {"prompt": raw["problem"], "answer": boxed(raw["solution"]) if answer in (None, "") else answer, **rest}


def boxed(solution: str) -> str:
    """What the solution has in its last \\\\boxed{}.

    >>> boxed(r"so \\boxed{\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    found = boxes(solution)
    if not found or not found[1]:
        raise ValueError("the solution has no \\boxed{...}")
    return found[1]
