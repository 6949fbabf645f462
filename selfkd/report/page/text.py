"""Text for a page, whoever wrote it: whole where it is short, and with every sign visible that would act instead of being read.

Escaping is the template's; this is for what escaping leaves: control signs, marks that turn the direction of what follows, tags that
no one sees, and halves of characters.
"""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

MOST = 1500  # characters of one text on a page: the thousandth line of a repetition loop says no more than the hundredth
NO_NUMBER = "–"
PICTURES = 0x2400  # where Unicode has a picture of each control sign
# Control signs but for tab and line feed; halves of surrogate pairs; marks of direction; spaces of no width; tags; no characters.
ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)


def clean(value: Any) -> Any:
    """Return a value as it may stand on a page; markup of our own and what is no text stay as they are.

    >>> clean("a\\x00b \\u202e c")
    'a␀b ⟨U+202E⟩ c'
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return NO_NUMBER if value is None else value
    return ACTING.sub(_shown, value.replace("\r\n", "\n"))


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(PICTURES + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def shortened(text: str | None, most: int = MOST) -> str:
    """Return the beginning of a text, and how much more there is of it.

    >>> shortened("abcdef", 4)
    'abcd … (2 more characters)'
    """
    text = text or ""
    rest = len(text) - most
    return text if rest <= 0 else f"{text[:most]} … ({rest:,} more characters)"


def beginning(text: str, most: int) -> str:
    """Return a text in one line, cut where it is longer than `most`.

    >>> beginning("one  two\\nthree", 8)
    'one two…'
    """
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"
