"""How much a program and everything it started use, read from /proc by the warden outside.

`/proc/PID/task/TID/children` (CONFIG_PROC_CHILDREN, on in every distribution's kernel) gives the tree; inside a PID namespace
an orphan falls to process 1, so the tree is whole.
"""

from __future__ import annotations

import os
from typing import NamedTuple

PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class Use(NamedTuple):
    """Memory in bytes, processor time in seconds (with that of children that ended), processes and threads together."""

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


def use(process: int, memory_limit: int) -> Use:
    """What the tree uses now. Pages shared by forks are only told apart (slowly) where the plain sum is over the limit."""
    processes = tree(process)
    resident = sum(_resident(one) for one in processes)
    if resident > memory_limit and len(processes) > 1:
        resident = sum(_proportional(one) for one in processes)
    return Use(resident, sum(map(_cpu, processes)), sum(len(threads(one)) for one in processes))


def _resident(process: int) -> int:
    words = read(f"/proc/{process}/statm").split()
    return int(words[1]) * PAGE if words else 0


def _proportional(process: int) -> int:
    for line in read(f"/proc/{process}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return _resident(process)


def _cpu(process: int) -> float:
    words = read(f"/proc/{process}/stat").rpartition(b")")[2].split()  # a name may hold spaces and brackets
    return sum(map(int, words[11:15])) / TICK if words else 0.0
