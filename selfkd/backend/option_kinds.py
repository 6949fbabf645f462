"""Of what kind an option's value is. The tables of options of TRL, of vLLM and of the machine file all judge by this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES: dict[str, Any] = {"int": int, "float": int | float, "str": str, "list": list | tuple, "dict": dict, "mapping": Mapping}
ITEMS = {"ints": "int", "texts": "str"}  # kinds that are lists of another kind


def is_kind(kind: str, value: Any) -> bool:
    """Return whether `value` is of this kind: a whole number is a number, but true and false are not.

    >>> is_kind("float", 1), is_kind("int", True), is_kind("bool", True), is_kind("ints", [1, True])
    (True, False, True, False)
    """
    if kind in ITEMS:
        return isinstance(value, list | tuple) and all(is_kind(ITEMS[kind], item) for item in value)
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, TYPES.get(kind, ()))
