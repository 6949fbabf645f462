"""Adapters (LoRA): folders whose tensors change the full weights of another folder, read one tensor at a time.

An adapter lies there as PEFT writes it, so that other programs read it, and beside it what its parent says of itself. `adapter.json`
names the digest of its base, its words, and how engines serve it: merged into the weights as they are loaded, or beside them by vLLM.
Knows no training; torch is imported where tensors are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import WeightsError

TENSORS, WORDS = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
PREFIX = "base_model.model."  # of PEFT, in front of a module's name
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM keeps room (0.31)
Served = Literal["merged", "adapter"]
ALL = slice(None)


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder says. `scale` multiplies B·A; `transposed`: the base keeps its matrices as (in, out)."""

    folder: Path
    base: str
    serve: Served
    words: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return int(self._peft["r"])

    @property
    def scale(self) -> float:
        alpha = float(self._peft["lora_alpha"])
        return alpha / math.sqrt(self.rank) if self._peft["use_rslora"] else alpha / self.rank

    @property
    def transposed(self) -> bool:
        return bool(self._peft["fan_in_fan_out"])

    @cached_property
    def modules(self) -> list[str]:
        """Return the names of the modules whose weights it changes."""
        end = ".lora_A.weight"
        return sorted(name.removeprefix(PREFIX).removesuffix(end) for name in self._names if name.endswith(end))

    def factors(self, module: str) -> tuple[Any, Any]:
        """Return A and B of a module, as they lie there."""
        from safetensors import safe_open

        with safe_open(self.folder / TENSORS, "pt") as tensors:
            return tuple(tensors.get_tensor(f"{PREFIX}{module}.lora_{letter}.weight") for letter in "AB")

    def change(self, module: str, rows: slice = ALL) -> Any:
        """Return what it adds to the weight of a module, or to some rows of it, in fp32 and as the base lies."""
        a, b = self.factors(module)
        a, b = (a[:, rows], b) if self.transposed else (a, b[rows])
        return product(a, b, self.scale, self.transposed)

    @cached_property
    def _peft(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / WORDS).read_text("utf-8"))
        return found

    @cached_property
    def _names(self) -> list[str]:
        return tensor_names(self.folder / TENSORS)


def read(folder: Path) -> Adapter | None:
    """Return the adapter in a folder; None where the folder holds full weights."""
    path = folder / digest.ADAPTER
    if not path.is_file():
        return None
    said = json.loads(path.read_text("utf-8"))
    return Adapter(folder, said["base"], said["serve"], said["words"])


def full_weights(model: Model) -> Model:
    """Return the model of full weights beneath a model: its base, or itself where it is no adapter."""
    found = read(Path(model.path))
    if found is None:
        return model
    return Model(model.role, str(base_folder(model.path, model.base)), found.base)


def base_folder(folder: str | Path, base: str | Path | None) -> Path:
    """Return the folder of full weights beneath `folder`; WeightsError for an adapter whose base nobody named."""
    if not (Path(folder) / digest.ADAPTER).is_file():
        return Path(folder)
    if base is None:
        fix = "Report it with the log; the record of the step that made it names its base."
        raise WeightsError("the folder holds an adapter, and its base is not named", str(folder), fix)
    return Path(base)


class Room(NamedTuple):
    """What an engine keeps beside its weights for an adapter: for which rank, and at modules of which names. Rank 0: nothing."""

    rank: int = 0
    modules: tuple[str, ...] = ()

    def holds(self, other: Room) -> bool:
        return other.rank <= self.rank and set(other.modules) <= set(self.modules)


def room_for(folder: Path) -> Room:
    """Return what an engine must keep to serve a model as vLLM's own adapter; nothing where its weights are loaded whole."""
    found = read(folder)
    if found is None or found.serve == "merged":
        return Room()
    rank = next((rank for rank in RANKS if rank >= found.rank), found.rank)
    return Room(rank, tuple(last_words(found.modules)))


def last_words(names: Iterable[str]) -> list[str]:
    """Return how the names of modules end, each ending once."""
    return sorted({name.rpartition(".")[2] for name in names})


def product(a: Any, b: Any, scale: float, transposed: bool) -> Any:
    """Return scale · B·A in fp32."""
    change = (b.float() @ a.float()).mul_(scale)
    return change.t() if transposed else change


class Weights:
    """The tensors of a model as full weights, by the names of its files: those of the base, with what an adapter adds to them."""

    def __init__(self, folder: str | Path, base: str | Path | None = None) -> None:
        self.folder, self.adapter = base_folder(folder, base), read(Path(folder))
        self.places = {name: path for path in sorted(self.folder.glob("*.safetensors")) for name in tensor_names(path)}
        self.changed = {f"{module}.weight": module for module in self.adapter.modules} if self.adapter else {}
        self._handles: dict[Path, Any] = {}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((name, self[name]) for name in self.places)

    def __getitem__(self, name: str) -> Any:
        return self.of_base(name) if name not in self.changed else self.of_base(name).float() + self.change(name)

    def of_base(self, name: str) -> Any:
        return self._open(self.places[name]).get_tensor(name)

    def rows(self, name: str, first: int, last: int) -> Any:
        """Return some rows of a tensor in fp32, of which no others are read."""
        found = self._open(self.places[name]).get_slice(name)[first:last].float()
        return found + self.change(name, slice(first, last))

    def _open(self, path: Path) -> Any:
        """Return an open file; each is opened once, for its list of tensors is read then."""
        from safetensors import safe_open

        if path not in self._handles:
            self._handles[path] = safe_open(path, "pt")
        return self._handles[path]

    def change(self, name: str, rows: slice = ALL) -> Any:
        """Return what the adapter adds to a tensor, or to some rows of it; zero where it adds nothing."""
        return self.adapter.change(self.changed[name], rows) if self.adapter and name in self.changed else 0.0

    def merge_into(self, net: Any) -> None:
        """Write the changed weights into a model that was opened from the base, rounded once, from fp32, to the format that it has."""
        import torch

        with torch.no_grad():
            for name in self.changed:
                net.get_parameter(name).copy_(self[name])


def tensor_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        return list(tensors.keys())


def difference(mine: Mapping[str, Any], its: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return how the words of two adapters differ, the first's and then the second's; '' where they are equal."""
    return ", ".join(f"{name} {mine[name]!r} and {its.get(name)!r}" for name in names if mine[name] != its.get(name))
