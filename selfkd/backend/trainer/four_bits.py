"""The weights beneath an adapter in 4 bits while it learns (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), and what that changes.

They are rounded from the weights that the run committed, and engines serve those in full. So an adapter learns over other weights than it is
served with, and how far the two lie apart is measured. Knows no loss, no TRL and no adapter.
"""

# bitsandbytes has few types, torch's classes none here.
# mypy: allow-subclassing-any
# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from selfkd.backend import nf4
from selfkd.backend.adapters import Weights
from selfkd.backend.base import TrainSpec
from selfkd.core.wording import first_line
from selfkd.errors import UsageError

WHERE = "train.lora.quantise"


class FourBits(torch.nn.Linear):
    """A linear layer that lies still in 4 bits. While `full` is set, it computes in fp32 with the weight that this returns instead."""

    def __init__(self, of: torch.nn.Linear, device: torch.device, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)  # Linear's own would make a weight
        self.in_features, self.out_features = of.in_features, of.out_features
        packed, self.state = _packed(of.weight.detach().float().to(device))
        self.state.dtype = dtype  # of what is unpacked
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = None if of.bias is None else torch.nn.Parameter(of.bias.detach().to(device), requires_grad=False)
        self.full: Callable[[], torch.Tensor] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.full is not None:
            return linear(input.float(), self.full().to(input.device, torch.float32), self._bias(torch.float32))
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        product: torch.Tensor = _Product.apply(input.to(dtype), self)
        bias = self._bias(dtype)
        return product if bias is None else product + bias

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight as it lies, in so many bits."""
        from bitsandbytes import functional

        found: torch.Tensor = functional.dequantize_4bit(self.weight.data, self.state)
        values = found.reshape(-1)[: self.out_features * self.in_features]
        return values.view(self.out_features, self.in_features).to(dtype)

    def _bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """A product with a weight that lies still, unpacked in forward and again in backward: between the two only its 4 bits are there.

    bitsandbytes' own product may take a kernel from a hub on a CPU, and another one for single rows: neither is known to give the same bits.
    """

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, layer: FourBits) -> torch.Tensor:
        ctx.layer = layer
        return linear(input, layer.unpacked(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.layer.unpacked(grads[0].dtype), None


def _packed(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return a weight in NF4, with what unpacks it; UsageError where the installed package cannot make it on this device.

    It is given as its blocks, the last one filled up: unpacking rows of odd length, bitsandbytes would compile code.
    """
    values = weight.reshape(-1)
    blocks = pad(values, (0, -len(values) % nf4.BLOCK)).view(-1, nf4.BLOCK)
    try:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(blocks, blocksize=nf4.BLOCK, compress_statistics=True, quant_type="nf4")
        return packed, state
    except (ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
        what = f"{nf4.PACKAGE} cannot hold weights in 4 bits on this {weight.device.type}: {first_line(error)}"
        raise UsageError(what, WHERE, nf4.lacking() or nf4.LEAVE_IT_OUT) from error


# ---- a model ----


def refuse_shards(spec: TrainSpec) -> None:
    """Raise UsageError where weights in 4 bits would be divided over ranks."""
    if spec.lora and spec.lora.quantise:
        what = "shard: true divides each weight over ranks, and `quantise` packs each whole"
        fix = "Leave out one of the two: with `quantise` each rank holds half a byte of each weight."
        raise UsageError(what, WHERE, fix)


def quantise(model: Any, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
    """Put the linear layers of a model into 4 bits on a device, one after the other; the output head, embedding and norms stay as they are.

    `weights` are those that it was opened from, `dtype` is what it computes in.
    """
    layers = _layers(model)
    _refuse(model, layers, weights)
    for name in layers:
        model.set_submodule(name, FourBits(model.get_submodule(name), device, dtype))
    for weight in model.parameters():  # one that still lies in the mapped file would keep all of it
        weight.data = weight.data.to(device, copy=True)


def _layers(model: Any) -> list[str]:
    """Return the names of the linear layers that are not the output head, and share no weight with the embedding."""
    apart = (model.get_output_embeddings(), model.get_input_embeddings())
    shared = {id(part.weight) for part in apart if part is not None}
    return [name for name, part in model.named_modules() if type(part) is torch.nn.Linear and id(part.weight) not in shared]


def _refuse(model: Any, layers: Sequence[str], weights: Weights) -> None:
    """Raise UsageError where most of a model would not lie in 4 bits, or could not be compared with what is served."""
    kind = model.config.model_type
    if any(isinstance(part, Conv1D) for part in model.modules()):
        what = nf4.unfit({"model_type": kind}) or f"{kind} has layers that keep their matrices as (in, out)"
        raise UsageError(what, WHERE, nf4.LEAVE_IT_OUT)
    if any("experts" in name and weight.ndim > 2 for name, weight in model.named_parameters()):
        what = f"the experts of {kind} lie in one tensor, and are no layers that could lie in 4 bits"
        raise UsageError(what, WHERE, nf4.LEAVE_IT_OUT)
    if not layers or any(f"{name}.weight" not in weights.places for name in layers):
        what = f"the layers of {kind} have other names in the model's files, or there are none"
        raise UsageError(what, WHERE, nf4.LEAVE_IT_OUT)


def scales(model: Any) -> int:
    """Return the bytes of the scales that belong to weights in 4 bits, with the tables that unpack both."""
    states = [part.state for part in model.modules() if isinstance(part, FourBits)]
    parts = [(one.absmax, one.code, one.offset, one.state2.absmax, one.state2.code) for one in states]
    return sum(tensor.nbytes for own in parts for tensor in own)


@contextlib.contextmanager
def whole(model: Any, weights: Weights) -> Iterator[None]:
    """Compute with full weights, read from their files layer by layer as they are needed, where those of a model lie in 4 bits.

    That is the model that engines serve, and no room is taken for it.
    """
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, FourBits)]
    for name, part in found:
        part.full = partial(weights.__getitem__, f"{name.removesuffix('.base_layer')}.weight")
    try:
        yield
    finally:
        for _, part in found:
            part.full = None


# ---- what it changes ----

Scores = Sequence[Sequence[float]]


def gap(parent: Scores, child: Scores, learned_from: Scores, learned: Scores) -> dict[str, Any]:
    """Return how far log-probabilities in 4 bits (`learned_from`, `learned`) lie from those that are served, before and after an update.

    `gap` is that as root mean square over tokens of the rows, `likelier` the mean of served less learned: part of what is learned over 4 bits
    may mend their rounding, and full weights have none to mend. `carried` is the share of what was learned that is served: the projection of the served change on the learned one. None where nothing was.
    """
    before, after, base, now = (
        np.concatenate([np.asarray(row) for row in rows] or [np.zeros(0)]) for rows in (parent, child, learned_from, learned)
    )
    change = now - base
    size = float(change @ change)
    carried = float((after - before) @ change) / size if size else None
    return {
        "quantise": "nf4",
        "gap_before": _rms(base - before),
        "gap": _rms(now - after),
        "likelier": _mean(after - now),
        "carried": carried,
    }


def _rms(values: Any) -> float:
    return math.sqrt(_mean(np.square(values)))


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else 0.0
