"""One update of a model: rows in, a child checkpoint out. Runs in every rank of a trainer group, and alone just the same.

fp32 masters, TRL's losses, a checkpoint in fp32 with the parent's tokenizer and configuration beside it. Only rank 0 writes; an
update that fails leaves nothing. Knows neither rounds nor Ray.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend import probe, tokens
from selfkd.backend.base import Trained, TrainSpec
from selfkd.backend.trainer import batches, checkpoint
from selfkd.backend.trainer.trl_options import check_trl
from selfkd.core.pool import Model
from selfkd.errors import GuardError, SelfkdError, UsageError

Report = Callable[[dict[str, Any]], None]

# Ours, where they differ from TRL's. Learning rates: 1e-5 is usual for SFT of a whole model, 5e-7 is SPIN's and DPO's. Constant
# and without warm-up: a round is short, a decay to zero in each would make the step size a saw-tooth over the chain.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,  # less memory for about 30 % of the time: on where a model does not fit
    "ddp_find_unused_parameters": False,  # a mixture of experts needs True
}
LEARNING_RATE = {"sft": 1e-5, "dpo": 5e-7}
# What selfkd decides for every update; trl_fields.OWNED says why.
FIXED: dict[str, Any] = {
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


def train_rank(
    start: Model,
    reference: Model | None,
    rows: Sequence[Path],
    spec: TrainSpec,
    out: Path,
    numerics: Mapping[str, Any],
    report: Report | None = None,
) -> Trained:
    """Train `start` on `rows`, writing the child into `out` (emptied first); rank 0's return value counts.

    All ranks return or raise together. `reference` None under loss dpo means no reference model: every answer counts as equally
    likely before. `report` hears of each optimiser step. Whatever goes wrong, `out` is gone afterwards.
    """
    rank, _ = _place()
    if rank == 0:
        _clear(out)
    try:
        with _numerics(numerics):
            return _Update(start, reference, spec, out, numerics).run(rows, report)
    except BaseException:
        if rank == 0:
            _clear(out)
        raise
    finally:
        gc.collect()  # trainer, callbacks and model refer to each other


def sequence_logprobs(
    folder: Path, rows: pl.DataFrame, numerics: Mapping[str, Any], bf16: bool = False
) -> list[tuple[str, float, int]]:
    """(id, summed log-probability, tokens) of each row's `text` or `token_ids` after its `messages`, under a model folder."""
    from selfkd.backend.trainer.losses import completion_logprobs

    tok, pairs = tokens.tokenizer(str(folder)), []
    for row in rows.iter_rows(named=True):
        sampled = row.get("token_ids")
        completion = tokens.encode_completion(tok, row["text"] or "", sampled, ended=sampled is None)
        pairs.append((_array(tokens.encode_prompt(tok, row["messages"])), _array(completion)))
    with _numerics(numerics):
        sums = completion_logprobs(_load(str(folder)), pairs, bf16)
    return [(name, value, len(pair[1])) for name, value, pair in zip(rows["id"], sums, pairs, strict=True)]


class _Update:
    """One call of `train_rank`: what was asked for, and what its stages took."""

    def __init__(self, start: Model, reference: Model | None, spec: TrainSpec, out: Path, numerics: Mapping[str, Any]) -> None:
        self.start, self.reference, self.spec, self.out = start, reference, spec, out
        self.options = {**DEFAULTS, "learning_rate": LEARNING_RATE[spec.loss], **numerics.get("trainer", {}), **spec.trl}
        problems = check_trl(spec.loss, {name: value for name, value in self.options.items()})
        if problems:
            raise UsageError("\n".join(problems), "train")
        self.rank, ranks = _place()
        batch, accumulation = self.options["per_device_train_batch_size"], self.options["gradient_accumulation_steps"]
        self.split = batches.share(batch, accumulation, ranks)
        self.bf16 = spec.precision == "bf16"
        self.took: dict[str, float] = {}

    def run(self, paths: Sequence[Path], report: Report | None) -> Trained:
        tok = tokens.tokenizer(self.start.path)
        rows, drops = batches.read_rows(tok, paths, self.spec.loss, self.spec.max_length)
        self._prepare(rows, report)
        references = self._references(rows)
        with self._timed("load"):
            trainer = self._trainer(tok, rows, references)
            candidates = probe.candidate_sequences(tok, batches.sequences(rows))
            parent = probe.token_logprobs(trainer.model, candidates)
        began = time.perf_counter()
        trainer.train()
        train_call = time.perf_counter() - began
        trainer.model.__dict__.pop("forward", None)  # without TRL's head and Accelerate's autocast: the class's own, as before
        child = probe.token_logprobs(trainer.model, candidates)
        with self._timed("save"):
            moved = self._save(trainer.model, (candidates, child, parent))
        return Trained(self.out, {**self._metrics(trainer, rows, train_call), **moved}, drops)

    def _prepare(self, rows: list[batches.Row], report: Report | None) -> None:
        """What can be refused before a model is loaded."""
        import torch

        from selfkd.backend.trainer import losses

        wanted = self.options.get("loss_type") or []
        wanted = [wanted] if isinstance(wanted, str) else wanted
        losses.refuse_unsplittable(rows, self.split, wanted)
        if not torch.cuda.is_available() and not losses.UNSPLITTABLE & set(wanted):
            self.split = batches.finer(self.split, rows)
        self.progress = losses.Progress(report)
        self.arguments = self._arguments(any(row.weight != rows[0].weight for row in rows))

    def _trainer(self, tok: Any, rows: list[batches.Row], references: dict[str, tuple[float, float]]) -> Any:
        from selfkd.backend.trainer import losses

        common = {
            "model": _load(self.start.path),
            "args": self.arguments,
            "processing_class": _copy(tok),
            "rows": rows,
            "split": self.split,
            "seed": self.spec.seed,
            "callbacks": [self.progress],
        }
        if self.spec.loss == "sft":
            return losses.Supervised(**common)
        return losses.Preference(nll=self.spec.nll, references=references, **common)

    def _references(self, rows: list[batches.Row]) -> dict[str, tuple[float, float]]:
        """{row id: reference log-probabilities of chosen and rejected}; the reference model is gone before the policy loads."""
        from selfkd.backend.trainer.losses import completion_logprobs

        if self.spec.loss == "sft":
            return {}
        if self.reference is None:
            return {row.id: (0.0, 0.0) for row in rows}
        sides = [(row.prompt, side) for row in rows for side in (row.chosen, row.rejected) if side is not None]
        with self._timed("reference"):
            values = completion_logprobs(_load(self.reference.path), sides, self.bf16, self.rank, self.split.ranks)
        return {row.id: (values[2 * i], values[2 * i + 1]) for i, row in enumerate(rows)}

    def _arguments(self, weighted: bool) -> Any:
        """The options as TRL's config; what it refuses is the user's to mend."""
        import torch
        from trl import DPOConfig, SFTConfig

        gpu = torch.cuda.is_available()
        options = {**FIXED, **self.options, "gradient_accumulation_steps": self.split.accumulation}
        options.update(per_device_train_batch_size=self.split.micro, output_dir=str(self.out), bf16=self.bf16)
        options.update(use_cpu=not gpu, seed=self.spec.seed & 0xFFFFFFFF, data_seed=self.spec.seed & 0xFFFFFFFF)
        options.update({"ddp_backend": "gloo"} if _grouped() and not gpu else {})
        if self.spec.loss == "sft":
            flat = bool(options.get("padding_free")) and not weighted  # weights go by row, and a flat batch has none
            options.update(dataset_kwargs={"skip_prepare_dataset": True}, padding_free=flat)
        else:
            options.update(beta=self.spec.beta, precompute_ref_log_probs=True)
        try:
            return (SFTConfig if self.spec.loss == "sft" else DPOConfig)(**options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"TRL refuses these options: {error}", "train.trl") from error

    def _save(self, model: Any, evidence: tuple[Any, Any, Any]) -> dict[str, float]:
        """Rank 0 writes and checks the child; every rank learns whether that went well, so that none waits for a failed one."""
        error: SelfkdError | None = None
        moved: dict[str, float] = {}
        if self.rank == 0:
            try:
                checkpoint.write(model, Path(self.start.path), self.out)
                moved = checkpoint.moved(Path(self.start.path), self.out)
                sequences, child, parent = evidence
                if not all(map(math.isfinite, (value for row in child for value in row))):
                    raise GuardError("the trained model gives log-probabilities that are not finite", "train", checkpoint.LOWER)
                probe.write_probe(self.out, sequences, child, parent, self.start.digest)
            except SelfkdError as problem:
                error = problem
        error = _from_rank_0(error, self.split.ranks)
        if error is not None:
            raise error
        return moved

    def _metrics(self, trainer: Any, rows: list[batches.Row], train_call: float) -> dict[str, Any]:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        first, last = history[0], history[-1]
        losses = [entry["loss"] for entry in history]
        metrics: dict[str, Any] = {"steps": trainer.state.global_step, "epochs": trainer.state.epoch, "rows": len(rows)}
        metrics |= {"loss_first": losses[0], "loss_last": losses[-1], "loss_mean": sum(losses) / len(losses)}
        metrics |= {"tokens": int(last["num_tokens"]), "grad_norm_max": max(entry["grad_norm"] for entry in history)}
        for name in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "nll/chosen"):
            if name in first:
                metrics |= {f"{name}_first": first[name], f"{name}_last": last[name]}
        seconds = self.progress.seconds
        metrics |= {f"seconds_{name}": value for name, value in self.took.items()}
        metrics["seconds_load"] += train_call - seconds  # what train() does before its first step
        return {**metrics, "seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.took[name] = time.perf_counter() - began


def _array(ids: list[int]) -> batches.Ids:
    import numpy as np

    return np.array(ids, np.int32)


def _copy(tok: Any) -> Any:
    """TRL sets a padding token on the tokenizer it is given, and ours is shared with whoever encodes next."""
    import copy

    return copy.deepcopy(tok)


def _grouped() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _place() -> tuple[int, int]:
    """(rank, ranks) in the process group if there is one, else alone."""
    import torch.distributed

    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _grouped() else (0, 1)


def _from_rank_0(error: SelfkdError | None, ranks: int) -> SelfkdError | None:
    import torch.distributed

    if ranks == 1:
        return error
    said = [error]
    torch.distributed.broadcast_object_list(said, src=0)
    return said[0]


@contextlib.contextmanager
def _numerics(numerics: Mapping[str, Any]) -> Iterator[None]:
    """Threads as recorded, and on CPU only operations that repeat bit by bit; the process gets its own settings back."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.set_num_threads(numerics.get("threads") or before[0])
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and hides nothing here
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def _load(path: str) -> Any:
    """fp32 masters on this rank's device, from local safetensors only and without the folder's own code."""
    import torch
    from transformers import AutoModelForCausalLM

    local = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa", **local)
    return model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}") if torch.cuda.is_available() else model


def _clear(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
