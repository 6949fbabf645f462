"""Processes that train together over gloo, as a launcher on one machine would start them."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work(rank, join, *arguments)` returned in each of so many processes; `join` makes it a rank of the group."""
    import torch.multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (ranks, port, work, arguments, folder), nprocs=ranks)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _process(rank: int, ranks: int, port: int, work: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> None:
    import torch

    torch.set_num_threads(1)
    found = work(rank, partial(_join, rank, ranks, port), *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(found))


def _join(rank: int, ranks: int, port: int) -> None:
    import torch

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group("gloo")
