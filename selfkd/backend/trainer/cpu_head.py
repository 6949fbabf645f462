"""Log-probabilities of labels on a CPU: one product with the vocabulary forward, two backward, and few passes over what they make.

TRL's own head works in tiles for cards with little memory: it makes each product twice, and without Triton goes over every tile some
twenty times. Kept for what is larger than memory likes, for heads that cap their logits, and for cards.
"""

# TRL and autograd have no types.
# mypy: allow-subclassing-any
# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional
import trl.trainer.utils

MOST_ELEMENTS = 1 << 27  # of logits held at once: 512 MiB in fp32
TRL_HEAD = trl.trainer.utils._ChunkedLogProbFunction


class LabelLogProbs(torch.autograd.Function):
    """What TRL's function of that purpose returns, for logits that fit into memory; only the log-probabilities carry a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        wanted: tuple[str, ...],
    ) -> Any:
        inner = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        hidden_inner, weight_inner = hidden.to(inner), weight.to(inner)
        logits = torch.nn.functional.linear(hidden_inner, weight_inner, None if bias is None else bias.to(inner)).float()
        if scale != 1.0:
            logits.mul_(scale)
        table = torch.log_softmax(logits, -1)
        ctx.save_for_backward(hidden_inner, weight_inner, targets)
        ctx.table, ctx.scale, ctx.types = table, scale, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        extras = _extras(logits, table, targets, wanted)
        ctx.mark_non_differentiable(*(extra for extra in extras if extra is not None))
        return table.gather(-1, targets[:, None])[:, 0], *extras

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        """Turn the table of log-probabilities into the gradient of the logits, where it lies: g * (1[target] - p)."""
        hidden, weight, targets = ctx.saved_tensors
        table, ctx.table = ctx.table, None
        of_hidden, of_weight, of_bias = ctx.types
        gradient = gradient.float() * ctx.scale
        table.exp_().mul_(-gradient[:, None])
        table.scatter_add_(-1, targets[:, None], gradient[:, None])
        inner = table.to(hidden.dtype)
        bias = None if of_bias is None else table.sum(0).to(of_bias)
        learned = (
            (inner.t() @ hidden).to(of_weight) if ctx.needs_input_grad[1] else None
        )  # beneath an adapter the head lies still
        return (inner @ weight).to(of_hidden), learned, bias, None, None, None


def _extras(
    logits: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, wanted: tuple[str, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Return entropy, log(sum p^2), mean logit and whether the target is the likeliest; None for what nobody wants."""
    return (
        -(table.exp() * table).sum(-1) if "entropy" in wanted else None,
        torch.logsumexp(2 * table, -1) if "log_sum_sq_probs" in wanted else None,
        logits.mean(-1) if "mean_logits" in wanted else None,
        table.argmax(-1) == targets if "is_top1" in wanted else None,
    )


@dataclass(frozen=True)
class Heard:
    """What an output head is about to turn into logits: hidden states of the tokens in question, its weights, cap and scale."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    cap: float | None
    scale: float

    def logits(self, first: int, last: int) -> torch.Tensor:
        """Return the logits at so many of the tokens, in fp32 or in fp64 if the weights are."""
        found = torch.nn.functional.linear(self.hidden[first:last], self.weight, self.bias)
        found = (found if found.dtype == torch.float64 else found.float()) * self.scale
        return found if self.cap is None else self.cap * torch.tanh(found / self.cap)


Instead = Callable[[Heard, torch.Tensor], tuple[torch.Tensor | None, ...]]
_instead: list[Instead] = []


@contextlib.contextmanager
def instead(compute: Instead) -> Iterator[None]:
    """Have models with TRL's head give what `compute` makes of hidden states and labels, in the place of log-probabilities and extras.

    TRL hands every position to a head on devices without Triton; here it is the labels' alone, whatever the device.
    """
    decides = trl.trainer.utils._use_triton
    _instead.append(compute)
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        _instead.pop()
        trl.trainer.utils._use_triton = decides


class Head:
    """Stands in for TRL's function: ours on a CPU where the logits fit, TRL's everywhere else, and what was put in its place."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        cap: float | None = None,
        scale: float = 1.0,
        wanted: tuple[str, ...] = (),
    ) -> Any:
        if _instead:
            return _instead[-1](Heard(hidden, weight, bias, cap, scale), targets)
        fits = math.prod((hidden.shape[0], weight.shape[0])) <= MOST_ELEMENTS
        if hidden.device.type == "cpu" and cap is None and fits:
            return LabelLogProbs.apply(hidden, weight, bias, targets, scale / temperature, wanted)
        return TRL_HEAD.apply(hidden, weight, bias, targets, temperature, chunk, cap, scale, wanted)


def install() -> None:
    """Give TRL's losses this head; done once, where the losses are imported."""
    trl.trainer.utils._ChunkedLogProbFunction = Head
