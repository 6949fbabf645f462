"""What makes an update repeat bit by bit: threads, algorithms, and on cards the variables that CUDA's libraries read when they start.

Imports torch only where it is used, so that a process can prepare itself before anything starts CUDA.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

# Read once by each library: cuBLAS at its first product, NCCL when ranks meet. Ring adds up in one order whatever the message's size.
FOR_CARDS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1", "NCCL_ALGO": "Ring"}
# How an update adds up. Whatever changes its sums (attention, output head, micro-batches) is another name, or a run that goes on
# with it would still be called exact.
ARITHMETIC = "flat-1"
CAPPED = "flat-2"  # of models that cap their attention scores: under flat-1 they were trained without the cap
_last: dict[str, Any] = {}  # how the last update of this process was computed: whether by what repeats, and by which arithmetic


def prepare(numerics: Mapping[str, Any]) -> None:
    """Set the variables of an exact run, where CUDA has not started yet; to be called before ranks meet. What the user set stays."""
    if numerics.get("exact") and not _cuda_has_started():
        for name, value in FOR_CARDS.items():
            os.environ.setdefault(name, value)


def holds() -> bool:
    """Whether the last update of this process was computed in ways that repeat bit by bit."""
    return bool(_last.get("repeats", False))


def arithmetic() -> str:
    """Return how the last update of this process added up."""
    return str(_last.get("arithmetic", ARITHMETIC))


def adds_up_by(name: str) -> None:
    """Note how an update adds up."""
    _last["arithmetic"] = name


@contextlib.contextmanager
def repeatable(numerics: Mapping[str, Any]) -> Iterator[None]:
    """Use threads as recorded, and only operations that repeat bit by bit; the process gets its own settings back.

    On a card this is done for exact runs only, since it costs time there; an operation that cannot repeat then fails.
    """
    import torch

    cards, ready = torch.cuda.is_available(), all(name in os.environ for name in FOR_CARDS)
    exact = not cards or bool(numerics.get("exact"))
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.set_num_threads(numerics.get("threads") or before[0])
    if exact:
        # On a card a warning is not enough: there attention takes its repeatable form only where the other one would fail.
        torch.use_deterministic_algorithms(True, warn_only=not (cards and ready))
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and hides nothing here
    _last["repeats"] = not cards or (exact and ready)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])
        torch.utils.deterministic.fill_uninitialized_memory = before[3]


def _cuda_has_started() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())
