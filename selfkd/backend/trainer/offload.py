"""An optimiser whose state lies in the machine's memory: it comes to the card lot by lot, for the step of its weights, and goes back.

The step is the optimiser's own, on the card: torch's own optimisers compute number by number, so that lots change none of them. Weights
and gradients stay where they are; the weights are the fp32 masters. Of a model that ranks divide each keeps the state of its part.
FSDP2's own way takes weights and gradients too, makes the step on the CPU, and leaves a model alone that one card holds whole.
"""

# torch's optimisers have few types.
# mypy: allow-subclassing-any, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from selfkd.backend.memory import OFFLOAD_LOT

BLOCK = (
    1 << 24
)  # numbers that lie in one piece, 64 MiB: torch pins memory in powers of two, and the next one of a weight may be twice its size
LOT = OFFLOAD_LOT


class Piece(NamedTuple):
    """Some numbers of a weight, one behind the other."""

    weight: torch.Tensor
    numbers: slice

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1)[self.numbers]

    def stand_in(self) -> torch.Tensor:
        """Return these numbers as a weight of their own, which shares their memory; and with their gradient."""
        assert self.weight.grad is not None
        found = _local(self.weight.detach()).view(-1)[self.numbers]
        found.grad = self.of(_local(self.weight.grad))
        return found


class Offloaded(torch.optim.Optimizer):
    """What `offload` puts in front of an optimiser's own class. `rest` is {weight: {name: blocks, or what is no table of numbers}}."""

    rest: dict[torch.Tensor, dict[str, Any]]
    state: dict[torch.Tensor, dict[str, Any]]
    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        groups, before = self.param_groups, {weight: dict(kept) for weight, kept in self.rest.items()}
        try:
            for group in groups:
                for lot in lots(group["params"]):
                    self._step_of(lot, group, before)
        finally:
            self.state, self.param_groups = defaultdict(dict), groups
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # what went back is there for whoever reads it

    def _step_of(self, lot: Sequence[Piece], group: dict[str, Any], before: Mapping[torch.Tensor, dict[str, Any]]) -> None:
        """Make the step of some pieces. What counts for a whole weight is taken as it was `before` the step of any of them."""
        visitors = [piece.stand_in() for piece in lot]
        found = [{name: _on_card(value, piece) for name, value in before.get(piece.weight, {}).items()} for piece in lot]
        self.state = defaultdict(dict, {one: state for one, state in zip(visitors, found, strict=True) if state})
        self.param_groups = [{**group, "params": visitors}]
        super().step()
        for piece, one in zip(lot, visitors, strict=True):
            self._go_back(piece, self.state[one])

    def _go_back(self, piece: Piece, state: Mapping[str, Any]) -> None:
        kept = self.rest.setdefault(piece.weight, {})
        for name, value in state.items():
            if not _is_table(name, value):
                kept[name] = value
                continue
            blocks = kept.setdefault(name, {})
            if piece.numbers.start not in blocks:
                blocks[piece.numbers.start] = torch.empty(
                    value.shape, dtype=value.dtype, pin_memory=_local(piece.weight).is_cuda
                )
            blocks[piece.numbers.start].copy_(value, non_blocking=True)

    # ---- for whoever writes it, or puts it back ----

    def kept(self, weight: torch.Tensor) -> dict[str, Any]:
        """Return the state of a weight, joined: on the ranks as the weight is, and in the machine's memory."""
        return {name: _joined(value, weight) for name, value in self.rest.get(weight, {}).items()}

    def keep(self, weight: torch.Tensor, state: Mapping[str, Any]) -> None:
        """Take a state of a weight, or of this rank's part of it."""
        for piece in pieces(weight):
            cut = {name: piece.of(_local(value)) if _is_table(name, value) else value for name, value in state.items()}
            self._go_back(piece, cut)


def offload(optimiser: Any) -> Any:
    """Have an optimiser keep its state in the machine's memory, and none on the card."""
    begun, kind = optimiser.state, type(optimiser)
    optimiser.__class__ = type(kind.__name__, (Offloaded, kind), {})
    optimiser.rest, optimiser.state = {}, defaultdict(dict)
    with torch.no_grad():
        for weight, state in begun.items():
            optimiser.keep(weight, state)
    return optimiser


def give_back() -> None:
    """Give the machine the memory back in which states lay: torch keeps what it pinned."""
    if torch.cuda.is_initialized():
        torch.accelerator.empty_host_cache()


def pieces(weight: torch.Tensor) -> Iterator[Piece]:
    """Yield a weight, or this rank's part of it, in pieces of at most BLOCK numbers; one piece of a part without any."""
    count = _local(weight).numel()
    for first in range(0, max(count, 1), BLOCK):
        yield Piece(weight, slice(first, min(first + BLOCK, count)))


def lots(weights: Sequence[torch.Tensor]) -> Iterator[list[Piece]]:
    """Yield the pieces of all weights that have a gradient, of LOT numbers together at most."""
    lot: list[Piece] = []
    size = 0
    for piece in (piece for weight in weights if weight.grad is not None for piece in pieces(weight)):
        count = piece.numbers.stop - piece.numbers.start
        if lot and size + count > LOT:
            yield lot
            lot, size = [], 0
        lot, size = [*lot, piece], size + count
    if lot:
        yield lot


def _is_table(name: str, value: Any) -> bool:
    """Whether a state has a number for each of a weight's: all that torch's optimisers keep but the number of steps."""
    return isinstance(value, torch.Tensor) and name != "step"


def _on_card(value: Any, piece: Piece) -> Any:
    """Return what a step may change: a copy, of a table beside its weight."""
    if isinstance(value, dict):
        return value[piece.numbers.start].to(_local(piece.weight).device, non_blocking=True, copy=True)
    return value.clone() if isinstance(value, torch.Tensor) else value


def _joined(value: Any, weight: torch.Tensor) -> Any:
    if not isinstance(value, dict):
        return value
    whole = torch.cat([value[first] for first in sorted(value)]).view(_local(weight).shape)
    return DTensor(whole, weight._spec, requires_grad=False) if isinstance(weight, DTensor) else whole


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
