"""The worker extension for processes that vLLM starts itself: importing it ties such a process to the engine that started it.

vLLM's core process never learns that the engine above it was killed, and would keep the card. vLLM imports the extension before it
takes any memory; in the engine's own process nobody does.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from selfkd.backend.engine.vllm_options import OWNER
from selfkd.backend.engine.worker_extension import WorkerExtension

__all__ = ["WorkerExtension"]

PERIOD_SECONDS = 2.0


def ancestors() -> Iterator[int]:
    """Yield the parent of this process, its parent, and so on. One that died is replaced by a process that is not below it."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it ended between two looks, or there is no /proc
            return


def follow(owner: int) -> None:
    """Kill this process soon after `owner` is gone. Where several workers do so, vLLM's core above them ends with them."""
    if owner not in ancestors() and Path(f"/proc/{owner}").exists():
        return  # somebody else started this process, such as Ray, and ends it too

    def watch() -> None:
        while owner in ancestors():
            time.sleep(PERIOD_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="follow", daemon=True).start()


if OWNER in os.environ:
    follow(int(os.environ[OWNER]))
