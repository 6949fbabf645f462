"""A copy of a model folder whose weights are rounded to bf16, bit by bit as an engine in bf16 rounds them when it loads the folder.

Reads and writes safetensors by the format's published layout, a block at a time: a driver that holds no torch does it. What is no
fp32 tensor is copied as it is, so a folder without safetensors (a fake model) is copied whole.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from selfkd.core.storage import files_in

BLOCK = 1 << 20  # numbers in memory at once
ALIGNED = 8  # bytes to a multiple of which the library pads its header
NOT_A_NUMBER = 0x7FC0
# Engines hold some weights in fp32 in whatever format they compute: routers of experts, and what a state decays by. These, and all
# vectors, stay as they are: an engine rounds them as before, or does not.
KEPT = re.compile(r"(^|\.)(gate|router|wg|moe_statics|weights_proj|A_log|([qkv]_)?conv1d)(\.|$)")
INDEX = "model.safetensors.index.json"
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}

Entry = Mapping[str, Any]  # {dtype, shape, data_offsets} of a tensor


def round_folder(folder: Path, out: Path) -> None:
    """Write into `out` all files of a model folder, fp32 matrices in bf16."""
    out.mkdir(parents=True)
    for path in files_in(folder):
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _round_file(path, target)
        elif path.name == "config.json":
            target.write_text(
                json.dumps(_in_bf16(json.loads(path.read_text("utf-8"))), indent=2, sort_keys=True) + "\n", "utf-8"
            )
        else:
            shutil.copyfile(path, target)
    if (out / INDEX).is_file():
        _count_anew(out)


def to_bf16(bits: np.ndarray[Any, np.dtype[np.uint32]]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return the bits of fp32 numbers as those of the nearest bf16 ones; of two that are equally near, the even one.

    >>> [hex(one) for one in to_bf16(np.array([0x3F808000, 0x3F818000, 0x3F808001], np.uint32))]
    ['0x3f80', '0x3f82', '0x3f81']
    """
    upper = bits >> 16
    rounded = (bits + (0x7FFF + (upper & 1))) >> 16  # of the largest number of all this is infinity, as it is in torch
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, NOT_A_NUMBER, rounded).astype(np.uint16)


def is_rounded(name: str, entry: Entry) -> bool:
    """Whether a tensor is kept in bf16."""
    return entry["dtype"] == "F32" and len(entry["shape"]) > 1 and not KEPT.search(name)


def _round_file(path: Path, target: Path) -> None:
    with path.open("rb") as source, target.open("wb") as sink:
        (length,) = struct.unpack("<Q", source.read(8))
        header: dict[str, Any] = json.loads(source.read(length))
        about = {"__metadata__": header.pop("__metadata__")} if "__metadata__" in header else {}
        named = _ordered(header)
        text = json.dumps({**about, **dict(_placed(header, named))}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNED)
        sink.write(struct.pack("<Q", len(text)) + text)
        for name in named:
            start, end = header[name]["data_offsets"]
            source.seek(8 + length + start)
            _pour(source, sink, end - start, is_rounded(name, header[name]))


def _ordered(header: Mapping[str, Entry]) -> list[str]:
    """Return the names of tensors, wide numbers first, so that each begins at a multiple of its width."""
    widths = {name: 2 if is_rounded(name, entry) else WIDTHS.get(entry["dtype"], 1) for name, entry in header.items()}
    return sorted(header, key=lambda name: (-widths[name], name))


def _placed(header: Mapping[str, Entry], named: list[str]) -> Iterator[tuple[str, Entry]]:
    """Yield each tensor as the new header describes it."""
    at = 0
    for name in named:
        entry, (start, end) = header[name], header[name]["data_offsets"]
        narrow = is_rounded(name, entry)
        size = (end - start) // 2 if narrow else end - start
        yield name, {**entry, "dtype": "BF16" if narrow else entry["dtype"], "data_offsets": [at, at + size]}
        at += size


def _pour(source: BinaryIO, sink: BinaryIO, length: int, narrow: bool) -> None:
    """Copy the next `length` bytes; `narrow`: as bf16."""
    while length:
        block = source.read(min(4 * BLOCK, length))
        if not block:
            raise EOFError("the file ends inside a tensor")
        sink.write(to_bf16(np.frombuffer(block, "<u4")).tobytes() if narrow else block)
        length -= len(block)


def _in_bf16(words: Any) -> Any:
    """Return a configuration that says bfloat16 wherever it said float32, as `from_pretrained` reads it."""
    if not isinstance(words, dict):
        return words
    said = {name: "bfloat16" for name in ("dtype", "torch_dtype") if words.get(name) == "float32"}
    return {**{name: _in_bf16(value) for name, value in words.items()}, **said}


def _count_anew(out: Path) -> None:
    """Correct what the index says of the size of all tensors."""
    index = json.loads((out / INDEX).read_text("utf-8"))
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] = sum(map(_tensor_bytes, out.glob("*.safetensors")))
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _tensor_bytes(path: Path) -> int:
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
    return path.stat().st_size - 8 - int(length)
