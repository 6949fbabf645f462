"""Measuring what a program and everything it started use: read from /proc, by the warden outside.

`/proc/PID/task/TID/children` (CONFIG_PROC_CHILDREN, on in every distribution's kernel) gives the tree; inside a PID namespace
an orphan falls to process 1, so the tree is whole.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import NamedTuple

SHARES_SECONDS = 0.03  # for telling shared pages apart, in one look
PAGE_BYTES, TICKS_PER_SECOND = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
FILE_OVERHEAD_BYTES, MAX_FILES = 4096, 1024  # what a file costs however small, and how many there may be below tier 2


class Usage(NamedTuple):
    """Memory in bytes, processor time in seconds, processes and threads together."""

    memory: int
    cpu: float
    tasks: int


def read(path: str) -> bytes:
    """Return a small file of /proc, b'' where its process is gone."""
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
    """Return the processes that `process` started, or that fell to it, as they are at this moment."""
    return [int(word) for thread in threads(process) for word in read(f"/proc/{process}/task/{thread}/children").split()]


def tree(process: int) -> list[int]:
    """Return `process` and all below it. A tree that grows meanwhile is returned as far as it was seen."""
    found, waiting = [], [process]
    while waiting:
        found.append(waiting.pop())
        waiting += children(found[-1])
    return found


class Watcher:
    """Looks at one program's tree again and again. It remembers the processor time of those that have gone meanwhile."""

    def __init__(self, process: int, is_ours: bool) -> None:
        """`is_ours`: the process itself is ours, only what is below it is the program's."""
        self.process, self.is_ours = process, is_ours
        self.cpu = 0.0
        self.cpu_of: dict[int, float] = {}  # by process: its time when it was last seen, without its children's

    def look(self, memory_limit: int) -> Usage:
        """Return what the tree uses now. Shared pages are told apart (slowly) only where the plain sum is over the limit.

        Processor time is counted in two ways, and the larger one holds: with the children that were waited for, and by what
        each process was last seen with, since a parent that ignores SIGCHLD is not charged for its children.
        """
        processes = tree(self.process)[self.is_ours :]
        resident = sum(map(_resident, processes))
        if resident > memory_limit and len(processes) > 1:
            resident = self._without_shares(processes)
        times = {one: _times(one) for one in dict.fromkeys((self.process, *processes))}  # orphans are charged to what we keep
        self.cpu_of |= {one: own for one, (own, _) in times.items()}
        charged = sum(own + waited for own, waited in times.values())
        self.cpu = max(self.cpu, charged, sum(self.cpu_of.values()))
        return Usage(resident, self.cpu, sum(len(threads(one)) for one in processes))

    def _without_shares(self, processes: list[int]) -> int:
        """Count pages shared by forks once. It is slow where much is mapped, so what is not reached in time counts in full."""
        until = time.monotonic() + SHARES_SECONDS
        return sum(proportional_memory(one) if time.monotonic() < until else _resident(one) for one in processes)


def _of_a_thread(process: int, name: str) -> bytes:
    """Return a file about the whole process, by its first living thread: the one of a leader that has ended says nothing."""
    found = (read(f"/proc/{process}/task/{thread}/{name}") for thread in threads(process))
    return next((text for text in found if text and not text.startswith(b"0 ")), b"")


def _resident(process: int) -> int:
    words = _of_a_thread(process, "statm").split()
    return int(words[1]) * PAGE_BYTES if words else 0


def proportional_memory(process: int) -> int:
    """Return its bytes in memory (PSS); a page that is shared by n processes counts 1/n."""
    for line in _of_a_thread(process, "smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) * 1024
    return _resident(process)


def _times(process: int) -> tuple[float, float]:
    """Return (its own, that of children it waited for), in seconds."""
    words = read(f"/proc/{process}/stat").rpartition(b")")[2].split()  # a name may hold spaces and brackets
    user, system, waited_user, waited_system = map(int, words[11:15]) if words else (0, 0, 0, 0)
    return (user + system) / TICKS_PER_SECOND, (waited_user + waited_system) / TICKS_PER_SECOND


def size_of_files(folder: str) -> int:
    """Return the bytes that a program's files take up. Very many are as bad as large ones: counting them takes our time."""
    total = 0
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number == MAX_FILES:
                return sys.maxsize
            with contextlib.suppress(OSError):  # gone meanwhile, at tier 0
                found = entry.stat(follow_symlinks=False)
                total += max(found.st_blocks * 512, found.st_size) + FILE_OVERHEAD_BYTES
    return total
