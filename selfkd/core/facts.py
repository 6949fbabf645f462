"""What a process computes with, and could therefore answer otherwise elsewhere: processor, versions, variables.

Standard library only, and no package is imported to be asked: the processes that compute call this in themselves.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import selfkd
from selfkd.core.hardware import installed_version

Facts = Mapping[str, Any]

INSTRUCTIONS = re.compile(r"(avx|amx|fma|f16c|sse4|sve|asimd|bf16|i8mm|fphp|neon|vsx|zvf)")
# Variables that change which kernels are chosen, or how they add up.
VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("OPENBLAS_CORETYPE", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *(
        "NCCL_ALGO",
        "NCCL_PROTO",
        "FLASH_ATTENTION_DETERMINISTIC",
        "VLLM_BATCH_INVARIANT",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_USE_FLASHINFER_SAMPLER",
    ),
)

# Words that came later, and what processes did before they said them: a record without such a word says that.
BEFORE = {"arithmetic": "padded"}


def of_process(packages: Iterable[str]) -> dict[str, Any]:
    """Return what this process computes with; of `packages` the installed version each, None for one that is not there."""
    versions = {package: installed_version(package) or None for package in packages}
    variables = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {**_processor(), "python": platform.python_version(), "selfkd": selfkd.__version__, **versions, **variables}


def loaded_versions() -> dict[str, str]:
    """Return the version of every package from outside the standard library that this process has imported."""
    names = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"selfkd", "__main__", "__mp_main__"}
    found = {name: installed_version(name) or getattr(sys.modules.get(name), "__version__", None) for name in sorted(names)}
    return {name.replace("_", "-"): version for name, version in found.items() if isinstance(version, str)}


def differences(was: Facts, now: Facts) -> list[str]:
    """Return what differs of the facts that both sides know, such as 'torch 2.13.0 → 2.14.0'.

    >>> differences({"torch": "2.13.0"}, {"torch": "2.13.0", "arithmetic": "flat-1", "nccl": "2.29"})
    ['arithmetic padded → flat-1']
    """
    later = {name: done for name, done in BEFORE.items() if name in was or name in now}
    was, now = {**later, **was}, {**later, **now}
    moved = [name for name in was if name in now and was[name] != now[name]]
    return [_told(name, was[name], now[name]) for name in moved]


def _told(name: str, was: Any, now: Any) -> str:
    if not (isinstance(was, list) and isinstance(now, list)):
        return f"{name} {_said(was)} → {_said(now)}"
    gone, come = [one for one in was if one not in now], [one for one in now if one not in was]
    sides = [f"{word} {' '.join(map(str, ones))}" for word, ones in (("without", gone), ("with", come)) if ones]
    return f"{name} {', '.join(sides)}"


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def instructions() -> list[str]:
    """Return those instruction sets of this processor that mathematics is done with."""
    return list(_processor()["instructions"])


@lru_cache(1)
def _processor() -> Facts:
    """Return the model of the processor, and those of its instruction sets that mathematics is done with."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").split("\n\n")[0].splitlines() if info.is_file() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    # A virtual machine may hide the name; the numbers behind it choose the kernels.
    numbers = [f"{name} {fields[name]}" for name in ("cpu family", "model", "stepping", "CPU part") if name in fields]
    model = fields.get("model name") or platform.processor() or platform.machine()
    return {
        "cpu": f"{model} ({', '.join(numbers)})" if numbers else model,
        "instructions": sorted({flag for flag in flags if INSTRUCTIONS.match(flag)}),
    }
