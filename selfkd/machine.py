"""The machine file of `--on`: where a run runs, and with how much. Read and checked here; `Machine` says what it means."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from selfkd.backend.base import NUMERIC, Machine
from selfkd.errors import UsageError
from selfkd.rewards import did_you_mean

MORE = "All fields: selfkd help machine"
KINDS = {str: "a word", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}


def read_machine(path: Path | None) -> Machine:
    """Machine settings from a YAML file, every field checked; the defaults without one. UsageError names every wrong field."""
    if path is None:
        return Machine()
    if not path.is_file():
        raise UsageError("no such file", str(path), "A machine file holds fields such as `backend: ray`. " + MORE)
    try:
        words = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not YAML: {error}", str(path)) from None
    if not isinstance(words, dict):
        raise UsageError("a machine file is a mapping of fields", str(path), MORE)
    wrong = [said for name, value in words.items() if (said := _wrong(str(name), value))]
    if wrong:
        raise UsageError("\n".join(wrong), str(path), MORE)
    return Machine(**words)


def _wrong(name: str, value: Any) -> str:
    """What is wrong with one field, or ''; the default of a field says what kind it is."""
    defaults = {field.name: getattr(Machine(), field.name) for field in fields(Machine)}
    if name not in defaults:
        return f"no field '{name}'.{did_you_mean(name, defaults)}"
    kind = type(defaults[name])
    right = isinstance(value, int | float if kind is float else kind) and not (isinstance(value, bool) and kind is not bool)
    return "" if right else f"{name}: {value!r} is not {KINDS[kind]}"


def explain() -> str:
    """What `selfkd help machine` prints."""
    lines = [
        f"machine: {' '.join((Machine.__doc__ or '').split())}",
        "",
        "Fields of a file for `--on`, with their defaults (* = fixed by the first attempt):",
    ]
    return "\n".join([*lines, *(f"  {field.name}: {_value(field.name)}" for field in fields(Machine))])


def _value(name: str) -> str:
    default = getattr(Machine(), name)
    return f"{default if default != {} else '{}'}{' *' if name in NUMERIC else ''}"
