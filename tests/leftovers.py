"""What programs may leave behind: counted before and after, and waited for."""

from __future__ import annotations

import os
import time
from pathlib import Path

from selfkd.sandbox import warden_pool, watch

_strangers: set[int] = set()


def ignore_strangers() -> None:
    """Leave out of every count the processes that other tests left below this one: Ray's, Python's own resource tracker."""
    _strangers.update(watch.tree(os.getpid())[1:])


def wardens() -> list[int]:
    """Return the wardens of this process."""
    return [one for one in watch.children(os.getpid()) if one not in _strangers]


def left_behind() -> dict[str, int]:
    """Count what a program might leave: our descriptors, our processes, mounts, working folders, System V segments."""
    warden_pool.close_idle()
    folders = [path for place in ("/dev/shm", "/tmp") for path in Path(place).glob("selfkd-box-*")]
    segments = len(Path("/proc/sysvipc/shm").read_text().splitlines())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "processes": len(set(watch.tree(os.getpid())) - _strangers),
        "mounts": len(Path("/proc/self/mounts").read_text().splitlines()),
        "folders": len(folders),
        "segments": segments,
    }


def wait_until_gone(processes: list[int]) -> None:
    """Wait for processes to end. One that has ended but that nobody has waited for yet (a zombie) is gone."""
    until = time.monotonic() + 10
    while alive := [one for one in processes if b"\nState:\tZ" not in (watch.read(f"/proc/{one}/status") or b"\nState:\tZ")]:
        assert time.monotonic() < until, alive
        time.sleep(0.02)
