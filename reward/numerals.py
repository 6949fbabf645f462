"""Numbers as people write them: the one reading that every numeric reward here shares. Its rules stand in docs/rewards.md.

A numeral that may mean two numbers (`1,5`) has no value, only candidates: a reward gives 0 where none of them is the answer, and
abstains where one is. Every function takes time in proportion to its text.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from stated import bare

LONGEST = 1000  # characters of a numeral
MONEY = r"(?:(?:US|[ACS]|NZ|HK)?\$|[€£¥₹]|Rs\.?|USD|EUR|GBP|INR)"
NUMERAL = re.compile(
    rf"(?P<sign>[-+]?)(?:{MONEY}\s?)?(?P<inner>[-+]?)(?:"
    r"(?:(?P<whole>\d{1,50})\s+)?(?P<top>\d{1,50})/(?P<under>\d{1,50})"
    r"|(?P<comma>[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?)"  # 1,234,567 and 12,34,567
    r"|(?P<space>[1-9]\d{0,2}(?:\s\d{3})+(?:[.,]\d+)?)"
    r"|(?P<dot>[1-9]\d{0,2}(?:\.\d{3}){2,}(?:,\d+)?|[1-9]\d{0,2}\.\d{3},\d{1,2})"  # one dot alone is a decimal point
    r"|(?P<simple>\d+(?:\.\d+)?|\.\d+))"
    r"(?:[eE](?P<power>[-+]?\d{1,3}))?(?P<tail>(?![.,]?\d).*)",
    re.ASCII,
)
LARGE = {
    "hundred": 2, "thousand": 3, "k": 3, "lakh": 5, "million": 6, "mn": 6, "M": 6, "crore": 7, "billion": 9, "bn": 9, "B": 9, "trillion": 12,
    "hundreds": 2, "thousands": 3, "lakhs": 5, "millions": 6, "crores": 7, "billions": 9, "trillions": 12, "quadrillion": 15,
}  # fmt: skip
UNITS = """m mm cm dm km g mg kg t l L ml mL cl dl s ms h hr hrs min d ft in yd mi lb lbs oz mph kph W kW V A J kJ N Hz Pa C F K
    cal kcal am pm AM PM st nd rd th"""
GLUED = frozenset(UNITS.split())  # may stand right behind the digits; 5x, 3i and 9π are products
CHANGE = """pi sqrt root roots plus minus factorial squared cubed square-rooted doubled tripled quadrupled halved inverted negated
    divided multiplied increased decreased raised reduced mod modulo point dozen dozens score gross half halves third thirds quarter
    quarters fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths millionths mil quadrillions quintillion
    zillion zillions log ln sin cos tan exp choose below negative one two three four five six seven eight nine ten eleven twelve
    twenty thirty forty fifty sixty seventy eighty ninety zero power mille permille"""
CHANGES = frozenset(CHANGE.split())  # behind a number, they make another one of it
JOIN = """or and but times over if not no never is isn was are wrong false incorrect maybe perhaps probably unless except excluding
    without than rather instead to i e x y z n"""
NO_UNITS = CHANGES | frozenset(JOIN.split())  # of an answer that should be a number: what these begin is no unit
OPERATE = "sqrt root log ln logarithm sin cos tan exp half third quarter twice double triple thrice square cube factorial inverse reciprocal"
OPERATES = frozenset(OPERATE.split())  # before a number, perhaps with `of`
MINUSES = ("minus", "negative")
FACTOR = re.compile(
    r"\\(?:pi|sqrt|[dt]?frac|times|cdot|div|pm|mp|theta|alpha|beta|lambda|infty|log|ln|sin|cos|tan|[pb]?mod)(?![A-Za-z])"
    r"|[!^×·÷√π½¼¾⅓⅔‰+*](?![*]|[A-Za-z]{2})|[beijknqrvwxyz](?![\w'’/]|\.\w)"
)  # what stands apart behind a number and makes a formula of it
ABSOLUTE = re.compile(r"\|(-[0-9][0-9.,]{0,50})\|")
POWER = re.compile(r"(?<=[0-9)])\s?\*\*\s?(?=[-+]?[0-9])(?![0-9.,]+\*\*)")
IN_BRACKETS = re.compile(r"\s+\(([A-Za-z][A-Za-z ]+)\)\s*")
UNIT_POWER = re.compile(r"(?<=[A-Za-z])(?:\^\{?-?[0-9]\}?|[²³]|[23]\b)")
LATEX = (
    (re.compile(r"\\(?:text|math)[a-z]{0,9}\s?\{([^{}]{0,99})\}"), r" \1"),
    (
        re.compile(r"\\[dtc]?frac\s?(?:\{\s?(-?[0-9]{1,50})\s?\}|([0-9]))\s?(?:\{\s?([0-9]{1,50})\s?\}|([0-9]))"),
        r" \1\2/\3\4 ",
    ),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=[0-9])(?:\\[,;:! ]|[~'’\u00a0\u2007\u2009\u202f])(?=[0-9]{3})"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\^\s?\{?\s?\\circ\s?\}?"), "°"),
    (
        re.compile(r"(?<=[0-9])\s?(?:×|·|\*|\\times|\\cdot)\s?10\s?\^\s?(?:\{([-+]?[0-9]{1,3})\}|([-+]?[0-9]{1,3})(?![0-9]))"),
        r"e\1\2",
    ),
    (re.compile(r"(?<![\w.^}])10\s?\^\s?(?:\{([-+]?[0-9]{1,3})\}|([-+]?[0-9]{1,3})(?![0-9]))"), r"1e\1\2"),
)
MINUS = str.maketrans("−–﹣－", "----")
BORDERS = re.compile(r"[=<>≈~|;()\[\]\"`]|\\(?:boxed|fbox)|\*\*|[:,](?![0-9])|(?<![0-9])[:,]")
THOUSANDS = re.compile(r"(?<![0-9.,/])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9])")
NAME = re.compile(r"[A-Za-z][\w/·]*(?:\^\{?-?[0-9]\}?)?\W*")  # x2, H2O, cm^2: their digits are no numbers
SIGNS = ("-", "+", "±", r"\pm")


class Numeral(NamedTuple):
    """What a numeral says: its value, None where that is not certain, and what else it may mean."""

    text: str
    value: Fraction | None
    perhaps: frozenset[Fraction] = frozenset()


def agreement(said: Numeral | None, gold: Numeral) -> float | tuple[float | None, str]:
    """1.0 where both surely say one number, 0.0 where they cannot, and None with the reason where they may.

    >>> agreement(whole("42.0"), whole("42")), agreement(whole("41"), whole("42")), agreement(None, whole("42"))
    (1.0, 0.0, 0.0)
    >>> agreement(read("1,5"), whole("1.5"))
    (None, "'1,5' against '1.5': it may be meant, and may not")
    """
    if said is None or not (meant(said) & meant(gold)):
        return 0.0
    if said.value == gold.value:
        return 1.0
    return None, f"{said.text[:40]!r} against {gold.text[:40]!r}: it may be meant, and may not"


def meant(numeral: Numeral) -> frozenset[Fraction]:
    return numeral.perhaps if numeral.value is None else numeral.perhaps | {numeral.value}


def gold(answer: str) -> Numeral:
    """The gold answer as one number; anything else is an error of the data, so it raises, and the sample has no value.

    >>> str(gold("$1,042").value), str(gold("42 cm^2").value)
    ('1042', '42')
    >>> gold("1,5")
    Traceback (most recent call last):
    ValueError: the gold answer '1,5' is not one number
    """
    found = whole(bare(answer))
    if found is None or found.value is None:
        raise ValueError(f"the gold answer {answer[:80]!r} is not one number")
    return found


def read(text: str) -> Numeral | None:
    """A text that should be one numeral; where it is not, the numbers in it are what it may mean."""
    return whole(bare(text)) or doubtful(text)


def whole(text: str) -> Numeral | None:
    """A text that is one numeral, with a currency sign or a unit; None where it is anything else.

    >>> [str(whole(text).value) for text in ("-$5", "1.234.567,5", "1 234", "1,00,000", "6.02e2", "5 1/2", "42 %")]
    ['-5', '2469135/2', '1234', '100000', '602', '11/2', '42']
    >>> whole("3-4"), whole("9\\\\pi"), whole("5!"), whole("3/0")
    (None, None, None, None)
    """
    text = plain(text).strip()
    match = NUMERAL.fullmatch(text) if len(text) <= LONGEST else None
    if match is None or (match["sign"] and match["inner"]) or (size := size_of(match)) is None:
        return None
    value = -size if "-" in (match["sign"], match["inner"]) else size
    return with_tail(text, value, match["tail"])


def size_of(match: re.Match[str]) -> Fraction | None:
    """The number of a match without its sign; None where there is none (3/0)."""
    if match["under"]:
        part = Fraction(int(match["top"]), int(match["under"])) if int(match["under"]) and not match["power"] else None
        return part if match["whole"] is None or part is None else int(match["whole"]) + part if part < 1 else None
    if match["dot"] or match["space"]:
        digits = re.sub(r"\s", "", match["space"] or match["dot"].replace(".", "")).replace(",", ".")
    else:
        digits = (match["comma"] or match["simple"]).replace(",", "")
    return Fraction(digits) * Fraction(10) ** int(match["power"] or 0)


def with_tail(text: str, value: Fraction, tail: str) -> Numeral | None:
    """What the number means with what stands behind it: nothing, a unit, a per cent sign, or `million`."""
    if re.match(r"\s*[·*]", tail) or re.search(r"[-/·*]\s*$", tail):
        return None
    tail = IN_BRACKETS.sub(r" \1", tail)
    words = re.split(r"[\s/·*.-]+", UNIT_POWER.sub("", tail).strip().lstrip("$€£¥₹°"))
    first, size = words[0], LARGE.get(words[0], LARGE.get(words[0].casefold()))
    if len(words) > 6 or any(word.casefold() in NO_UNITS or not (word.isalpha() or word == "%") for word in words if word):
        return None
    if size is not None:
        return Numeral(text, None, frozenset((value, value * 10**size)))
    if first in ("%", "percent") or words[:2] == ["per", "cent"]:
        return Numeral(text, value, frozenset([value / 100]))
    return None if tail[:1].isalpha() and first not in GLUED else Numeral(text, value)


def plain(text: str) -> str:
    """The text with LaTeX and typography of numerals written plainly.

    >>> plain("−\\\\$1{,}000"), plain("6.02 \\\\times 10^{23}"), plain("5\\\\frac12")
    ('-$1,000', '6.02e23', '5 1/2 ')
    """
    text = text.translate(MINUS)
    for pattern, instead in LATEX:
        text = pattern.sub(instead, text)
    return text


def doubtful(text: str) -> Numeral | None:
    """What a text may mean that is no numeral: each number in it; None where there is none."""
    parts = [part for part in re.findall(r"[0-9]+(?:[.,][0-9]+)*", plain(text[: 4 * LONGEST]))[:40] if len(part) < 60]
    sizes = {
        Fraction(one)
        for part in parts
        for one in (*part.replace(",", ".").split("."), part.replace(",", "."))
        if one.count(".") < 2
    }
    return Numeral(text, None, frozenset(sizes | {-one for one in sizes})) if sizes else None


def last(text: str) -> Numeral | None:
    """The last numeral of a prose text; digits that belong to a name (x2, cm^2) are none.

    >>> [str(last(text).value) for text in ("48 - 6 = 42, which is $1,042.00.", "about −7 cm^2", "pages 3-4")]
    ['1042', '-7', 'None']
    """
    joined = THOUSANDS.sub(lambda match: match[0].replace(" ", "'"), plain(text.replace("$$", "$")))
    joined = ABSOLUTE.sub(r" ±\1 ", POWER.sub("^", joined))
    words = BORDERS.sub(r" \g<0> ", joined).split()
    for place in range(len(words) - 1, -1, -1):
        if re.search("[0-9]", words[place]) and not NAME.fullmatch(words[place]):
            return in_place(words, place)
    return None


def in_place(words: list[str], place: int) -> Numeral | None:
    """A numeral among words; where those beside it make another number of it, it has no certain value."""
    word = words[place].lstrip("*_'“‘:?{").rstrip("*_'”’,.:?}\\").rstrip("$")
    after = words[place + 1].strip(".,:?!") if place + 1 < len(words) else ""
    if after.casefold() in ("%", "percent", *LARGE) and after != "k":
        word = f"{word} {after}"
    found = whole(word)
    if found is None or found.value is None:
        return found or doubtful(word)
    before = words[place - 1] if place else ""
    earlier = words[place - 2] if place > 1 else ""
    number = earlier if before in ("and", "+") else before
    mixed = whole(f"{number} {word}") if "/" in word and number.isdigit() else None
    if mixed is not None and mixed.value is not None:
        return Numeral(mixed.text, None, frozenset((found.value, mixed.value)))
    if before.casefold() in (*SIGNS, *MINUSES) and not re.search("[0-9)]", earlier):
        return Numeral(f"{before} {word}", None, frozenset((found.value, -found.value)))
    if changed(words[max(0, place - 3) : place], words[place + 1 : place + 3]):
        return Numeral(word, None, frozenset([found.value]))
    return found


def changed(before: list[str], behind: list[str]) -> bool:
    """Whether the words around a number make another number of it.

    >>> changed(["root", "of"], []), changed([], ["squared."]), changed(["is"], ["apples"])
    (True, True, False)
    """
    bracket = before[-1:] == ["("]
    before = [word.casefold().strip("\\$*") for word in before if word not in ("(", "of", "the", "$")]
    behind = [word for word in behind if word not in ("(", "$")]
    if before and (before[-1] in OPERATES or before[-1] in ("not", "never") or before[-1][-1:] in tuple("^×·÷/√")):
        return True
    if bracket and before and (before[-1] in SIGNS or (len(before[-1]) == 1 and before[-1].isalpha())):
        return True
    if [word.strip(".,!") for word in behind] in (["is", "wrong"], ["is", "not"], ["is", "incorrect"], ["is", "false"]):
        return True
    if not behind:
        return False
    word = behind[0].casefold().strip("*_$.,:;?!()'\"")
    return (
        word in CHANGES
        or FACTOR.match(behind[0]) is not None
        or (behind[0] in (*SIGNS, "/") and FACTOR.match("".join(behind[1:])) is not None)
    )
