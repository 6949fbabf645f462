"""Which kernels vLLM loads on an x86 CPU, where it has a build each for AVX2, AVX-512 and AVX-512 with bfloat16."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEYOND_AVX2 = ("avx512", "avx10", "amx")  # how torch's names of these instruction sets begin
EXTENSION = re.compile(r"/vllm/(_\w*C(?:_AVX\w+)?)\.[^/]*so\b")


def follow_torch(numerics: Mapping[str, Any]) -> None:
    """Keep vLLM to the kernels that ATEN_CPU_CAPABILITY keeps torch to; call it before vLLM loads its own.

    vLLM does not read that variable: it asks torch.cpu's probes, which tell what the processor has. A run whose numerics name no
    sampler is older than this: it keeps the kernels that vLLM chooses.
    """
    if not numerics.get("sampler") or os.environ.get("ATEN_CPU_CAPABILITY", "").lower() not in ("avx2", "default"):
        return
    import torch

    found = dict(torch.cpu.get_capabilities())
    kept = {name: has and not name.startswith(BEYOND_AVX2) for name, has in found.items()}
    torch.cpu.get_capabilities = lambda: kept


def loaded() -> list[str]:
    """Return vLLM's libraries of kernels in this process, such as _C_AVX2; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    return sorted(set(EXTENSION.findall(maps.read_text("utf-8", "replace")))) if maps.is_file() else []
