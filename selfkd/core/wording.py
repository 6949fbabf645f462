"""Words that several messages share: a likely spelling, the first line of an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def listed(names: Sequence[str], last: str = "and") -> str:
    """Return 'a', 'b' and 'c' of several names."""
    *most, end = (f"'{name}'" for name in names)
    return f"{', '.join(most)} {last} {end}" if most else end
