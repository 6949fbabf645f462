"""Words that several messages share: a likely spelling, the first line of an error, what to do about it. The only user of difflib."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean '...'?" where one of `known` is close to `word`, else an empty text."""
    return f" Did you mean '{close}'?" if (close := closest(word, known)) else ""


def closest(word: str, known: Iterable[str]) -> str:
    """Return the one of `known` that is close to `word`, or an empty text."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def first_line(error: BaseException) -> str:
    """Return the first line of the error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def way_out_of(error: Exception) -> str:
    """Return what a person can do about an error of somebody else."""
    number = getattr(error, "errno", None)
    if isinstance(error, PermissionError) or number == errno.EROFS:
        return "    This account may not read or write there. Runs can lie elsewhere: --runs DIR"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "    Free some disk and repeat the command; runs can lie elsewhere: --runs DIR"
    return "SELFKD_DEBUG=1 shows where this comes from."


def counted(number: int, thing: str) -> str:
    """Return '1 round' or '2 rounds'."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def listed(names: Sequence[str], last: str = "and") -> str:
    """Return 'a', 'b' and 'c' of several names."""
    *most, end = (f"'{name}'" for name in names)
    return f"{', '.join(most)} {last} {end}" if most else end
