"""Weights in 4 bits (NF4) as far as they can be known without torch: what it needs, which models have such layers, what a weight takes.

NF4 keeps each weight as one of sixteen quantiles of a normal distribution, times the largest of its block of 64; these scales are kept in 8 bits,
with one scale in fp32 for 256 of them (double quantisation, QLoRA, Dettmers et al. 2023, arXiv 2305.14314).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfkd.backend.model_files import said_of_text, text_sections
from selfkd.core import install
from selfkd.core.hardware import installed_version

PACKAGE = "bitsandbytes"
BLOCK, SCALES = 64, 256  # weights to a scale, and scales to a scale of theirs
BYTES = 1 / 2 + 1 / BLOCK + 4 / (BLOCK * SCALES)  # of a weight, with its share of both scales
# Their layers keep matrices as (in, out), in a class of transformers' own (Conv1D). Among those that write text: these.
TRANSPOSED = frozenset({"gpt2", "openai-gpt"})
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
LEAVE_IT_OUT = "Leave out `quantise`: the weights beneath the adapter then lie in bf16, or in fp32."


def lacking() -> str:
    """Return why this machine cannot hold weights in 4 bits, with what to do; '' where it can, as far as files tell."""
    fix = f"{install.extra('qlora')}, or leave out `quantise`"
    if not installed_version(PACKAGE):
        return f"'quantise: nf4' is computed by the package {PACKAGE}, which is not installed: {fix}"
    if not has_a_build():
        return f"the package {PACKAGE} that is installed has no build for this system ({sys.platform}): {fix}"
    return ""


def has_a_build() -> bool:
    """Whether the installed package holds what computes, for a CPU or a card; the package is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return any(path for folder in folders for path in Path(folder).glob(f"lib{PACKAGE}_*"))


def unfit(config: Mapping[str, Any]) -> str:
    """Return why a model with this config.json cannot lie in 4 bits, or ''."""
    kind = said_of_text(config, "model_type") if not text_sections(config) else _kind_of_text(config)
    if kind in TRANSPOSED:
        return f"the layers of {kind} keep their matrices as (in, out), and are none that lie in 4 bits here"
    if any(said_of_text(config, word) for word in EXPERTS):
        return f"the experts of {kind} lie in one tensor, and are no layers that could lie in 4 bits: nearly all of the model would stay as it is"
    return ""


def _kind_of_text(config: Mapping[str, Any]) -> Any:
    return next((config[name].get("model_type") for name in text_sections(config)), None) or config.get("model_type")
