"""What the header of a GGUF file says of a model, read without any library: its words, and the name and sizes of each tensor."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"
# Kinds of value by their number in the file; 8 is a text and 9 a list of values of one kind.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9


@dataclass(frozen=True)
class Header:
    """`words`: what the file says of the model, of a list its length; `tensors`: {name: sizes}."""

    words: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


def read(file: Path) -> Header:
    """Read the header of a file. ValueError where it has none of a form that is known."""
    with file.open("rb") as handle:
        if handle.read(4) != MAGIC:
            raise ValueError("no GGUF file")
        version, tensors, words = _number(handle, "I"), _number(handle, "Q"), _number(handle, "Q")
        if version < 2:
            raise ValueError(f"GGUF version {version}")
        try:
            return Header(dict(_word(handle) for _ in range(words)), dict(_tensor(handle) for _ in range(tensors)))
        except (struct.error, KeyError) as error:
            raise ValueError(f"a header that ends early or holds an unknown kind: {error}") from error


def _number(handle: BinaryIO, kind: str) -> Any:
    form = f"<{kind}"
    return struct.unpack(form, handle.read(struct.calcsize(form)))[0]


def _text(handle: BinaryIO) -> str:
    return handle.read(_number(handle, "Q")).decode("utf-8", "replace")


def _word(handle: BinaryIO) -> tuple[str, Any]:
    return _text(handle), _value(handle, _number(handle, "I"))


def _value(handle: BinaryIO, kind: int) -> Any:
    """Return a value, of a list only how many it holds: a vocabulary is one."""
    if kind == TEXT:
        return _text(handle)
    if kind != LIST:
        return _number(handle, NUMBERS[kind])
    of, count = _number(handle, "I"), int(_number(handle, "Q"))
    if of in NUMBERS:
        handle.seek(count * struct.calcsize(f"<{NUMBERS[of]}"), 1)
    else:
        for _ in range(count):
            _value(handle, of)
    return count


def _tensor(handle: BinaryIO) -> tuple[str, tuple[int, ...]]:
    name, dimensions = _text(handle), _number(handle, "I")
    sizes = tuple(_number(handle, "Q") for _ in range(dimensions))
    handle.seek(4 + 8, 1)  # its format, and where its bytes lie
    return name, sizes
