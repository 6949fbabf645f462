"""What is decided before a model is opened, and done to it once it is: its attention, the format of weights that lie still, its score on the probe's sequences."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from selfkd.backend import adapters, probe
from selfkd.backend.attention import TORCH, plain_attention, plain_attention_of
from selfkd.backend.trainer import flat, four_bits
from selfkd.core.wording import first_line
from selfkd.errors import UsageError

LOADED: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}


def as_masters(path: str) -> dict[str, Any]:
    """Return how a model is opened: fp32 masters, from local safetensors only and without the folder's own code."""
    return {"attn_implementation": plain_attention_of(path), **LOADED}


def load(path: str, base: str | None = None, rounded: bool = False, four: torch.dtype | None = None) -> Any:
    """Load fp32 masters onto this rank's device; an adapter, of which `base` is the model beneath, merged.

    `rounded` ones lie there in bf16; linear layers in 4 bits where `four` is what they compute in.
    """
    full = str(adapters.base_folder(path, base))
    model = AutoModelForCausalLM.from_pretrained(full, **as_masters(full))
    if full != path:
        adapters.Weights(path, base).merge_into(model)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if four is not None:
        four_bits.quantise(model, adapters.Weights(path, base), device, four)
    if rounded:
        round_linear_weights(model)
    return model.to(device)


def which_attention(numerics: Mapping[str, Any], folder: str, asked: bool, longest: int) -> tuple[str, bool]:
    """Return by what attention is computed while training, and whether rows go through it flat.

    A CPU has no kernel for flat rows, so there attention goes row by row; on a card the kernels that know borders are named by the machine.
    """
    named = numerics.get("trainer", {}).get("attn_implementation")
    if named is None and not torch.cuda.is_available() and flat.may_be_flat(folder, longest):
        return flat.ROW_BY_ROW, True
    plain = plain_attention_of(folder)
    if named == TORCH != plain:
        what = f"{named} leaves out a part of this architecture's attention, such as a cap on its scores"
        fix = "Leave the option out, or name one that has it: flash_attention_2, or eager."
        raise UsageError(what, "machine.trainer.attn_implementation", fix)
    return named or plain, asked or flat.is_varlen(named or "")


def set_attention(model: Any, name: str) -> None:
    """Give a model the attention of this name; UsageError where this machine or the model's code cannot compute it."""
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError, KeyError) as error:
        what = f"this machine cannot compute attention by {name}: {first_line(error)}"
        fix = "Install what it needs, or leave the option out: torch's own attention is always there."
        raise UsageError(what, "machine.trainer.attn_implementation", fix) from error


def scored(model: Any, sequences: list[list[int]]) -> list[list[float]]:
    """Score the probe's sequences with the attention that every model and every device has, in fp32."""
    attention, plain = model.config._attn_implementation, plain_attention(model.config)
    with in_fp32(model):
        if attention == plain:
            return probe.token_logprobs(model, sequences)
        model.set_attn_implementation(plain)
        try:
            return probe.token_logprobs(model, sequences)
        finally:
            model.set_attn_implementation(attention)


def round_linear_weights(model: Any) -> None:
    """Round the weights of a frozen model's products to bf16 once, as autocast would in each forward pass: the same numbers for half of the memory."""
    shared = model.get_input_embeddings().weight
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and part.weight is not shared and part.weight.is_floating_point():
            part.weight.data = part.weight.data.bfloat16()


@contextlib.contextmanager
def in_fp32(model: Any) -> Iterator[None]:
    """Compute in fp32 with weights that were rounded to bf16, a layer at a time, where nothing else does."""
    rounded = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part.weight.dtype == torch.bfloat16]
    for part in rounded:
        part.forward = partial(_widened, part)
    try:
        yield
    finally:
        for part in rounded:
            del part.forward


def _widened(part: Any, x: torch.Tensor) -> torch.Tensor:
    bias = None if part.bias is None else part.bias.float()
    return torch.nn.functional.linear(x.float(), part.weight.float(), bias)
