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
