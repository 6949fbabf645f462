"""What a command answers to a program: one JSON document a line, of one shape for all commands, errors too.

{"selfkd": "0.1.0", "command": "status", "ok": true, "exit": 0, "data": {…}, "error": null}
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import selfkd
from selfkd.errors import SelfkdError

FLAG = "--json"
_streams: list[TextIO] = []  # the stdout that documents go to while all else goes to stderr


@contextmanager
def alone() -> Iterator[None]:
    """Keep stdout for documents: what a user's function or a library prints meanwhile goes to stderr."""
    _streams.append(sys.stdout)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = _streams.pop()


def told(command: str, data: Any, code: int = 0) -> int:
    """Print what a command found, and return its exit code. It is `ok` where that is 0."""
    _print(command, code, data=plain(data))
    return code


def failed(command: str, error: Exception, notes: Sequence[str], code: int) -> int:
    """Print why a command failed: what, where and what to do of an error of ours; `notes` say where its log is."""
    ours = isinstance(error, SelfkdError)
    said = (
        {name: getattr(error, name) for name in ("what", "where", "fix")}
        if ours
        else {"what": str(error), "where": "", "fix": ""}
    )
    _print(command, code, error={"kind": type(error).__name__, **said, "notes": list(notes)})
    return code


def _print(command: str, code: int, data: Any = None, error: Any = None) -> None:
    whole = {"selfkd": selfkd.__version__, "command": command, "ok": code == 0, "exit": code, "data": data, "error": error}
    print(json.dumps(whole, ensure_ascii=False, allow_nan=False), file=_streams[-1] if _streams else sys.stdout, flush=True)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: dataclasses as objects, paths as texts, a number that is none as null.

    >>> from pathlib import Path
    >>> plain({"at": Path("runs/star"), "loss": float("nan"), "rounds": (1, 2)})
    {'at': 'runs/star', 'loss': None, 'rounds': [1, 2]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [plain(inner) for inner in value] if isinstance(value, Sequence | set | frozenset) else str(value)
