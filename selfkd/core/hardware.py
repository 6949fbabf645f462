"""What this machine has, asked without loading CUDA or any library: cores, free cores, versions of packages."""

from __future__ import annotations

import os
import time
from importlib import metadata
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_cores(window: float = 1.0) -> int:
    """Cores idle over `window` seconds: a thread that waits for a busy core costs 2.5 to 8 times what it gains."""
    usable = usable_cores()
    if not Path("/proc/stat").is_file():
        return usable
    before = _idle_ticks()
    time.sleep(window)
    idle = (_idle_ticks() - before) / (os.sysconf("SC_CLK_TCK") * window)
    return max(1, min(usable, round(idle)))


def installed_version(package: str) -> str:
    """Return the installed version, or ''; never imports the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _idle_ticks() -> int:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[4]) + int(fields[5])  # idle and waiting for the disk


# ---- memory ----

MEMORY = Path("/proc/meminfo")
LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def total_memory() -> int | None:
    """Return the bytes that this machine has, swap included, or less where a container sets a limit; None where it does not say."""
    own = _said("MemTotal")
    return _least(None if own is None else own + (_said("SwapTotal") or 0), _limit())


def free_memory() -> int | None:
    """Return the bytes that may still be allocated: the machine's figure, or less where a container sets a limit."""
    limit = _limit()
    return _least(_said("MemAvailable"), None if limit is None else limit - int(USED.read_text()))


def _said(name: str) -> int | None:
    if not MEMORY.is_file():
        return None
    return next(int(line.split()[1]) * 1024 for line in MEMORY.read_text().splitlines() if line.startswith(name))


def _limit() -> int | None:
    said = LIMIT.read_text().strip() if LIMIT.is_file() and USED.is_file() else "max"
    return None if said == "max" else int(said)


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)
