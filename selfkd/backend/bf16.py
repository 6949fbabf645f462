"""Whether this machine is quick in bfloat16: flags say that it has it, and a short timed matmul may say that it is emulated.

torch is imported in a child process only, for a few seconds, once per process and number of threads: a driver never holds it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import lru_cache
from typing import Any

from selfkd.core import facts, number_format
from selfkd.core.accelerator import accelerator
from selfkd.core.hardware import installed_version
from selfkd.core.number_format import NumberFormat

SHAPE = (1024, 576, 1536)  # the rows of a batch through a layer of a 135M model
MOST, ENOUGH = 5, 0.3  # repetitions of each format, and the seconds after which there is no further one
LIMIT = 60.0  # seconds for the child: torch from a cold disk takes its time
LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU that has bfloat16


@lru_cache
def format_here(threads: int) -> NumberFormat:
    """Return the number format that a new run of so many threads would take on this machine."""
    return number_format.choose(flags_here(), gpu_here(), lambda: slowdown(threads))


def flags_here() -> list[str]:
    """Return the flags of this processor, without those that the environment keeps libraries from."""
    return number_format.usable(facts.instructions(), os.environ)


def gpu_here() -> bool | None:
    """Return whether the cards have bfloat16; None where the CPU computes."""
    found = accelerator()
    return min(card.sm for card in found.cards) >= LEAST_CAPABILITY if found.on_cards else None


def slowdown(threads: int) -> float | str:
    """Time a matmul in both formats in a child process: how many times as long bfloat16 takes, or why that is not known."""
    if not installed_version("torch"):
        return "not timed: torch is not installed"
    program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import time_matmuls; time_matmuls({threads})"
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        command = [sys.executable, "-c", program]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environ, check=False)
    except subprocess.TimeoutExpired:
        return f"not timed: torch took more than {LIMIT:.0f} s"
    if answer.returncode:
        return f"not timed: {(answer.stderr.strip().splitlines() or [f'exit status {answer.returncode}'])[-1]}"
    return float(answer.stdout.split()[-1])


def time_matmuls(threads: int) -> None:
    """Print how many times as long a matmul takes in bfloat16 as in float32; what the child runs."""
    import torch

    torch.set_num_threads(threads)
    print(_seconds(torch, torch.bfloat16) / _seconds(torch, torch.float32))


def _seconds(torch: Any, dtype: Any) -> float:
    """Return the shortest of a few repetitions; the first call, which makes the kernel, does not count."""
    rows, inner, columns = SHAPE
    left, right = torch.rand(rows, inner).to(dtype), torch.rand(inner, columns).to(dtype)
    left @ right
    found: list[float] = []
    while len(found) < MOST and sum(found) < ENOUGH:
        began = time.perf_counter()
        left @ right
        found.append(time.perf_counter() - began)
    return min(found)
