"""A trainer whose loss is made of how far the model is from a teacher at each token: per-token distillation.

The teacher is another model, the model beneath an adapter, or the model itself without a gradient. It reads the same completion behind
a prompt of its own, in a forward pass of its own before the student's. Rows, weights, ranks and shards are those of any loss per row.
"""

# TRL has no types.
# mypy: allow-subclassing-any
from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import trl.trainer.utils
from trl.trainer.utils import disable_dropout_in_model

from selfkd.backend.base import DivergenceSpec, TrainSpec
from selfkd.backend.trainer import adapter, flat, losses, row_loss, rowwise, sharded
from selfkd.backend.trainer.batches import Ids, Row, counted
from selfkd.backend.trainer.cpu_head import Heard, instead
from selfkd.backend.trainer.divergence import MOST_ELEMENTS, Compared, compared
from selfkd.errors import GuardError, UsageError

# Which of the outputs of TRL's head carries what, in its order; flat batches pass on all of them.
SLOTS = dict(zip(Compared._fields, ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"), strict=True))
LOGGED = ("divergence", "entropy", "agreement")  # in the mean over a step's tokens
STALENESS = "staleness"
NOTED = (*LOGGED, STALENESS)
SAME = "teacher and student are the same model with the same prompt in every row, so there is nothing to learn"
DIFFER = "Give the teacher a prompt of its own (`teacher` or `template`), or name another model in `teacher`."


@dataclass(frozen=True)
class Teacher:
    """Whom the student is compared with. `beneath`: `model` is the one that learns, and its adapter is switched off."""

    model: Any
    is_flat: bool
    bf16: bool
    beneath: bool = False

    @classmethod
    def another(cls, model: Any, is_flat: bool, bf16: bool) -> Teacher:
        """Return a teacher whose weights lie still, beside those of the model that learns."""
        model.eval().requires_grad_(False)
        trl.trainer.utils.add_fused_lm_head(model)
        return cls(model, is_flat, bf16)

    def heard(self, batch: Mapping[str, torch.Tensor]) -> Heard:
        """Return what its output head makes of the completions of a batch, without a gradient."""
        found: list[Heard] = []

        def keep(heard: Heard, labels: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            found.append(heard)
            return labels.new_zeros(len(labels), dtype=torch.float32), None, None, None, None

        device = batch["input_ids"].device.type
        off = adapter.off(self.model) if self.beneath else contextlib.nullcontext()
        with torch.no_grad(), off, instead(keep), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            _through(self.model, batch, self.is_flat)
        return found[0]


def _through(model: Any, batch: Mapping[str, torch.Tensor], is_flat: bool) -> Any:
    return flat.forward(model, **batch) if is_flat else model(**batch, use_cache=False, fused_lm_head=True)


def head(teacher: Heard, how: DivergenceSpec) -> Any:
    """Return what stands in the place of the student's output head."""
    return instead(lambda student, labels: compared(teacher, student, labels, how, MOST_ELEMENTS))


# ---- before anything learns ----


def taught(rows: Sequence[Row], drops: Mapping[str, str], spec: TrainSpec) -> tuple[list[Row], dict[str, str]]:
    """Return rows of which a part of the completion is read, and {row id: reason} of all that are refused. None left is a GuardError."""
    assert spec.divergence is not None
    skip, first = spec.divergence.skip, spec.divergence.first
    each = [counted(row, skip, first) for row in rows]
    short = {row.id: reason for row, reason in each if reason}
    kept = [row for row, reason in each if not reason]
    if not kept:
        what = f"none of {len(rows)} completions is longer than the {skip} tokens that do not count"
        raise GuardError(what, "train", "Lower divergence.skip.")
    return kept, {**drops, **short}


def refuse_same(rows: Sequence[Row], start: str, teacher: str | None) -> None:
    """Raise UsageError where every row has the teacher's prompt as its own, and both models are one; `start` and `teacher` are digests."""
    if teacher in (None, start) and all(np.array_equal(row.prompt, _told(row)) for row in rows):
        raise UsageError(SAME, "train.teacher", DIFFER)


# ---- the trainer ----


class Distilled(rowwise.RowWise):
    """A value per row, from how far the model is from its teacher at each token of the row's completion."""

    logps_slot = SLOTS["logps"]

    def __init__(self, spec: TrainSpec, rows: Sequence[Row], teacher: Teacher, **more: Any) -> None:
        assert spec.divergence is not None
        self.how, self.teacher, self._sums = spec.divergence, teacher, dict[str, Any]()
        disable_dropout_in_model(more["model"])  # a teacher that is the same model would be told apart by noise
        super().__init__(spec=spec, rows=rows, **more)

    @staticmethod
    def references(model: Any, plan: Any, is_flat: bool) -> losses.References:
        return {}

    def _prove(self, model: Any, rows: Sequence[Row], references: losses.References, bf16: bool, is_flat: bool) -> None:
        few = rowwise.first_rows(rows)
        batch = _batch(few, partial(rowwise.sequences, multiple=1, padding=0))
        device = next(model.parameters()).device
        both = [{name: value.to(device) for name, value in batch[side].items()} for side in ("student", "teacher")]
        training = model.training
        model.eval()
        trl.trainer.utils.add_fused_lm_head(model)
        try:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                heard = self.teacher.heard(both[1])
                with head(heard, self.how):
                    outputs = _through(model, both[0], is_flat)
        finally:
            del model.forward  # the class's own forward shows again
            sharded.rest(model)
            model.train(training)
        known = self._given(few)
        scored = _by_row(outputs, batch["starts"].to(device), {name: value.to(device) for name, value in known.items()})
        row_loss.refuse_mixed_rows(self.form, {**known, **{name: value.cpu() for name, value in scored.items()}})

    def _given(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        known = rowwise.given(rows, {}, self.form.rows, self.columns)
        return {**known, "mask": known["mask"][:, self.how.skip :]}  # a function sees the tokens that count

    def _collate(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [record["row"] for record in records]
        both = _batch(rows, self._sequences)
        scale = torch.tensor([record["scale"] for record in records])
        logprobs = torch.tensor([np.nan if row.logprob is None else row.logprob for row in rows])
        return {
            **both["student"],
            "teacher": both["teacher"],
            "starts": both["starts"],
            "scale": scale,
            "given": self._given(rows),
            "logprobs": logprobs,
        }

    def _per_token(self, model: Any, inputs: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        with head(self.teacher.heard(inputs["teacher"]), self.how):
            outputs = self._outputs(model, **arguments, use_cache=False, fused_lm_head=True)
        return outputs, _by_row(outputs, inputs["starts"], inputs["given"])

    def _note(self, inputs: Any, scored: Mapping[str, torch.Tensor], scale: torch.Tensor) -> None:
        """Keep for the log the tokens so far, how far the model is from its teacher, and from who sampled the completions."""
        self._note_tokens(inputs, scale)
        mask, real = inputs["given"]["mask"], scale > 0
        counts = mask.sum(1)
        for name in LOGGED:
            self._mean(name, (scored[name].detach() * mask).sum(1), counts, real)
        self._mean("logps/chosen", scored["logps"].detach().sum(1), torch.ones_like(counts), real)
        known = real & inputs["logprobs"].isfinite()
        apart = inputs["logprobs"].nan_to_num() - scored["logps"].detach().sum(1)
        self._mean(STALENESS, apart, counts, known)

    def _mean(self, name: str, sums: torch.Tensor, counts: torch.Tensor, real: torch.Tensor) -> None:
        """Note the mean of what the step's micro-batches so far have added up, over all of them and all ranks."""
        told = self.accelerator.gather(torch.stack([(sums * real).sum(), (counts * real).sum().to(sums.dtype)]))
        noted = self._metrics["train"]
        before = self._sums.get(name, 0) if name in noted else 0  # the notes of a step go when it is logged
        self._sums[name] = before + told.view(-1, 2).sum(0)
        total, count = self._sums[name].tolist()
        if count:
            noted[name] = [total / count]


def _batch(rows: Sequence[Row], sequences: Any) -> dict[str, Any]:
    """Return what student and teacher read: prompts of their own, the same completions, of which the skipped tokens are no labels."""
    found: dict[str, Any] = {}
    for side, prompts in (("student", [row.prompt for row in rows]), ("teacher", [_told(row) for row in rows])):
        found[side] = sequences([(prompt, row.answers[0]) for prompt, row in zip(prompts, rows, strict=True)])
        for at, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            found[side]["labels"][at, len(prompt) : len(prompt) + row.skip] = -100
    return {**found, "starts": torch.tensor([len(row.prompt) + row.skip for row in rows])}


def _told(row: Row) -> Ids:
    assert row.teacher is not None
    return row.teacher


def _by_row(outputs: Any, starts: torch.Tensor, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what is known of each token as [rows, tokens], from the completion's first token that counts."""
    tables = {name: getattr(outputs, slot).float() for name, slot in SLOTS.items()}
    return {name: rowwise.by_answer(table, starts, known, "kd")["logps"] for name, table in tables.items()}
