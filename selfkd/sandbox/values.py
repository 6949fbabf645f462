"""Reading what a program reported, as data and nothing else: exact types, capped depth, every oddity a reason.

The other half of `selfkd.sandbox.inside.encode`, on the trusted side. A report is JSON; whatever is not exactly of the form
that one honest report has is Malformed, whoever wrote it.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

DEPTH = 64
ALIKE = 32  # members of a set that may have the same hash
NO_FORM = "the report holds a value of no known form"
GROUPS = {"l": list, "t": tuple, "s": set, "z": frozenset}
NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class Malformed(ValueError):
    """The report is not one; the message is the reason."""


class Failed(Exception):
    """The report says that the call failed; the message is what the program raised."""


class Foreign:
    """A value of a type that is not plain data; equal to nothing, itself included, and neither true nor false."""

    def __init__(self, kind: str) -> None:
        self.kind = "".join(sign if sign.isprintable() else "?" for sign in kind[:300])

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} is no plain data")

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def read(report: bytes, number: int) -> Any:
    """The value that report `number` holds. Malformed where it is not exactly that; Failed where the call failed."""
    found = parsed(report)
    if not isinstance(found, dict) or set(found) not in ({"id", "value"}, {"id", "error"}):
        raise Malformed("not a report")
    if type(found["id"]) is not int or found["id"] != number:
        raise Malformed("a report for another call")
    if "error" not in found:
        return value(found["value"])
    if type(found["error"]) is not str:
        raise Malformed("not a report")
    raise Failed(found["error"])


def parsed(report: bytes) -> Any:
    """The JSON of a report; a name that stands twice, NaN and what no parser could hold are refused."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise Malformed("a name stands twice in the report")
        return dict(pairs)

    try:
        return json.loads(report.decode("ascii"), object_pairs_hook=once, parse_constant=_refuse)
    except Malformed:
        raise
    except (ValueError, RecursionError):  # a bad encoding, bad JSON, thousands of digits, thousands of levels
        raise Malformed("the report is not JSON") from None


def _refuse(constant: str) -> NoReturn:
    raise Malformed(f"{constant} is not JSON")


def value(found: Any, depth: int = 0) -> Any:
    """The Python value behind its JSON form: a bare null, boolean, number or text, else a list that opens with its kind."""
    if depth > DEPTH + 1:
        raise Malformed(f"the value is nested more than {DEPTH} deep")
    if found is None or type(found) in (bool, int, float, str):
        return found
    try:
        kind, *parts = found if type(found) is list else [None]
        return _made(kind, parts, depth + 1)
    except Malformed:
        raise
    except (ValueError, TypeError, ArithmeticError):  # too few parts, no number where one should be, a list as a key
        raise Malformed(NO_FORM) from None


def _made(kind: Any, parts: list[Any], depth: int) -> Any:
    if kind == "c":
        real, imaginary = (value(one, depth) for one in parts)
        if type(real) is type(imaginary) is float:
            return complex(real, imaginary)
        raise Malformed(NO_FORM)
    [inner] = parts
    if kind in ("l", "t"):
        return GROUPS[kind](value(one, depth) for one in _list(inner))
    if kind in ("s", "z"):
        return GROUPS[kind](_distinct([value(one, depth) for one in _list(inner)]))
    if kind == "d":
        pairs = [(value(key, depth), value(one, depth)) for key, one in map(_list, _list(inner))]
        _distinct([key for key, _ in pairs])
        return dict(pairs)
    if type(inner) is not str:
        raise Malformed(NO_FORM)
    if kind == "f" and inner in NOT_FINITE:
        return NOT_FINITE[inner]
    if kind == "i" and f"{int(inner, 16):x}" == inner:
        return int(inner, 16)
    if kind == "b" and inner == inner.lower():
        return bytes.fromhex(inner)
    if kind == "?":
        return Foreign(inner)
    raise Malformed(NO_FORM)


def _distinct(members: list[Any]) -> list[Any]:
    """Members of a set or keys, none twice. Hashes chosen to collide would make the building of it take minutes."""
    if members and max(Counter(map(hash, members)).values()) > ALIKE:
        raise Malformed("the members of a set have hashes that collide")
    if len(set(members)) < len(members):
        raise Malformed(NO_FORM)
    return members


def _list(found: Any) -> list[Any]:
    if type(found) is not list:
        raise Malformed(NO_FORM)
    return found
