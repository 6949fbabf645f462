"""What a library raised, on its way to another process and to a person: its words, and nothing that could not be read there.

An exception of vLLM or pydantic may hold objects that do not pickle, or of classes that the other process would have to import; of
those Ray can only say that there was something.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from selfkd.errors import SelfkdError

ELSEWHERE = re.compile(r"root cause|stack trace", re.IGNORECASE)  # how vLLM says that another of its processes knows more
RAISED = re.compile(r"\b(?:[A-Za-z_]\w*\.)*(?P<kind>[A-Z]\w*(?:Error|Exception|Interrupt)): (?P<what>\S.*)$")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Reported(Exception):
    """What a library raised, in one line: the kind of its error, and what it says."""


def reported(error: Exception, log: Path | None = None, start: int = 0) -> Exception:
    """Return an error that any process can read: one of selfkd as it is, of any other the words.

    Where these only say that the cause was printed, it is looked for in `log`, behind byte `start`.
    """
    if isinstance(error, SelfkdError | Reported):
        return error
    said = in_words(error)
    cause = _cause(log, start) if log and ELSEWHERE.search(said) else ""
    return Reported(cause or said)


def in_words(error: BaseException) -> str:
    """Return the kind of an error and what it says, in one line."""
    said = "; ".join(_messages(error)) or next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {ESCAPES.sub('', said)}"


def _messages(error: BaseException) -> Iterator[str]:
    """Yield what an error of pydantic found wrong; its own text shows whole objects instead."""
    errors: Callable[[], Any] | None = getattr(error, "errors", None)
    if type(error).__module__.startswith("pydantic") and errors:
        yield from (
            str(one.get("msg", "")).removeprefix("Value error, ").removeprefix("Assertion failed, ") for one in errors()
        )


def _cause(log: Path, start: int) -> str:
    """Return the last error in a log that says something itself; '' where there is none."""
    try:
        with log.open("rb") as handle:
            handle.seek(start)
            lines = ESCAPES.sub("", handle.read().decode("utf-8", "replace")).splitlines()
    except OSError:
        return ""
    found = [match for line in lines if (match := RAISED.search(line)) and not ELSEWHERE.search(line)]
    return f"{found[-1]['kind']}: {found[-1]['what']}" if found else ""
