"""Tensors on disk in parts: each rank writes its rows of what is divided, and whoever reads takes the rows that it needs.

safetensors throughout: a run folder is handed on, and reading it must run nothing. A part is called NAME@ROW by the first row that it
holds. Knows no model and no optimiser.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from selfkd.backend.model_files import by_size

FILE_BYTES = 1 << 31  # of one file: a rank copies no more from its card at a time


class _Rows(NamedTuple):
    start: int
    height: int
    path: Path
    key: str


def write(folder: Path, rank: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Path]:
    """Write what this rank has to write of `tensors`: its rows of those that are divided, and on rank 0 all others. Return the files."""
    paths: list[Path] = []
    for number, batch in enumerate(by_size(_own(tensors, rank), FILE_BYTES)):
        path = folder / f"part-{rank}-{number:03d}.safetensors"
        save_file({key: tensor.cpu().contiguous() for key, tensor in batch.items()}, path)
        paths.append(path)
    return paths


def _own(tensors: Iterable[tuple[str, torch.Tensor]], rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            start, local = first_row(tensor), tensor.to_local().detach()
            if local.numel():
                yield f"{name}@{start}", local
        elif rank == 0:
            yield f"{name}@0", tensor.detach()


def first_row(tensor: DTensor) -> int:
    """Return at which row of the whole tensor this rank's part begins."""
    assert tensor.placements == (Shard(0),), tensor.placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0])


class Parts:
    """The tensors of a folder, whoever wrote which rows of them."""

    def __init__(self, folder: Path) -> None:
        found: dict[str, list[_Rows]] = defaultdict(list)
        for path in sorted(folder.glob("part-*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    name, _, start = key.rpartition("@")
                    shape = file.get_slice(key).get_shape()
                    found[name].append(_Rows(int(start), shape[0] if shape else 1, path, key))
        self._rows = {name: sorted(rows) for name, rows in found.items()}

    def names(self, prefix: str) -> list[str]:
        """Return what comes behind `prefix` in the names that begin with it."""
        return [name.removeprefix(prefix) for name in self._rows if name.startswith(prefix)]

    def whole(self, name: str) -> torch.Tensor:
        return self._read(name, 0, sum(rows.height for rows in self._rows[name]))

    def rows_like(self, name: str, like: torch.Tensor, device: str | None = None) -> torch.Tensor:
        """Return the rows that `like` holds on this rank, on its device or on another one."""
        if not isinstance(like, DTensor):
            return self.whole(name).to(device or like.device)
        start, local = first_row(like), like.to_local()
        rows = self._read(name, start, start + len(local)) if local.numel() else torch.empty_like(local)
        return rows.to(device or local.device)

    def like(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Return a tensor that lies on the ranks as `like` does."""
        rows = self.rows_like(name, like)
        if not isinstance(like, DTensor):
            return rows
        whole = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, **whole)

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        found = []
        for rows in self._rows[name]:
            first, last = max(start, rows.start), min(stop, rows.start + rows.height)
            if first < last:
                with safe_open(rows.path, "pt") as file:
                    part = file.get_slice(rows.key)
                    found.append(
                        part[first - rows.start : last - rows.start] if part.get_shape() else file.get_tensor(rows.key)
                    )
        return found[0] if len(found) == 1 else torch.cat(found)
