"""Which options a `trl:` block may hold, as plain data, so that `lint` can check them on a machine without torch or TRL.

Every field of TRL 1.16's SFTConfig and DPOConfig is in one of two tables: passed through, or decided by selfkd with the
place to set it instead. A test compares both tables with the installed wheel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from selfkd.backend.option_kinds import is_kind
from selfkd.backend.trainer.loss_kinds import kind_of
from selfkd.core.wording import did_you_mean

BATCH = 8  # rows that go through the model at once where nobody says otherwise
NOTHING_TO_OFFLOAD = "activation_offloading moves activations from a card to the machine's memory, and here the CPU computes: there they lie already"
INSTEAD_OF_OFFLOADING = "Leave it out; `gradient_checkpointing: true` keeps less of them."
NO_STATE_TO_OFFLOAD = "offload_optimiser moves the optimiser's state from a card to the machine's memory, and here the CPU computes: there it lies already"
LEAVE_IT_OUT = "Leave it out."
# Torch's own optimisers compute number by number, so that a weight may be divided; the others keep 8 bits, projections or rows of whole weights.
OF_TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
# name -> (kinds of value, smallest value or None). A kind is one of int, float, bool, str, list, dict; null is always allowed.
COMMON: dict[str, tuple[str, float | None]] = {
    "activation_offloading": ("bool", None),
    "adam_beta1": ("float", 0),
    "adam_beta2": ("float", 0),
    "adam_epsilon": ("float", 0),
    "ddp_bucket_cap_mb": ("int", 1),
    "ddp_find_unused_parameters": ("bool", None),
    "ddp_timeout": ("int", 1),
    "gradient_accumulation_steps": ("int", 1),
    "gradient_checkpointing": ("bool", None),
    "gradient_checkpointing_kwargs": ("dict", None),
    "learning_rate": ("float", 0),
    "loss_type": ("str list", None),
    "lr_scheduler_kwargs": ("dict", None),
    "lr_scheduler_type": ("str", None),
    "max_grad_norm": ("float", 0),
    "max_steps": ("int", -1),
    "neftune_noise_alpha": ("float", 0),
    "num_train_epochs": ("float", 0),
    "optim": ("str", None),
    "optim_args": ("str", None),
    "optim_target_modules": ("str list", None),
    "pad_to_multiple_of": ("int", 1),
    "per_device_train_batch_size": ("int", 1),
    "router_aux_loss_coef": ("float", 0),
    "tf32": ("bool", None),
    "torch_empty_cache_steps": ("int", 1),
    "warmup_steps": ("float", 0),
    "weight_decay": ("float", 0),
}
# What is passed through, per class of TRL's configuration.
PASSED: dict[str, dict[str, tuple[str, float | None]]] = {
    "SFTConfig": {**COMMON, "padding_free": ("bool", None)},
    "DPOConfig": {
        **COMMON,
        "disable_dropout": ("bool", None),
        "discopop_tau": ("float", 0),
        "f_alpha_divergence_coef": ("float", None),
        "f_divergence_type": ("str", None),
        "label_smoothing": ("float", 0),
        "loss_weights": ("list", None),
        "use_weighting": ("bool", None),
    },
}
# What transformers names its optimisers and schedules.
OF_TRANSFORMERS: dict[str, tuple[str, ...]] = {
    "optim": (
        *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision"),
        *(
            "adamw_torch_4bit",
            "adamw_torch_8bit",
            "ademamix",
            "sgd",
            "adagrad",
            "adamw_bnb_8bit",
            "adamw_8bit",
            "ademamix_8bit",
        ),
        *("lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        *("paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
        *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
        *("galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw"),
        *("schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw"),
    ),
    "lr_scheduler_type": (
        *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
        *("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
    ),
}
# Schedules of transformers that follow what is measured while training, which is never done here.
MEASURED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "SFTConfig": {**OF_TRANSFORMERS, "loss_type": ("nll", "dft")},
    "DPOConfig": {
        **OF_TRANSFORMERS,
        "loss_type": (
            *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
        ),
        "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    },
}

# Where to set what selfkd decides itself; the names are TRL's.
_OWNED_BY_REASON: dict[str, str] = {
    "the step's own field `beta`": "beta",
    "the step's own field `precision` (fp32 masters; bf16 or fp32 compute)": "bf16 fp16 bf16_full_eval fp16_full_eval",
    "it follows from the run's seed, the round and the step's name": "seed data_seed full_determinism",
    "the recipe's field `context` limits prompt and answer together; longer rows are dropped and counted, never cut": (
        "max_length truncation_mode"
    ),
    "the step's own field `reference`; its log-probabilities are computed once, before training": (
        "precompute_ref_log_probs precompute_ref_batch_size sync_ref_model ref_model_mixup_alpha ref_model_sync_steps ld_alpha"
    ),
    "the step's own field `from` and the run's `model` name the weights": "model_init_kwargs trust_remote_code",
    "rows are encoded by selfkd with the template used for generation; only the completion is learned": (
        "assistant_only_loss chat_template_path completion_only_loss dataset_kwargs dataset_num_proc dataset_text_field eos_token "
        "pad_token label_names label_smoothing_factor remove_unused_columns"
    ),
    "rows are ordered and batched by selfkd, so that the number of ranks changes nothing": (
        "accelerator_config auto_find_batch_size average_tokens_across_devices dataloader_drop_last dataloader_in_order "
        "dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory "
        "dataloader_prefetch_factor eval_packing length_column_name packing packing_strategy shuffle_dataset "
        "train_sampling_strategy"
    ),
    "measuring is the step `measure`": (
        "batch_eval_metrics do_eval do_predict do_train eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start "
        "eval_steps eval_strategy eval_use_gather_object greater_is_better include_for_metrics load_best_model_at_end "
        "metric_for_best_model per_device_eval_batch_size prediction_loss_only"
    ),
    "a round is committed whole by selfkd; what stays on disk is the recipe's `keep`": (
        "enable_jit_checkpoint ignore_data_skip output_dir restore_callback_states_from_checkpoint resume_from_checkpoint "
        "save_on_each_node save_only_model save_steps save_strategy save_total_limit"
    ),
    "the loss of every optimiser step is logged, and a summary is in the notes of the step's record": (
        "debug disable_tqdm include_num_input_tokens_seen log_level log_level_replica log_on_each_node logging_first_step "
        "logging_nan_inf_filter logging_steps logging_strategy project report_to run_name skip_memory_metrics "
        "trackio_bucket_id trackio_space_id trackio_static_space_id"
    ),
    "publishing is not done by selfkd yet": (
        "hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token push_to_hub"
    ),
    "the machine file says where and on how many ranks a run trains (`trainers`, `shard`)": (
        "ddp_backend ddp_broadcast_buffers ddp_static_graph deepspeed fsdp fsdp_config local_rank parallelism_config use_cpu"
    ),
    "it would change TRL's own forward pass, whose output head selfkd relies on": (
        "liger_kernel_config torch_compile torch_compile_backend torch_compile_mode use_cache use_liger_kernel"
    ),
}
OWNED: dict[str, str] = {name: reason for reason, names in _OWNED_BY_REASON.items() for name in names.split()}


def whole_weights(optimiser: str | None, trainer: Mapping[str, Any], shard: bool) -> tuple[str, str] | None:
    """Return why an optimiser is not possible with the options of a machine, and what to do; None where it is."""
    if optimiser is None or optimiser in OF_TORCH:
        return None
    instead = f"Use one of {', '.join(OF_TORCH)}, or leave out"
    if shard:
        return (
            f"the optimiser {optimiser} does not know weights that are divided over ranks",
            f"{instead} `shard` in the machine file.",
        )
    if trainer.get("offload_optimiser"):
        what = f"the optimiser {optimiser} keeps a state of a form of its own, which cannot be offloaded"
        return what, f"{instead} `offload_optimiser` in the machine file."
    return None


def for_loss(loss: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those options of a machine that TRL's config of this loss has: a machine serves steps of every loss."""
    kind = kind_of(loss)
    known = PASSED[kind.config].keys() - set(kind.ignores)
    return {name: value for name, value in options.items() if name in known}


def check_trl(loss: str, options: Mapping[str, Any]) -> list[str]:
    """Return every problem of a `trl:` block, one sentence each; none where TRL will accept its names and kinds of value."""
    return [problem for name, value in options.items() for problem in _problems(loss, str(name), value)]


def lacking_trl(loss: str, options: Mapping[str, Any]) -> str:
    """Return which option a loss cannot do without that is not given, or ''."""
    types = options.get("loss_type") or kind_of(loss).loss_type
    if "exo_pair" not in (types if isinstance(types, list) else [types]) or options.get("label_smoothing"):
        return ""
    return "loss exo_pair has no finite value without smoothed labels: write `trl: {label_smoothing: 1e-3}`, as in its paper"


def _problems(loss: str, name: str, value: Any) -> Iterator[str]:
    kind = kind_of(loss)
    config = kind.config
    if name in kind.ignores:
        yield f"trl.{name} has no meaning for loss {loss}"
    elif name in PASSED[config]:
        yield from _value_problems(config, name, value)
    elif name in OWNED:
        yield f"trl.{name} is not passed on: {OWNED[name]}"
    elif any(name in fields for fields in PASSED.values()):
        yield f"trl.{name} has no meaning for loss {loss}"
    else:
        yield f"trl has no field '{name}'.{did_you_mean(name, [*PASSED[config], *OWNED])}"


def _value_problems(config: str, name: str, value: Any) -> Iterator[str]:
    kinds, smallest = PASSED[config][name]
    if value is None:
        return
    if isinstance(value, str) and kinds in ("float", "int"):
        yield f"trl.{name} must be a number, not the text '{value}': write it like 1.0e-5, without quotes"
    elif not any(is_kind(kind, value) for kind in kinds.split()):
        yield f"trl.{name} must be {' or '.join(kinds.split())}, not {value!r}"
    elif smallest is not None and value < smallest:
        yield f"trl.{name} must be at least {smallest:g}, not {value!r}"
    elif value == 0 and name in ("max_steps", "num_train_epochs"):
        yield f"trl.{name} must be above 0, not {value!r}: without a step nothing is trained. Leave it out for the default"
    choices = CHOICES[config].get(name, ())
    for choice in value if isinstance(value, list) else [value]:
        if choices and choice not in choices:
            hint = did_you_mean(str(choice), choices) or " Choices: " + ", ".join(choices)
            if name == "lr_scheduler_type" and choice in MEASURED_SCHEDULES:
                hint = " It follows what is measured while training, which is not done here."
            yield f"trl.{name} has no choice '{choice}'.{hint}"
