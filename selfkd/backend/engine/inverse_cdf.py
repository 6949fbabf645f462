"""The next token from one uniform number per answer: the inverse of the cumulative distribution.

It draws for vLLM on a CPU, and for transformers everywhere. vLLM itself divides by an exponential number for every token of the vocabulary, and draws them twice where requests are seeded. This is
the same distribution, for one number: 0.09 ms instead of 3.3 for a vocabulary of 49 152 (one thread; vLLM unseeded 1.9).
A row knows nothing of the others, so whoever else is in the batch changes no draw.
Imports torch and vLLM only when called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selfkd.errors import BackendError

NAME = "icdf-1"  # recorded with a run: whatever changes which token a number draws is another name
BLOCK = 128  # tokens whose probabilities are summed before the one that is drawn is looked for
OVERFLOW = (
    "Either the number format is too narrow for this model (the machine's `dtype`: bfloat16 and float32 reach further than float16), "
    "or words of `sample.vllm` forbid every token."
)


class InverseCdf:
    """Takes the place of `forward` in vLLM's TopKTopPSampler, with its arguments and both of its results."""

    name = NAME

    def __init__(self, logprobs_mode: str) -> None:
        self.logprobs_mode = logprobs_mode

    def __call__(self, logits: Any, generators: Mapping[int, Any], k: Any, p: Any) -> tuple[Any, Any]:
        import torch
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        logits = apply_top_k_top_p(logits, k, p)
        processed = None
        if self.logprobs_mode == "processed_logits":
            processed = logits
        elif self.logprobs_mode == "processed_logprobs":
            processed = logits.log_softmax(dim=-1, dtype=torch.float32)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        return draw(probabilities, uniform(len(logits), generators)), processed


def next_tokens(logits: Any, generators: Sequence[Any], top_k: int, top_p: float) -> Any:
    """Draw the next token of each row where there is no vLLM, each from its own generator; Apple's devices have no float64."""
    import torch

    device = "cpu" if logits.device.type == "mps" else logits.device
    probabilities = within(logits.to(device).softmax(dim=-1, dtype=torch.float32), top_k, top_p)
    numbers = uniform(len(generators), dict(enumerate(generators)))
    return draw(probabilities, numbers.to(device)).to(logits.device)


def within(probabilities: Any, top_k: int, top_p: float) -> Any:
    """Return `probabilities` with zeros outside the `top_k` likeliest, and then outside the fewest that hold `top_p` of what is left."""
    if 0 < top_k < probabilities.shape[-1]:
        least = probabilities.topk(top_k).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if top_p < 1.0:
        ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
        heaps = ordered.double().cumsum(-1)
        beyond = heaps - ordered >= top_p * heaps[:, -1:]
        probabilities = probabilities.scatter(-1, places, ordered.masked_fill(beyond, 0.0))
    return probabilities


def likeliest(logits: Any) -> Any:
    """Return the likeliest token of each row, the first of equals; BackendError where its score is no number."""
    found = logits.argmax(-1)
    _refuse_what_is_no_number(logits.gather(-1, found.unsqueeze(-1)).squeeze(-1).isfinite())
    return found


def uniform(rows: int, generators: Mapping[int, Any]) -> Any:
    """Return a number in [0, 1) for each row: from the generator of the row where it has one, else from torch's own."""
    import torch

    seeded = {row: torch.rand((), dtype=torch.float64, generator=generator) for row, generator in generators.items()}
    others = iter(torch.rand(rows - len(seeded), dtype=torch.float64))
    return torch.stack([seeded[row] if row in seeded else next(others) for row in range(rows)])


def draw(probabilities: Any, numbers: Any) -> Any:
    """Return for each row the token in whose share of [0, 1) the number lies; a token of probability 0 has no share.

    First the block of tokens is found, then the token in it. Sums of blocks are float32, as exact as the probabilities
    themselves; all that is added up over a row is float64. A float64 sum over every token takes twelve times as long.
    """
    import torch

    sums = _block_sums(probabilities).double()
    ends = sums.cumsum(-1)
    _refuse_what_is_no_number(ends[:, -1] > 0)
    block, rest = _share(ends, numbers.unsqueeze(-1))
    tokens = block * BLOCK + torch.arange(BLOCK, device=block.device)
    inside = tokens < probabilities.shape[-1]
    held = probabilities.gather(-1, tokens.where(inside, 0)).where(inside, 0.0)
    place, _ = _share(held.cumsum(-1, dtype=torch.float64), rest / sums.gather(-1, block))
    return (block * BLOCK + place).squeeze(-1)


def _block_sums(probabilities: Any) -> Any:
    import torch

    whole = probabilities.shape[-1] // BLOCK * BLOCK
    sums = probabilities[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    if whole == probabilities.shape[-1]:
        return sums
    return torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True)], -1)


def _share(ends: Any, number: Any) -> tuple[Any, Any]:
    """Return which share of each row a number in [0, 1] falls into, and how far into it. Shares end at `ends`; empty ones are never met."""
    import torch

    total = ends[:, -1:]
    target = torch.minimum(number * total, total.nextafter(torch.zeros_like(total)))  # rounding may reach the very end
    place = torch.searchsorted(ends, target, right=True)
    start = ends.gather(-1, (place - 1).clamp(min=0)).where(place > 0, 0.0)
    return place, target - start


def _refuse_what_is_no_number(known: Any) -> None:
    """Raise BackendError where a row has no number to choose by; vLLM would answer token 0 for ever."""
    lost = len(known) - int(known.sum())
    if lost:
        raise BackendError(
            f"{lost} of {len(known)} answers have no next token: their scores are no numbers", "engine", OVERFLOW
        )
