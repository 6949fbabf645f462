"""What selfkd gives TRL's configuration where nobody says otherwise, and what it decides for every update. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from selfkd.backend.trainer.trl_options import BATCH

# Ours, where they differ from TRL's; the learning rates are in loss_kinds. Constant and without warm-up: a round is short, a
# decay to zero in each would make the step size a saw-tooth over the chain.
TRL_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,  # less memory for about 30 % of the time: on where a model does not fit
    "ddp_find_unused_parameters": False,  # experts lie in one tensor, which has a gradient whoever of them was asked
}
# What selfkd decides for every update; trl_options.OWNED says why.
TRL_FIXED: dict[str, Any] = {
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
    "log_level": "error",
    "remove_unused_columns": False,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "max_length": None,
}
