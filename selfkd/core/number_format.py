"""Which number format a run computes in: bfloat16 where the machine has it in hardware, else float32.

Knows no machine: whoever asks hands in the flags of the processor, what the GPU can do, and a way to time a matmul. A CPU that only
emulates bfloat16 trains about ten times slower in it than in float32, and generates three times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # of x86, and of AArch64
NARROW = ("amx", "avx512", "avx10")  # how flags begin of what a variable below keeps libraries from
# Values of variables that keep the libraries of an x86 CPU from bfloat16, though its flags have it.
ONEDNN_NARROW = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
KEEPING = {
    "ONEDNN_MAX_CPU_ISA": ONEDNN_NARROW,
    "DNNL_MAX_CPU_ISA": ONEDNN_NARROW,
    "ATEN_CPU_CAPABILITY": ("DEFAULT", "AVX2"),
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number
SLOW = 3.0  # a bfloat16 matmul that takes so many times as long as in float32 is emulated, whatever the flags say
Slowdown = Callable[[], float | str]  # how many times as long it takes, or why that is not known


@dataclass(frozen=True)
class NumberFormat:
    """dtype: of engines; precision: of training, 'bf16' (autocast over fp32 masters) or 'fp32'; why: in words."""

    dtype: str
    precision: str
    why: str


def usable(flags: Collection[str], environ: Mapping[str, str]) -> list[str]:
    """Return the flags of a processor without those that a variable of the environment keeps libraries from."""
    kept = any(environ.get(name, "").upper() in narrow for name, narrow in KEEPING.items())
    return [flag for flag in flags if not (kept and flag.startswith(NARROW))]


def in_hardware(flags: Collection[str]) -> list[str]:
    """Return those flags by which a CPU says that it has bfloat16."""
    return [flag for flag in BF16_FLAGS if flag in flags]


def choose(flags: Collection[str], gpu: bool | None, slowdown: Slowdown) -> NumberFormat:
    """Choose by what a machine has: `gpu` says whether its GPU has bfloat16, None that the CPU computes.

    Flags decide; `slowdown` is asked only where a CPU claims bfloat16, and can only veto.
    """
    if gpu is not None:
        return _chosen(gpu, "the GPU has bfloat16" if gpu else "the GPU has no bfloat16 (compute capability under 8.0)")
    claimed = " and ".join(in_hardware(flags))
    if not claimed:
        return _chosen(False, f"this CPU has no bfloat16 (none of the flags {', '.join(BF16_FLAGS)})")
    found = slowdown()
    if isinstance(found, str):
        return _chosen(True, f"this CPU has {claimed} ({found})")
    times = f"a bfloat16 matmul takes {found:.2g} times as long as in float32"
    return _chosen(found < SLOW, f"this CPU has {claimed}, {'but' if found >= SLOW else 'and'} {times}")


def _chosen(bf16: bool, why: str) -> NumberFormat:
    return NumberFormat("bfloat16", "bf16", why) if bf16 else NumberFormat("float32", "fp32", why)


def resolve(asked: str, here: Callable[[], NumberFormat]) -> NumberFormat:
    """Return the format of a run whose machine file says `asked`; 'auto' takes what is `here`.

    A word of the file is the engine's. Training follows it to fp32, and to 16 bits only where the hardware has bfloat16.
    """
    if asked == "auto":
        return here()
    precision = "fp32" if asked == "float32" else here().precision
    return NumberFormat(asked, precision, "the machine file says so")


def of_training(asked: str, numerics: Mapping[str, Any]) -> str:
    """Return what a train step computes in: its own word, or for 'auto' that of the run's numerics.

    Numerics that lack the word were fixed when bf16 was the only default.
    """
    return str(numerics.get("precision", "bf16")) if asked == "auto" else asked
