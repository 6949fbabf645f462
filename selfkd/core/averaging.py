"""Weighted averages of checkpoints, tensor by tensor, in blocks: sums in float64 in the order given, rounded once to fp32.

Elementwise and without any library of tensors, so every machine gets the same bits, and `verify` can work one out again. Reads and writes
safetensors by the format's published layout.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from selfkd.errors import WeightsError

BLOCK = 1 << 20  # numbers in memory at once, of each checkpoint
INDEX = "model.safetensors.index.json"
Weighted = tuple[Path, float]  # a folder of full weights, and its share


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its file, the place of its first byte, and what the header says of it."""

    path: Path
    at: int
    entry: Mapping[str, Any]

    @property
    def length(self) -> int:
        start, end = self.entry["data_offsets"]
        return int(end - start)

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        return str(self.entry["dtype"]), tuple(self.entry["shape"])


def average(models: Sequence[Weighted], out: Path) -> None:
    """Write into `out` the tensors of the average, divided into files as those of the first model are."""
    tables = [tensors(folder) for folder, _ in models]
    refuse_unlike(tables, [folder for folder, _ in models])
    out.mkdir(parents=True, exist_ok=True)
    first = models[0][0]
    for path in sorted(first.glob("*.safetensors")):
        with path.open("rb") as source, (out / path.name).open("wb") as sink:
            header, named = _header(source)
            sink.write(header)
            for name in named:
                for block in averaged(name, tables, [share for _, share in models]):
                    sink.write(block)
    if (first / INDEX).is_file():
        shutil.copyfile(first / INDEX, out / INDEX)


def averaged(name: str, tables: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> Iterator[bytes]:
    """Yield the bytes of a tensor of the average. What is no fp32 (a count) is the first model's, and must be that of all."""
    blocks = [_blocks(table[name]) for table in tables]
    weights = np.asarray(shares, np.float64) / np.sum(np.asarray(shares, np.float64))
    for parts in zip(*blocks, strict=True):
        if tables[0][name].kind[0] != "F32":
            if any(part != parts[0] for part in parts):
                raise WeightsError(
                    f"the tensor {name} differs, and numbers of its kind have no average", str(tables[0][name].path)
                )
            yield parts[0]
            continue
        total = np.zeros(len(parts[0]) // 4, np.float64)
        for weight, part in zip(weights, parts, strict=True):
            total += weight * np.frombuffer(part, "<f4").astype(np.float64)
        yield total.astype("<f4").tobytes()


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return where each tensor of a folder lies."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            header: dict[str, Any] = json.loads(source.read(length))
        found |= {
            name: Tensor(path, 8 + length + entry["data_offsets"][0], entry)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    return found


def refuse_unlike(tables: Sequence[Mapping[str, Tensor]], folders: Sequence[Path]) -> None:
    """Raise WeightsError where two of the models do not have the same tensors."""
    first = {name: tensor.kind for name, tensor in tables[0].items()}
    for table, folder in zip(tables[1:], folders[1:], strict=True):
        other = {name: tensor.kind for name, tensor in table.items()}
        unlike = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if unlike:
            said = f"{unlike[0]} is {first.get(unlike[0])} in the one and {other.get(unlike[0])} in the other"
            raise WeightsError(
                f"checkpoints of different models have no average: {said}", str(folder), "Average models of one chain."
            )


def _header(source: BinaryIO) -> tuple[bytes, list[str]]:
    """Return the header of a file as it stands there, and the names of its tensors in the order of their bytes."""
    size = source.read(8)
    text = source.read(struct.unpack("<Q", size)[0])
    entries = [(name, entry) for name, entry in json.loads(text).items() if name != "__metadata__"]
    return size + text, [name for name, entry in sorted(entries, key=lambda one: one[1]["data_offsets"])]


def _blocks(tensor: Tensor) -> Iterator[bytes]:
    with tensor.path.open("rb") as source:
        source.seek(tensor.at)
        left = tensor.length
        while left:
            wanted = min(4 * BLOCK, left)
            block = source.read(wanted)
            if len(block) < wanted:
                raise WeightsError("the file ends inside a tensor", str(tensor.path))
            yield block
            left -= len(block)


def differs(models: Sequence[Weighted], made: Path) -> str:
    """Return the name of a tensor of `made` that is not the average of these models, or is of another kind or shape; '' where all are.

    WeightsError where these models have no average, or a file ends too soon.
    """
    tables, written = [tensors(folder) for folder, _ in models], tensors(made)
    refuse_unlike(tables, [folder for folder, _ in models])
    first, shares = tables[0], [share for _, share in models]
    unlike = sorted(name for name in written.keys() | first.keys() if _layout(written.get(name)) != _layout(first.get(name)))
    if unlike:
        return unlike[0]
    for name, tensor in written.items():
        if any(one != other for one, other in zip(averaged(name, tables, shares), _blocks(tensor), strict=True)):
            return name
    return ""


def _layout(tensor: Tensor | None) -> Any:
    """Return what must be equal before bytes are compared: a header may name a shape that its bytes do not have."""
    return tensor and (tensor.kind, tensor.length)
