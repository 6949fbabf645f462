"""What the ranks of one update tell each other. A single process is a group of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed


def grouped() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def place() -> tuple[int, int]:
    """Return (rank, ranks) in the process group if there is one, else those of a single process."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if grouped() else (0, 1)


def gathered(value: Any, ranks: int) -> list[Any]:
    """Return what each rank gave, in their order; all call it."""
    if ranks == 1:
        return [value]
    found: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(found, value)
    return found


def of_rank_0(value: Any, ranks: int) -> Any:
    """Return what rank 0 gave; all call it."""
    if ranks == 1:
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]
