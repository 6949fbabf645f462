"""One update of a model: rows in, a child checkpoint out. Runs in every rank of a trainer group, and alone just the same.

fp32 masters, TRL's losses, a checkpoint in fp32 with the parent's tokenizer and configuration beside it. Only rank 0 writes; an
update that fails leaves nothing. Knows neither rounds nor Ray.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import trl
from transformers.utils import logging

from selfkd.backend import adapters, probe, tokens
from selfkd.backend.attention import caps, plain_attention
from selfkd.backend.base import OnSteps, Trained, TrainSpec, nobody_listens
from selfkd.backend.facts import of_trainer
from selfkd.backend.trainer import (
    adapter,
    batches,
    checkpoint,
    distil,
    flat,
    four_bits,
    losses,
    offload,
    opened,
    optimiser_state,
    refused,
    rowwise,
    sharded,
)
from selfkd.backend.trainer.agreement import Agreement, figures
from selfkd.backend.trainer.loss_kinds import LossKind, kind_of
from selfkd.backend.trainer.repeatable import ARITHMETIC, CAPPED, adds_up_by, prepare, repeatable
from selfkd.backend.trainer.resume import Over, Resumption
from selfkd.backend.trainer.settings import TRL_DEFAULTS, TRL_FIXED
from selfkd.backend.trainer.together import grouped, of_rank_0, place
from selfkd.backend.trainer.trl_options import check_trl, for_loss
from selfkd.core import number_format
from selfkd.core.pool import Model
from selfkd.errors import GuardError, SelfkdError, UsageError

PROOFS = 2  # rows on which a model shows that flat rows do not see each other


def train_rank(
    start: Model,
    reference: Model | None,
    rows: Sequence[Path],
    spec: TrainSpec,
    out: Path,
    numerics: Mapping[str, Any],
    on_progress: OnSteps = nobody_listens,
) -> Trained:
    """Train `start` on `rows`, writing the child into `out` (emptied first); rank 0's return value counts.

    All ranks return or raise together. `reference` None under a loss on pairs means no reference model: every answer counts as
    equally likely before. `on_progress` is called after each optimiser step. Whatever goes wrong, `out` is gone afterwards.
    """
    spec = replace(spec, precision=number_format.of_training(spec.precision, numerics))
    prepare(numerics)
    logging.disable_progress_bar()
    rank, _ = place()
    if rank == 0:
        _clear(out)
    try:
        with repeatable(numerics):
            return _Update(_planned(start, reference, rows, spec, out, numerics), on_progress).run()
    except BaseException:
        if rank == 0:
            _clear(out)
        raise
    finally:
        gc.collect()  # trainer, callbacks and model refer to each other
        offload.give_back()


@dataclass(frozen=True)
class _Plan:
    """All that is decided about an update before a model is loaded. `config` is TRL's."""

    start: Model
    reference: Model | None
    spec: TrainSpec
    kind: LossKind
    out: Path
    rows: list[batches.Row]
    drops: dict[str, str]
    split: batches.Share
    config: Any
    rank: int
    attention: str
    is_flat: bool
    shard: bool = False
    numerics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bf16(self) -> bool:
        return self.spec.precision == "bf16"

    @property
    def trainer(self) -> Any:
        """Return the class that computes the loss."""
        return _trainer_of(self.kind)

    @cached_property
    def adapter(self) -> adapter.Plan | None:
        """Return how an adapter learns; None where all weights do."""
        return adapter.planned(self.spec.lora, self.start) if self.spec.lora else None

    @property
    def four_bits(self) -> torch.dtype | None:
        """Return what weights that lie in 4 bits beneath an adapter compute in; None where none lie so."""
        quantised = self.spec.lora is not None and bool(self.spec.lora.quantise)
        return (torch.bfloat16 if self.bf16 else torch.float32) if quantised else None


def _planned(
    start: Model, reference: Model | None, paths: Sequence[Path], spec: TrainSpec, out: Path, numerics: Mapping[str, Any]
) -> _Plan:
    """Refuse what can be refused before a model is loaded: options, batches, rows, and rows that a loss type cannot take."""
    kind, (rank, ranks) = kind_of(spec.loss, spec.rows, reference is not None), place()
    trainer, shard = numerics.get("trainer", {}), bool(numerics.get("shard"))
    machine = for_loss(spec.loss, trainer)
    options = {**TRL_DEFAULTS, "learning_rate": kind.rate(spec.lora is not None), **machine, **spec.trl}
    problems = check_trl(spec.loss, options)
    if problems:
        raise UsageError("\n".join(problems), "train")
    options |= {"loss_type": kind.loss_type} if kind.loss_type else {}
    refused.offloading(options, trainer)
    refused.optimiser(options, trainer, shard, ranks)
    if shard:
        four_bits.refuse_shards(spec)
    whole = batches.share(options["per_device_train_batch_size"], options["gradient_accumulation_steps"], ranks)
    rows, drops = batches.read_rows(tokens.tokenizer(start.path), paths, kind.rows == "pair", spec.max_length)
    if kind.teacher:
        rows, drops = distil.taught(rows, drops, spec)
        distil.refuse_same(rows, start.digest, reference.digest if reference else None)
    adapter.refuse_unserved(spec, start, numerics)
    longest = max(row.longest for row in rows)
    attention, is_flat = opened.which_attention(numerics, start.path, bool(options.get("padding_free")), longest)
    refused.router_loss(options, start.path)
    split = _split(whole, rows, options, is_flat)
    config = _config(spec, kind, options, split, out)
    return _Plan(start, reference, spec, kind, out, rows, drops, split, config, rank, attention, is_flat, shard, numerics)


def _config(spec: TrainSpec, kind: LossKind, options: Mapping[str, Any], split: batches.Share, out: Path) -> Any:
    """Make TRL's config of the options; what TRL refuses is the user's to correct."""
    gpu = torch.cuda.is_available()
    settings = {**TRL_FIXED, **options, "gradient_accumulation_steps": split.accumulation}
    settings.update(per_device_train_batch_size=split.micro, output_dir=str(out), bf16=spec.precision == "bf16")
    settings.update(use_cpu=not gpu, seed=spec.seed & 0xFFFFFFFF, data_seed=spec.seed & 0xFFFFFFFF)
    settings.update({"ddp_backend": "gloo"} if grouped() and not gpu else {})
    settings.update(_trainer_of(kind).settings(spec))
    try:
        return getattr(trl, kind.config)(**settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"TRL refuses these options: {error}", "train.trl") from error


class _Update:
    """One update: a plan, and the seconds that its stages took."""

    def __init__(self, plan: _Plan, on_progress: OnSteps) -> None:
        self.plan, self.steps, self.shares = plan, losses.StepReporter(on_progress), sharded.Shares()
        self.seconds: dict[str, float] = {}
        self.over_four_bits: list[four_bits.Scores] = []  # before and after the update
        self.resumption = Resumption(plan.spec, plan.rank, plan.split.ranks, plan.shard, on_progress)
        self.steps.before = self.steps.seconds = self.resumption.words.get("seconds", 0.0)
        self.resumption.seconds = lambda: self.steps.seconds

    def run(self) -> Trained:
        plan, tok = self.plan, tokens.tokenizer(self.plan.start.path)
        candidates = probe.candidate_sequences(tok, batches.sequences(plan.rows))
        references = self._references_of_another()
        with self._timed("load"):
            model, is_flat = self._policy(plan.adapter)
            parent = self._scored(model, candidates)
        adds_up_by(CAPPED if caps(model.config) else ARITHMETIC)
        self.resumption.computes_with(of_trainer())
        self._compute_in(model, plan.bf16)
        self.agreement = Agreement.of(self._first_rows(), plan.spec, model)
        self.rounding = self._own_rounding(model, is_flat, candidates, parent)
        references = references or self._references_of(model, is_flat)
        with self._timed("prepare"):
            trainer = self._trainer(model, tok, references, is_flat)
        began = time.perf_counter()
        with contextlib.suppress(Over):
            trainer.train(resume_from_checkpoint=self.resumption.folder and str(self.resumption.folder))
        train_call = time.perf_counter() - began
        trainer.model.__dict__.pop("forward", None)  # without TRL's head and Accelerate's autocast: the class's own, as before
        self._compute_in(trainer.model, False)
        child = self._scored(trainer.model, candidates)
        with self._timed("save"):
            moved = self._save(trainer.model, (candidates, child, parent))
            state = self._keep_state(trainer)
        metrics = {**self._metrics(trainer, train_call), "padding_free": is_flat, **moved}
        made, steps = trainer.state.global_step, trainer.state.max_steps
        return Trained(plan.out, metrics, plan.drops, state, made >= steps, of=steps)

    def _first_rows(self) -> list[batches.Row]:
        plan = self.plan
        return [plan.rows[at] for at in batches.plan(plan.rows, plan.split.rows, plan.spec.seed, 0)[0]]

    def _own_rounding(
        self, model: Any, is_flat: bool, sequences: list[list[int]], exact: list[list[float]]
    ) -> probe.Apart | None:
        """Return how far computing as it learns puts the model from fp32, on the probe's sequences; None where nobody asks."""
        if self.agreement is None or not self.agreement.known:
            return None
        pairs = [(_array(ids[:1]), _array(ids[1:])) for ids in sequences]
        found = losses.token_logprobs(model, pairs, self.plan.bf16, is_flat, self.plan.rank, self.plan.split.ranks)
        return probe.Apart.of(np.abs(np.concatenate(found) - np.concatenate(exact)))

    def _policy(self, how: adapter.Plan | None) -> tuple[Any, bool]:
        """Return the model that learns, opened; with an adapter the model beneath it lies still, in bf16 where all that computes with it rounds it."""
        plan = self.plan
        if how is None:
            return self._opened(plan.start)
        rounded = plan.bf16 and plan.numerics.get("dtype", "bfloat16") == "bfloat16"
        return self._opened(how.beneath, rounded, partial(adapter.attach, plan=how, seed=plan.spec.seed))

    def _scored(self, model: Any, sequences: list[list[int]]) -> list[list[float]]:
        """Score the policy as engines serve it; where its weights lie in 4 bits, these are scored too, and kept."""
        plan = self.plan.adapter
        if plan is None or not plan.spec.quantise:
            return opened.scored(model, sequences)
        self.over_four_bits.append(opened.scored(model, sequences))
        with four_bits.whole(model, adapters.Weights(plan.beneath.path, plan.beneath.base)):
            return opened.scored(model, sequences)

    def _opened(
        self, one: Model, rounded: bool = False, attach: Callable[[Any], None] = lambda model: None
    ) -> tuple[Any, bool]:
        """Return a model with the attention that it trains with and what `attach` puts into it, and whether it takes rows flat.

        Where the attention is ours, the model proves on two rows that they do not see each other; else batches are padded.
        """
        plan, path = self.plan, one.path
        if plan.shard:
            model = sharded.load(path, one.base, rounded, **opened.as_masters(path))
        else:
            model = opened.load(path, one.base, rounded, plan.four_bits)
        attach(model)  # a divided model takes nothing more once something went through it
        few = [ids[: probe.SEQUENCE_TOKENS] for ids in batches.sequences(plan.rows[:PROOFS])]
        with opened.in_fp32(model):
            scores = probe.token_logprobs(model, few) if plan.attention == flat.ROW_BY_ROW else []
            opened.set_attention(model, plan.attention)
            if not scores or flat.same_as_padded(model, few, scores):
                return model, plan.is_flat
        model.set_attn_implementation(plain_attention(model.config))
        return model, False

    def _trainer(self, model: Any, tok: Any, references: losses.References, is_flat: bool) -> Any:
        plan = self.plan
        return plan.trainer(
            model=model,
            args=plan.config,
            processing_class=_copy(tok),
            spec=plan.spec,
            rows=plan.rows,
            split=plan.split,
            references=references,
            is_flat=is_flat,
            resumption=self.resumption,
            agreement=self.agreement,
            offloads=bool(plan.numerics.get("trainer", {}).get("offload_optimiser")),
            **self._teacher(model, is_flat),
            callbacks=[self.steps, *([self.shares] if plan.shard else []), *self._of_optimiser()],
        )

    def _teacher(self, model: Any, is_flat: bool) -> Mapping[str, Any]:
        """Return whom the model is compared with at each token: itself, the one beneath its adapter, or a copy that lies still beside it."""
        plan = self.plan
        if not plan.kind.teacher:
            return {}
        if plan.reference is None or self._lies_beneath(plan.reference):
            return {"teacher": distil.Teacher(model, is_flat, plan.bf16, beneath=plan.reference is not None)}
        other, other_flat = self._reference(plan.reference)
        self._compute_in(other, plan.bf16)
        return {"teacher": distil.Teacher.another(other, other_flat, plan.bf16)}

    def _references_of_another(self) -> losses.References:
        """Return {row id: reference log-probabilities of chosen and rejected}; the reference model is gone before the policy loads.

        Empty where there are none, and where the reference is the model that training starts from, or the one beneath the adapter: that
        one is loaded once.
        """
        plan = self.plan
        if plan.reference is None or not plan.kind.reference:
            return {} if plan.kind.function else {row.id: (0.0, 0.0) for row in plan.rows if row.rejected is not None}
        if plan.reference.digest == plan.start.digest or self._lies_beneath(plan.reference):
            return {}
        model, is_flat = self._reference(plan.reference)
        self._compute_in(model, plan.bf16)
        return self._references_of(model, is_flat)

    def _reference(self, one: Model) -> tuple[Any, bool]:
        """Return a reference model, opened: beside a policy over 4 bits it lies in 4 bits too, an adapter over them as the policy's does."""
        plan = self.plan
        held = adapter.held_as(plan.adapter.spec, one) if plan.adapter and plan.four_bits else None
        return self._policy(held) if held and held.goes_on else self._opened(one, plan.bf16)

    def _lies_beneath(self, one: Model | None) -> bool:
        """Whether a model is the one that the policy is without its adapter."""
        return one is not None and self.plan.adapter is not None and one.digest == self.plan.adapter.beneath.digest

    def _compute_in(self, model: Any, bf16: bool) -> None:
        """Choose what the blocks of a divided model compute in. One that is whole is told by autocast, pass by pass."""
        if self.plan.shard:
            sharded.compute_in(model, bf16)

    def _references_of(self, model: Any, is_flat: bool) -> losses.References:
        plan = self.plan
        if plan.reference is None or not plan.kind.reference:
            return {}
        with self._timed("reference"), adapter.off(model) if self._lies_beneath(plan.reference) else contextlib.nullcontext():
            found: losses.References = plan.trainer.references(model, plan, is_flat)
        return found

    def _save(self, model: Any, evidence: tuple[Any, Any, Any]) -> dict[str, Any]:
        """Rank 0 writes and checks the child; every rank learns whether that went well, so that none waits for a failed one."""
        plan = self.plan
        error: SelfkdError | None = None
        moved: dict[str, Any] = {}
        try:
            own = adapter.learned(model) if plan.adapter else {}
            if plan.shard and not plan.adapter:
                sharded.save(model, plan.out)
            if plan.rank == 0:
                moved = self._finished(model, own, *evidence)
        except SelfkdError as problem:
            error = problem
        error = of_rank_0(error, plan.split.ranks)
        if error is not None:
            raise error
        return moved

    def _of_optimiser(self) -> list[Any]:
        """Return what puts another update's state into the optimiser, unless a checkpoint does, and what refuses one that cannot be kept."""
        spec = self.plan.spec
        put = [optimiser_state.Put(spec.state.folder)] if spec.state and not self.resumption.folder else []
        return [*put, *([optimiser_state.Saveable()] if spec.keeps_state else [])]

    def _keep_state(self, trainer: Any) -> Path | None:
        plan = self.plan
        return optimiser_state.keep(trainer, plan.out, plan.rank, plan.split.ranks) if plan.spec.keeps_state else None

    def _finished(self, model: Any, own: adapter.Factors, sequences: Any, child: Any, parent: Any) -> dict[str, Any]:
        """Write what is not written yet, and return how far the child moved; GuardError where it is no child."""
        plan, parent_folder = self.plan, Path(self.plan.start.path)
        if plan.adapter:
            measured = adapter.save(model, own, plan.adapter, plan.out, plan.numerics)
            measured |= four_bits.gap(parent, child, *self.over_four_bits) if plan.four_bits else {}
            rate = {"learning_rate": plan.config.learning_rate}
            moved = {name: measured.pop(name) for name in checkpoint.MOVED} | {"lora": {**measured, **rate}}
        else:
            checkpoint.describe(parent_folder, plan.out) if plan.shard else checkpoint.write(model, parent_folder, plan.out)
            moved = checkpoint.moved(adapters.Weights(parent_folder, plan.start.base), plan.out)
        if not all(map(math.isfinite, (value for row in child for value in row))):
            what = "the trained model gives log-probabilities that are not finite"
            raise GuardError(what, "train", checkpoint.LOWER_THE_STEP)
        attention = plain_attention(model.config)
        probe.write_probe(plan.out, sequences, child, parent, plan.start.digest, attention=attention)
        return moved

    def _metrics(self, trainer: Any, train_call: float) -> dict[str, Any]:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        first, last = history[0], history[-1]
        values = [entry["loss"] for entry in history]
        metrics: dict[str, Any] = {"steps": trainer.state.global_step, "epochs": trainer.state.epoch}
        metrics |= {"rows": len(self.plan.rows), "precision": self.plan.spec.precision}
        metrics |= {"shard": self.plan.split.ranks} if self.plan.shard else {}
        metrics |= {"shard_held": self.shares.held} if math.isfinite(self.shares.held) else {}  # no step was left to make
        metrics |= {"loss_first": values[0], "loss_last": values[-1], "loss_mean": sum(values) / len(values)}
        metrics |= {"tokens": int(last["num_tokens"]), "grad_norm_max": max(entry["grad_norm"] for entry in history)}
        for name in (
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
            "nll/chosen",
            "kl",
            *distil.NOTED,
        ):
            # Losses that do not compute an entropy log it as unknown; a step may have no row of which the sampler is known.
            if all(math.isfinite(entry.get(name, math.nan)) for entry in (first, last)):
                metrics |= {f"{name}_first": first[name], f"{name}_last": last[name]}
        metrics |= figures(first, self.rounding, self.agreement)
        metrics |= {"made_by": self.resumption.made_by}
        metrics |= {"continued_at": self.resumption.continued_at} if self.resumption.continued_at else {}
        seconds = self.steps.seconds
        metrics |= {f"seconds_{name}": value for name, value in self.seconds.items()}
        metrics["seconds_load"] += (
            metrics.pop("seconds_prepare") + train_call - (seconds - self.steps.before)
        )  # with what train() does before its first step
        return {**metrics, "seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def _split(whole: batches.Share, rows: list[batches.Row], options: Mapping[str, Any], is_flat: bool) -> batches.Share:
    """Cut the batches finer on a CPU, where the loss types allow it."""
    wanted = options.get("loss_type") or []
    wanted = [wanted] if isinstance(wanted, str) else wanted
    losses.refuse_unsplittable(rows, whole, wanted)
    if torch.cuda.is_available() or losses.UNSPLITTABLE & set(wanted):
        return whole
    return batches.finer(whole, rows, batches.FLAT_TOKENS if is_flat else batches.PADDED_TOKENS)


def _trainer_of(kind: LossKind) -> Any:
    return getattr(distil if kind.teacher else rowwise if kind.function else losses, kind.trainer)


def _array(ids: list[int]) -> batches.Ids:
    return np.array(ids, np.int32)


def _copy(tok: Any) -> Any:
    """Copy a tokenizer: TRL sets a padding token on the one it is given, and ours is shared with whoever encodes next."""
    return copy.deepcopy(tok)


def _clear(out: Path) -> None:
    for folder in (out, optimiser_state.beside(out)):
        shutil.rmtree(folder, ignore_errors=True)
