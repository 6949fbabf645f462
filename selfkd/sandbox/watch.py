"""How much a program and everything it started use, read from /proc by the warden outside.

`/proc/PID/task/TID/children` (CONFIG_PROC_CHILDREN, on in every distribution's kernel) gives the tree; inside a PID namespace
an orphan falls to process 1, so the tree is whole.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

PATIENCE_SECONDS = 0.03
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class Use(NamedTuple):
    """Memory in bytes, processor time in seconds, processes and threads together."""

    memory: int
    cpu: float
    tasks: int


def read(path: str) -> bytes:
    """A small file of /proc, b'' where its process is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(handle, 1 << 16)
    except OSError:
        return b""
    finally:
        os.close(handle)


def threads(process: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{process}/task")
    except OSError:
        return []


def children(process: int) -> list[int]:
    """The processes that `process` started, or that fell to it, as they are at this moment."""
    return [int(word) for thread in threads(process) for word in read(f"/proc/{process}/task/{thread}/children").split()]


def tree(process: int) -> list[int]:
    """`process` and all below it. A tree that grows meanwhile is read as far as it was seen."""
    found, waiting = [], [process]
    while waiting:
        found.append(waiting.pop())
        waiting += children(found[-1])
    return found


class Watcher:
    """Looks at one program's tree again and again. Remembers the processor time of those that have gone meanwhile."""

    def __init__(self, process: int, kept: bool) -> None:
        """`kept`: the process itself is ours, only what is below it is the program's."""
        self.process, self.kept = process, kept
        self.cpu = 0.0
        self.own: dict[int, float] = {}  # processor time last seen of each process, without its children's

    def look(self, memory_limit: int) -> Use:
        """What the tree uses now. Pages shared by forks are only told apart (slowly) where the plain sum is over the limit.

        Processor time is counted in two ways, and the larger one holds: with the children that were waited for, and by what
        each process was last seen with, since a parent that ignores SIGCHLD is not charged for its children.
        """
        processes = tree(self.process)[self.kept :]
        resident = sum(map(_resident, processes))
        if resident > memory_limit and len(processes) > 1:
            resident = self._without_shares(processes)
        times = {one: _times(one) for one in dict.fromkeys((self.process, *processes))}  # orphans are charged to what we keep
        self.own |= {one: own for one, (own, _) in times.items()}
        charged = sum(own + waited for own, waited in times.values())
        self.cpu = max(self.cpu, charged, sum(self.own.values()))
        return Use(resident, self.cpu, sum(len(threads(one)) for one in processes))

    def _without_shares(self, processes: list[int]) -> int:
        """Pages shared by forks counted once. It is slow where much is mapped, so what is not reached in time counts in full."""
        until = time.monotonic() + PATIENCE_SECONDS
        return sum(_proportional(one) if time.monotonic() < until else _resident(one) for one in processes)


def _of_a_thread(process: int, name: str) -> bytes:
    """A file about the whole process, by its first living thread: the one of a leader that has ended says nothing."""
    found = (read(f"/proc/{process}/task/{thread}/{name}") for thread in threads(process))
    return next((text for text in found if text and not text.startswith(b"0 ")), b"")


def _resident(process: int) -> int:
    words = _of_a_thread(process, "statm").split()
    return int(words[1]) * PAGE if words else 0


def _proportional(process: int) -> int:
    for line in _of_a_thread(process, "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return _resident(process)


def _times(process: int) -> tuple[float, float]:
    """(its own, that of children it waited for), in seconds."""
    words = read(f"/proc/{process}/stat").rpartition(b")")[2].split()  # a name may hold spaces and brackets
    user, system, waited_user, waited_system = map(int, words[11:15]) if words else (0, 0, 0, 0)
    return (user + system) / TICK, (waited_user + waited_system) / TICK
