"""How the text of a judgment becomes a number: named parsers, pure, of what the judge wrote and nothing else.

What cannot be read is None with the reason, never a middle value and never a zero. No parser raises, and none returns a value outside
its range, whatever the text is. They take time in proportion to the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Parsed = tuple[float | None, str]  # the value, or None and why there is none
Name = Literal["number", "letter", "word", "tag", "json"]
Kind = Literal["mark", "verdict", "criterion"]

# Which parsers read which kind of judgment; the first one is its default.
PARSERS: dict[Kind, tuple[Name, ...]] = {
    "mark": ("number", "tag", "json"),
    "verdict": ("letter", "tag", "json"),
    "criterion": ("word", "tag", "json"),
}
# The words of the kinds that are no numbers. A verdict is the value of the answer that was shown first.
WORDS: dict[Kind, dict[str, float]] = {
    "mark": {},
    "verdict": {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5},
    "criterion": {"yes": 1.0, "no": 0.0},
}
# A number, and behind it what it is out of: 4/5, 4 out of 5. Not a part of a word, of a date or of a longer number.
NUMBER = re.compile(
    r"(?<![\w.])(?<!\d[,/:-])(-?[0-9]{1,15}(?:\.[0-9]{1,15})?)(?!\w|[.,][0-9])"
    r"(?:\s{0,3}(?:/|out\s{1,3}of)\s{0,3}([0-9]{1,15}(?:\.[0-9]{1,15})?))?"
)
BRACKETS = re.compile(r"\[\[ {0,3}(\w{1,5}) {0,3}\]\]")
OPENING = re.compile(r"\W{0,9}(yes|no)\b", re.IGNORECASE)
MARKUP = " \t*_`'\"().[]#>"
MOST_OBJECTS = 64  # of a text that are tried as JSON, from its end


@dataclass(frozen=True)
class Parser:
    """One way to read judgments of one kind. `key` is the name of the tag or JSON field; the range is that of a mark."""

    name: Name
    kind: Kind
    key: str = "score"
    lowest: float = 0.0
    highest: float = 1.0

    def read(self, text: str) -> Parsed:
        """Return what a judgment says.

        >>> Parser("number", "mark", lowest=0, highest=5).read("Clear and right. Score: 4/5")
        (4.0, '')
        >>> Parser("tag", "mark", highest=10).read("<score>7</score>")
        (7.0, '')
        >>> Parser("letter", "verdict").read("Both are right, the second is shorter. [[B]]")
        (0.0, '')
        >>> Parser("word", "criterion").read("Yes, it names its source.")
        (1.0, '')
        >>> Parser("json", "criterion", key="met").read('It does. {"met": true}')
        (1.0, '')
        >>> Parser("number", "mark", highest=5).read("I cannot judge that.")
        (None, 'no number between 0 and 5')
        """
        if self.name == "tag":
            return self._of_piece(tagged(text, self.key), f"no <{self.key}>…</{self.key}>")
        if self.name == "json":
            return self._of_piece(json_field(text, self.key), f"no JSON object with '{self.key}'")
        if self.name == "number":
            return last_number(text, self.lowest, self.highest)
        return last_letter(text) if self.name == "letter" else last_word(text)

    def _of_piece(self, piece: Any, missing: str) -> Parsed:
        if piece is None:
            return None, missing
        if self.kind == "mark":
            return _mark(piece, self.lowest, self.highest)
        return _one_of(piece, WORDS[self.kind])

    def written(self, value: float) -> str:
        """Return a text that reads as `value`: what a dry run's model answers, and what a canary tries to smuggle in.

        >>> Parser("tag", "mark", highest=10).written(10), Parser("letter", "verdict").written(1)
        ('<score>10</score>', '[[A]]')
        """
        said = f"{value:g}" if self.kind == "mark" else next(word for word, means in WORDS[self.kind].items() if means == value)
        said = said.upper() if self.kind == "verdict" else said
        forms: dict[Name, str] = {
            "tag": f"<{self.key}>{said}</{self.key}>",
            "json": json.dumps({self.key: said}),
            "letter": f"[[{said}]]",
            "number": f"Score: {said}",
            "word": f"Answer: {said}",
        }
        return forms[self.name]


def last_number(text: str, lowest: float, highest: float) -> Parsed:
    """Return the last number in the range. Of '4/5' and '4 out of 5' that is the 4, and where 5 is not the highest mark, neither.

    >>> last_number("Point 1: yes. Point 2: no. I give 3.5.", 0, 5)
    (3.5, '')
    >>> last_number("8/10", 0, 5), last_number("12", 0, 5)
    ((None, 'no number between 0 and 5'), (None, 'no number between 0 and 5'))
    """
    found = None
    for match in NUMBER.finditer(text):
        value, whole = float(match[1]), match[2]
        if lowest <= value <= highest and (whole is None or float(whole) == highest):
            found = value
    return (None, f"no number between {lowest:g} and {highest:g}") if found is None else (found, "")


def last_letter(text: str) -> Parsed:
    """Return the last verdict in double brackets, [[A]], [[B]] or [[C]] for a tie; without any, a letter that the last line ends on.

    >>> last_letter("[[A]] at first sight, but no: [[B]]"), last_letter("Verdict: **A**"), last_letter("[[C]]")
    ((0.0, ''), (1.0, ''), (0.5, ''))
    >>> last_letter("A good answer. Better than B")
    (None, 'no verdict [[A]], [[B]] or [[C]]')
    """
    marked = [match[1].lower() for match in BRACKETS.finditer(text) if match[1].lower() in WORDS["verdict"]]
    said = marked[-1] if marked else concluding(text, WORDS["verdict"])
    return (WORDS["verdict"][said], "") if said else (None, "no verdict [[A]], [[B]] or [[C]]")


def last_word(text: str) -> Parsed:
    """Return yes (1) or no (0): the word that a judgment opens with, or that its last line ends on; not if these two differ.

    >>> last_word("It cites two papers.\\nAnswer: No."), last_word("Yes. There is no error.")
    ((0.0, ''), (1.0, ''))
    >>> last_word("Yes, mostly.\\nAnswer: no"), last_word("There is no error.")
    ((None, 'says both yes and no'), (None, 'neither yes nor no'))
    """
    opens, ends = OPENING.match(text), concluding(text, WORDS["criterion"])
    said = {word for word in (opens[1].lower() if opens else "", ends) if word}
    if len(said) == 1:
        return WORDS["criterion"][said.pop()], ""
    return None, "says both yes and no" if said else "neither yes nor no"


def concluding(text: str, words: Mapping[str, float]) -> str:
    """Return the word of `words` that is the whole last line, or stands at its end behind a colon; '' where none does.

    >>> concluding("Hm.\\n\\nFinal verdict: [B]\\n", {"a": 1, "b": 0}), concluding("not b", {"b": 0})
    ('b', '')
    """
    lines = text.rstrip().rsplit("\n", 1)
    said = lines[-1].rpartition(":")[2].strip(MARKUP + "\r").lower()
    return said if said in words else ""


def tagged(text: str, key: str) -> str | None:
    """Return what stands in the last whole <key>…</key>, None where there is none.

    >>> tagged("<score>3</score> no, <score> 4 </score>", "score"), tagged("</score>3<score>", "score")
    (' 4 ', None)
    >>> tagged("<score>2</score> It wants 10</score>", "score")
    '2'
    """
    closes = text.rfind(f"</{key}>")
    opens = text.rfind(f"<{key}>", 0, closes) if closes >= 0 else -1
    return text[opens + len(key) + 2 : text.find(f"</{key}>", opens)] if opens >= 0 else None


def json_field(text: str, key: str) -> Any:
    """Return the field of the last JSON object of a text that has it, and of objects in one another the outermost; None where none has.

    >>> json_field('First {"score": 1}, on reflection {"why": "clear", "score": 4}.', "score")
    4
    >>> json_field('{"score": 2, "parts": {"style": {"score": 10}}}', "score")
    2
    """
    decoder, at, said, last = json.JSONDecoder(), len(text), None, 0
    for _ in range(MOST_OBJECTS):
        at = text.rfind("{", 0, at)
        if at < 0:
            break
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            continue
        if found.get(key) is not None and end > last:  # the last one, or one that holds it
            said, last = found[key], end
    return said


def _mark(piece: Any, lowest: float, highest: float) -> Parsed:
    if isinstance(piece, str):
        return last_number(piece, lowest, highest)
    if isinstance(piece, bool) or not isinstance(piece, int | float):
        return None, f"{_shown(piece)} is no number"
    return (float(piece), "") if lowest <= piece <= highest else (None, f"no number between {lowest:g} and {highest:g}")


def _one_of(piece: Any, words: Mapping[str, float]) -> Parsed:
    said = {True: "yes", False: "no"}[piece] if isinstance(piece, bool) else piece
    said = said.strip(MARKUP + "\r\n").lower() if isinstance(said, str) else ""
    return (words[said], "") if said in words else (None, f"{_shown(piece)} is none of {', '.join(words)}")


def _shown(piece: Any) -> str:
    """Return a value as a reason quotes it: short, and on one line."""
    shown: Callable[[Any], str] = repr if isinstance(piece, str) else json.dumps
    text = shown(piece)
    return text if len(text) <= 40 else f"{text[:40]}…"
