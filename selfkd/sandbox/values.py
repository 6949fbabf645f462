"""Reading what a program reported, as data and nothing else: exact types, capped depth, every oddity a reason.

The other half of `selfkd.sandbox.inside.encode`, on the trusted side. A report is JSON; whatever is not exactly of the form
that one honest report has is Malformed, whoever wrote it.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

MAX_DEPTH = 64
MAX_SAME_HASH = 32  # members of a set that may share one
MAX_KIND_CHARS = 300
UNKNOWN_FORM = "the report holds a value of no known form"
CONTAINERS = {"l": list, "t": tuple, "s": set, "z": frozenset}
NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class Malformed(ValueError):
    """The report is not a valid one; the message is the reason."""


class Failed(Exception):
    """The report says that the call failed; the message is what the program raised."""


class Foreign:
    """A value of a type that is not plain data; equal to nothing, itself included, and neither true nor false."""

    def __init__(self, kind: str) -> None:
        self.kind = "".join(sign if sign.isprintable() else "?" for sign in kind[:MAX_KIND_CHARS])

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} is not plain data")

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def read(report: bytes, number: int) -> Any:
    """Return the value of report `number`. Raise Malformed where it is not exactly that, Failed where the call failed."""
    found = parse(report)
    if not isinstance(found, dict) or set(found) not in ({"id", "value"}, {"id", "error"}):
        raise Malformed("not a report")
    if type(found["id"]) is not int or found["id"] != number:
        raise Malformed("a report for another call")
    if "error" not in found:
        return decode(found["value"])
    if type(found["error"]) is not str:
        raise Malformed("not a report")
    raise Failed(found["error"])


def parse(report: bytes) -> Any:
    """Return the JSON of a report. A name that appears twice, NaN, and what no parser could hold are refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise Malformed("a name appears twice in the report")
        return dict(pairs)

    try:
        return json.loads(report.decode("ascii"), object_pairs_hook=once, parse_constant=_refuse)
    except Malformed:
        raise
    except (ValueError, RecursionError):  # a bad encoding, bad JSON, thousands of digits, thousands of levels
        raise Malformed("the report is not JSON") from None


def _refuse(constant: str) -> NoReturn:
    raise Malformed(f"{constant} is not JSON")


def decode(found: Any, depth: int = 0) -> Any:
    """Return the Python value of a JSON form: a bare null, boolean, number or text, else a list that begins with its kind."""
    if depth > MAX_DEPTH + 1:
        raise Malformed(f"the value is nested more than {MAX_DEPTH} deep")
    if found is None or type(found) in (bool, int, float, str):
        return found
    try:
        kind, *parts = found if type(found) is list else [None]
        return _decode_kind(kind, parts, depth + 1)
    except Malformed:
        raise
    except (ValueError, TypeError, ArithmeticError):  # too few parts, no number where one should be, a list as a key
        raise Malformed(UNKNOWN_FORM) from None


def _decode_kind(kind: Any, parts: list[Any], depth: int) -> Any:
    if kind == "c":
        real, imaginary = (decode(one, depth) for one in parts)
        if type(real) is type(imaginary) is float:
            return complex(real, imaginary)
        raise Malformed(UNKNOWN_FORM)
    [inner] = parts
    if kind in ("l", "t"):
        return CONTAINERS[kind](decode(one, depth) for one in _list(inner))
    if kind in ("s", "z"):
        return CONTAINERS[kind](_distinct([decode(one, depth) for one in _list(inner)]))
    if kind == "d":
        pairs = [(decode(key, depth), decode(one, depth)) for key, one in map(_list, _list(inner))]
        _distinct([key for key, _ in pairs])
        return dict(pairs)
    if type(inner) is not str:
        raise Malformed(UNKNOWN_FORM)
    if kind == "f" and inner in NOT_FINITE:
        return NOT_FINITE[inner]
    if kind == "i" and f"{int(inner, 16):x}" == inner:
        return int(inner, 16)
    if kind == "b" and inner == inner.lower():
        return bytes.fromhex(inner)
    if kind == "?":
        return Foreign(inner)
    raise Malformed(UNKNOWN_FORM)


def _distinct(members: list[Any]) -> list[Any]:
    """Return the members of a set or the keys of a dict, if they differ. Hashes that collide would take minutes to build it."""
    if members and max(Counter(map(hash, members)).values()) > MAX_SAME_HASH:
        raise Malformed("the members of a set have hashes that collide")
    if len(set(members)) < len(members):
        raise Malformed(UNKNOWN_FORM)
    return members


def _list(found: Any) -> list[Any]:
    if type(found) is not list:
        raise Malformed(UNKNOWN_FORM)
    return found
