"""One rank of a trainer group, in the process that is it: it joins its process group once, then makes one update after another.

Between updates it holds no tensor, so that an engine may use its card; what stays is the process, its imports and its group.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from selfkd.backend.base import TrainProgress, nobody_listens
from selfkd.backend.engine.held_engine import TRAINER, Importable, preload, redirect, resolve, traced
from selfkd.backend.facts import of_trainer
from selfkd.backend.reported import reported
from selfkd.backend.trainer.repeatable import prepare
from selfkd.core.facts import Facts
from selfkd.errors import SelfkdError

GROUP_SECONDS = 1800  # how long one rank waits for the others in a group call; TRL's default too
# What accelerate reads of a distributed process. Each rank sees one card, the first, so that each is alone on a node of its own.
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
# Of torch on a card: batches of many lengths then leave no holes. Not for engines, whose sleep it would break.
GROWING = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@dataclass(frozen=True)
class Group:
    """What the ranks of a group have in common.

    `process_group` is torch's name of how they talk: gloo, or nccl on cards. `exact`: on cards they compute what repeats.
    """

    ranks: int
    log: Path
    trainer: Importable = TRAINER
    process_group: str = "gloo"
    seconds: int = GROUP_SECONDS
    exact: bool = False


class Update(NamedTuple):
    """How an update ended on one rank: with what was trained, or with an error; and what the rank computes with."""

    trained: Any
    error: BaseException | None
    facts: Facts


class Rank:
    """An actor."""

    def __init__(self, rank: int, group: Group) -> None:
        self._log = group.log / f"trainer-{rank}.log"
        redirect(self._log)
        print(f"rank {rank}, process {os.getpid()}")
        self._rank, self._group = rank, group
        self._door: socket.socket | None = None
        self._store: Any = None

    def listen(self) -> tuple[str, int]:
        """Open the place where the ranks meet, on the address of this node alone. Rank 0 does."""
        import ray

        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._door = socket.create_server((host, 0), family=family, backlog=max(128, self._group.ranks))
        return host, self._door.getsockname()[1]

    def join(self, meeting: tuple[str, int] | None) -> None:
        """Import what training needs, and join the process group that meets there; None where this rank is alone."""
        with traced(self._log):
            self._join(meeting)

    def _join(self, meeting: tuple[str, int] | None) -> None:
        prepare({"exact": self._group.exact})  # before NCCL and CUDA read it
        if self._group.process_group == "nccl":
            os.environ.setdefault(*GROWING)
        for name in GROUP_VARIABLES:
            os.environ.pop(name, None)  # of a launcher around all of this, which would make a lone rank wait for others
        if meeting is not None:
            os.environ.update(variables(self._rank, self._group.ranks, meeting))
        print(f"imports took {preload(self._group.trainer):.1f} s")
        if meeting is not None:
            self._meet(*meeting)

    def update(self, arguments: tuple[Any, ...], steps_log: Path) -> Update:
        """Make one update, and let go of every tensor."""
        trained, error = _update(resolve(self._group.trainer), arguments, steps_log if self._rank == 0 else None)
        _drop_tensors()
        return Update(trained, error, of_trainer())

    def _meet(self, host: str, port: int) -> None:
        import torch.distributed as dist

        if host.startswith("127.") and sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens on whatever the host's name resolves to
        wait = timedelta(seconds=self._group.seconds)
        opened = {"master_listen_fd": self._door.detach()} if self._door else {}
        self._store = dist.TCPStore(
            host, port, self._group.ranks, self._rank == 0, timeout=wait, wait_for_workers=False, **opened
        )
        place = {"rank": self._rank, "world_size": self._group.ranks}
        dist.init_process_group(self._group.process_group, store=self._store, timeout=wait, **place)


def variables(rank: int, ranks: int, meeting: tuple[str, int]) -> dict[str, str]:
    """Return the variables of a distributed process, as a launcher of one process per node would set them."""
    host, port = meeting
    where = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {"RANK": str(rank), "NODE_RANK": str(rank), "WORLD_SIZE": str(ranks), **where}


def _update(
    function: Callable[..., Any], arguments: tuple[Any, ...], steps_log: Path | None
) -> tuple[Any, BaseException | None]:
    """Call the trainer once; of an error that is not selfkd's own the words leave this process."""
    try:
        return function(*arguments, partial(_append, steps_log) if steps_log else nobody_listens), None
    except SelfkdError as error:
        traceback.print_exc()
        return None, error.with_traceback(None)
    except Exception as error:
        traceback.print_exc()
        return None, reported(error)


def _drop_tensors() -> None:
    """Give the card's memory back to whoever sits on it too. A process that never used a card must not begin to."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _append(steps_log: Path, progress: TrainProgress) -> None:
    """Append one line per step; the driver follows the file, and it stays as the log of the update."""
    with steps_log.open("a") as handle:
        handle.write(json.dumps(progress, default=float) + "\n")
