"""A trainer whose loss is a function of log-probabilities: a value per row, weighed and averaged here over the whole optimiser step.

One forward pass of each micro-batch gives the log-probabilities of its answers' tokens; those under the reference were computed
before the first step. Ranks, shards, adapters and rows without padding are the business of what lies beneath.
"""

# TRL has no types.
# mypy: allow-subclassing-any
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import disable_dropout_in_model

from selfkd.backend.base import TrainSpec
from selfkd.backend.trainer import losses, row_loss
from selfkd.backend.trainer.batches import Feed, Ids, Row, collator_record, strangers
from selfkd.backend.trainer.loss_kinds import KL
from selfkd.backend.trainer.row_loss import RowLoss
from selfkd.errors import UsageError

RANK = "rank"
PROOFS = 6  # rows on which a loss shows that it is row-wise
NAMES = {"pair": ("chosen_", "rejected_")}  # how the answers of a row are called; with one answer it needs no name


class RowWise(losses.Supervised):
    """A user's loss. Its value for each row is multiplied with the row's weight, and averaged over the step's rows or tokens."""

    def __init__(self, spec: TrainSpec, rows: Sequence[Row], references: losses.References, is_flat: bool, **more: Any) -> None:
        assert spec.function is not None
        self.form, self.average = RowLoss.of(spec.function, spec.rows), spec.average
        self.columns, model = columns_of(rows, self.form), more["model"]
        self.strange = KL in self.form.names
        if references:
            disable_dropout_in_model(model)  # else the ratio of policy and reference is noise before the first step
        self._prove(model, rows, references, spec.precision == "bf16", is_flat)
        super().__init__(spec=spec, rows=rows, references=references, is_flat=is_flat, **more)
        self.model_accepts_loss_kwargs = False  # a micro-batch has its own share of the step's average

    @staticmethod
    def _first_record(row: Row) -> dict[str, Any]:
        return collator_record(replace(row, rejected=None), 1.0, False)

    @staticmethod
    def references(model: Any, plan: Any, is_flat: bool) -> losses.References:
        """Return the log-probabilities of the answers of all rows of an update's plan, token by token; those of strangers summed."""
        place = (plan.bf16, is_flat, plan.rank, plan.split.ranks)
        scored = iter(losses.token_logprobs(model, sides(plan.rows), *place))
        found: dict[Any, tuple[Any, ...]] = {row.id: tuple(next(scored) for _ in row.answers) for row in plan.rows}
        if KL in RowLoss.of(plan.spec.function, plan.spec.rows).names:
            pairs = met(plan)
            sums = losses.completion_logprobs(model, [(row.prompt, other.chosen) for row, other in pairs], *place)
            found |= {(row.id, other.id): (value,) for (row, other), value in zip(pairs, sums, strict=True)}
        return found

    def _prove(self, model: Any, rows: Sequence[Row], references: losses.References, bf16: bool, is_flat: bool) -> None:
        """Raise UsageError where the loss is not row-wise on the first rows, as the model scores them now."""
        few = first_rows(rows)
        scored = iter(losses.token_logprobs(model, sides(few), bf16, is_flat))
        policy = {row.id: tuple(next(scored) for _ in row.answers) for row in few}
        known = {**given(few, references, self.form.rows, self.columns), KL: torch.tensor(0.1)}
        row_loss.refuse_mixed_rows(self.form, {**known, **_padded(few, policy)})

    def _collate(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [record["row"] for record in records]
        whole = sides(rows) if self.form.rows == RANK else by_side(rows)
        batch = self._sequences(whole)
        if self.strange:
            pairs = [(record["row"], record["stranger"]) for record in records]
            references = [self.reference_of[row.id, other.id][0] for row, other in pairs]
            batch["strange"] = self._sequences([(row.prompt, other.chosen) for row, other in pairs])
            batch["strange_logps"] = torch.tensor(references)
        starts = torch.tensor([len(prompt) for prompt, _ in whole])
        scale = torch.tensor([record["scale"] for record in records])
        return {
            **batch,
            "starts": starts,
            "scale": scale,
            "given": given(rows, self.reference_of, self.form.rows, self.columns),
        }

    def _sequences(self, whole: Sequence[tuple[Ids, Ids]]) -> dict[str, Any]:
        return sequences(whole, self.args.pad_to_multiple_of or 1, self.data_collator.pad_token_id)

    def get_batch_samples(self, *arguments: Any) -> Any:
        """Work out, where the loss asks for it, the step's `kl` before its first micro-batch."""
        batches, count = super().get_batch_samples(*arguments)
        if self.strange and batches:
            kl = self._kl(batches)
            for batch in batches:
                batch["given"][KL] = kl
            self._metrics["train"][KL].append(kl.item())
        return batches, count

    def _kl(self, batches: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Return how much likelier answers to other prompts are than under the reference, in the mean over the step's rows; at least 0."""
        told = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for batch in batches:
            one = self._prepare_inputs({name: batch[name] for name in ("strange", "strange_logps", "scale")})
            with torch.no_grad():
                logps = self._outputs(self.model_wrapped, **one["strange"], use_cache=False, fused_lm_head=True).log_probs
            real = one["scale"] > 0
            told += torch.stack([((logps.float().sum(1) - one["strange_logps"]) * real).sum(), real.sum()]).double()
        self.model.train()
        total, rows = self.accelerator.gather(told).view(-1, 2).sum(0)
        return (total / rows).clamp(min=0).float()

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the share of a micro-batch in the loss of its step."""
        known, scale = inputs["given"], inputs["scale"]
        arguments = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        outputs, scored = self._per_token(model, inputs, arguments)
        loss = (scale * self.form.values({**known, **scored})).sum()
        self._note(inputs, scored, scale)
        return loss + self.router_aux_loss_coef * outputs.aux_loss if self.aux_loss_enabled else loss

    def _per_token(self, model: Any, inputs: Any, arguments: Mapping[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return the outputs of one forward pass, and what of them a function may ask for, by name."""
        outputs = self._outputs(model, **arguments, use_cache=False, fused_lm_head=True)
        return outputs, by_answer(outputs.log_probs.float(), inputs["starts"], inputs["given"], self.form.rows)

    def _note_tokens(self, inputs: Any, scale: torch.Tensor) -> None:
        real = (scale > 0).long()  # without the row of a rank that has none
        whole = inputs["attention_mask"].sum() if real.any() else real.sum()
        self._total_train_tokens += self.accelerator.gather(whole).sum().item()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _note(self, inputs: Any, logps: Mapping[str, torch.Tensor], scale: torch.Tensor) -> None:
        """Keep for the log the tokens so far, and how likely answers are."""
        self._note_tokens(inputs, scale)
        real, noted = (scale > 0).long(), self._metrics["train"]
        for name, values in logps.items():
            sums = (values[:, 0] if self.form.rows == RANK else values).detach().sum(1)  # of a ranking, the best answer
            told = self.accelerator.gather(torch.stack([(sums * real).sum(), real.sum()])).view(-1, 2).sum(0)
            if told[1]:
                side = name.removesuffix("logps").rstrip("_") or "chosen"
                noted[f"logps/{side}"].append((told[0] / told[1]).item())


def sides(rows: Sequence[Row]) -> list[tuple[Ids, Ids]]:
    return [(row.prompt, answer) for row in rows for answer in row.answers]


def met(plan: Any) -> list[tuple[Row, Row]]:
    """Return each row with the strangers that it meets in all steps of an update."""
    feed = Feed(plan.rows, plan.split, plan.spec.seed, plan.rank, list)
    per_epoch = max(1, len(feed) // plan.split.accumulation)
    config = plan.config
    epochs = config.max_steps / per_epoch if config.max_steps > 0 else config.num_train_epochs
    found = {
        pair
        for epoch in range(math.ceil(epochs))
        for batch in feed.steps(epoch)
        for pair in strangers(plan.rows, batch).items()
    }
    return [(plan.rows[i], plan.rows[j]) for i, j in sorted(found)]


def by_side(rows: Sequence[Row]) -> list[tuple[Ids, Ids]]:
    """Return the chosen answers of all rows, then the rejected ones."""
    return [(row.prompt, row.answers[slot]) for slot in range(len(rows[0].answers)) for row in rows]


def first_rows(rows: Sequence[Row]) -> list[Row]:
    """Return a few rows that differ: spread over labels and lengths."""
    ordered = sorted(rows, key=lambda row: (row.numbers.get("label", 0.0), row.longest, row.id))
    places = sorted({round(at) for at in np.linspace(0, len(ordered) - 1, PROOFS)})
    return [ordered[at] for at in places]


def sequences(whole: Sequence[tuple[Ids, Ids]], multiple: int, padding: int) -> dict[str, torch.Tensor]:
    """Return prompts with their answers, padded on the right; only the answers' tokens are labels."""
    width = -(-max(len(prompt) + len(answer) for prompt, answer in whole) // multiple) * multiple
    ids, labels = torch.full((len(whole), width), padding), torch.full((len(whole), width), -100)
    mask = torch.zeros_like(ids)
    for at, (prompt, answer) in enumerate(whole):
        end = len(prompt) + len(answer)
        ids[at, :end] = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
        labels[at, len(prompt) : end] = ids[at, len(prompt) : end]
        mask[at, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def columns_of(rows: Sequence[Row], form: RowLoss) -> list[str]:
    """Return the columns that all rows have; UsageError where the loss must be given another one."""
    found = set.intersection(*(set(row.numbers) for row in rows))
    for name in (name for name in form.columns if name not in found):
        what = f"the loss asks for '{name}', which not every row has"
        raise UsageError(what, form.where, f"Write `columns: {{{name}: ...}}` in the build step.")
    return sorted(found)


def given(rows: Sequence[Row], references: losses.References, kind: str, columns: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return what a loss may ask for of rows, but for the log-probabilities of the model that learns."""
    known: dict[str, torch.Tensor] = {}
    if kind == RANK:
        known["mask"] = _stacked([[torch.ones(len(answer), dtype=torch.bool) for answer in row.answers] for row in rows])
        known["scores"] = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.scores) for row in rows], batch_first=True)
    for slot, side in enumerate(() if kind == RANK else NAMES.get(kind, ("",))):
        lengths = torch.tensor([len(row.answers[slot]) for row in rows])
        known[f"{side}mask"] = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    if references:
        known |= {f"ref_{name}": tensor for name, tensor in _padded(rows, references).items()}
    return known | {name: torch.tensor([row.numbers[name] for row in rows]) for name in columns}


def _padded(rows: Sequence[Row], logps: losses.References) -> dict[str, torch.Tensor]:
    """Return log-probabilities of tokens, [rows, tokens] for each answer, zero behind its end."""
    if rows[0].others:
        return {"logps": _stacked([[torch.from_numpy(np.asarray(line)) for line in logps[row.id]] for row in rows])}
    found = {}
    for slot, side in enumerate(NAMES.get("pair" if rows[0].rejected is not None else "", ("",))):
        lines = [torch.from_numpy(np.asarray(logps[row.id][slot])) for row in rows]
        found[f"{side}logps"] = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)
    return found


def _stacked(lines: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Return lines of several lengths as [rows, answers, tokens], zero where there is none."""
    shape = (len(lines), max(map(len, lines)), max(len(line) for row in lines for line in row))
    found = torch.zeros(shape, dtype=lines[0][0].dtype)
    for at, row in enumerate(lines):
        for place, line in enumerate(row):
            found[at, place, : len(line)] = line
    return found


def by_answer(
    logps: torch.Tensor, starts: torch.Tensor, known: Mapping[str, torch.Tensor], rows: str
) -> dict[str, torch.Tensor]:
    """Return log-probabilities of whole sequences as those of answers, each from its first token on: what a function is given."""
    if rows == RANK:
        return {"logps": _by_rank(logps, starts, known["mask"])}
    found, names = {}, NAMES.get(rows, ("",))
    for side, part, begins in zip(names, logps.chunk(len(names)), starts.chunk(len(names)), strict=True):
        mask = known[f"{side}mask"]
        found[f"{side}logps"] = _from(part, begins, mask.shape[1]).masked_fill(~mask, 0.0)
    return found


def _from(logps: torch.Tensor, begins: torch.Tensor, width: int) -> torch.Tensor:
    """Return so many log-probabilities of each sequence, from that of its answer's first token on."""
    places = begins[:, None] - 1 + torch.arange(width, device=logps.device)[None]
    return logps.gather(1, places.clamp(max=logps.shape[1] - 1))


def _by_rank(logps: torch.Tensor, starts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities of the answers of all rows, one after the other, as [rows, answers, tokens]."""
    places = mask.any(-1).nonzero(as_tuple=True)
    found = torch.zeros(mask.shape, dtype=logps.dtype, device=logps.device)
    return found.index_put(places, _from(logps, starts, mask.shape[2])).masked_fill(~mask, 0.0)
