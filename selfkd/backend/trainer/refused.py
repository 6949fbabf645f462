"""What an update cannot do on this machine, or with this model: refused before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig

from selfkd.backend.machine import refuse_lone_shard
from selfkd.backend.trainer.trl_options import (
    INSTEAD_OF_OFFLOADING,
    LEAVE_IT_OUT,
    NO_STATE_TO_OFFLOAD,
    NOTHING_TO_OFFLOAD,
    whole_weights,
)
from selfkd.errors import UsageError


def offloading(options: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    """Raise UsageError where something is to leave a card and none computes: TRL would fail on its first row."""
    if torch.cuda.is_available():
        return
    if options.get("activation_offloading"):
        raise UsageError(NOTHING_TO_OFFLOAD, "train.trl.activation_offloading", INSTEAD_OF_OFFLOADING)
    if trainer.get("offload_optimiser"):
        raise UsageError(NO_STATE_TO_OFFLOAD, "machine.trainer.offload_optimiser", LEAVE_IT_OUT)


def optimiser(options: Mapping[str, Any], trainer: Mapping[str, Any], shard: bool, ranks: int) -> None:
    """Raise UsageError for an optimiser that looks at whole weights where they are divided, and for a model divided over one rank."""
    if shard:
        refuse_lone_shard(ranks)
    if found := whole_weights(options.get("optim"), trainer, shard):
        raise UsageError(found[0], "train.trl.optim", found[1])


def router_loss(options: Mapping[str, Any], folder: str) -> None:
    """Raise UsageError for a loss that spreads tokens over experts where a model has none, or does not tell whom it asked."""
    text = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config(decoder=True)
    if options.get("router_aux_loss_coef") and not hasattr(text, "output_router_logits"):
        what = f"router_aux_loss_coef is for mixtures of experts, and {text.model_type} is none that tells of its router"
        raise UsageError(what, "train.trl.router_aux_loss_coef", "Leave it out.")
