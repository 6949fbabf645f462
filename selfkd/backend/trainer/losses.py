"""TRL's SFTTrainer and DPOTrainer on rows that are already token ids, guarded, with the same result on any number of ranks.

The losses are TRL's own, looked at through the model's outputs: what they read is scaled or sliced where a plain mean over a
micro-batch would be wrong. Knows neither files nor folders.
"""

# TRL has no types.
# mypy: allow-subclassing-any
from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import trl.trainer.dpo_trainer
import trl.trainer.utils
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import DPOTrainer, SFTTrainer

from selfkd.backend.base import OnSteps, TrainProgress, TrainSpec, nobody_listens
from selfkd.backend.trainer import cpu_head, flat, sharded
from selfkd.backend.trainer.agreement import Agreement
from selfkd.backend.trainer.batches import Feed, Ids, Row, Share, collator_record
from selfkd.backend.trainer.checkpoint import LOWER_THE_STEP
from selfkd.backend.trainer.offload import offload
from selfkd.backend.trainer.resume import Resumption
from selfkd.backend.trainer.together import gathered
from selfkd.errors import GuardError, UsageError

# On devices without Triton, TRL projects every position onto the vocabulary, prompts and padding included, to spare compilers a
# changing shape. On CPU that was half of the time: SmolLM2-135M, SFT, bf16, one thread: 79 tokens/s, without it 150.
HAS_TRITON = trl.trainer.utils._use_triton
trl.trainer.utils._use_triton = lambda device: device.type == "cpu" or HAS_TRITON(device)
cpu_head.install()
# TRL hashes the whole model (0.5 s for 135M parameters) to name a cache of reference log-probabilities that is never made here.
trl.trainer.dpo_trainer.hash_module = lambda module: ""

# Tokens of a forward pass without gradients: on a CPU larger ones gain nothing, a card wants them.
REFERENCE_TOKENS = {"cpu": 2048, "cuda": 16384}
UNKNOWN = torch.tensor(math.nan)  # entropy and accuracy, which TRL would log and nobody here reads: four passes over all logits
UNSPLITTABLE = {"aot", "aot_unpaired"}  # loss types that sort a batch before they compare
# {row id: log-probabilities of its answers under the reference model}: sums for a loss of TRL, per token for one that is a function,
# which may also have {(row id, id of a stranger): the log-probability of that one's answer behind this one's prompt}
References = Mapping[Any, tuple[Any, ...]]
Sides = Sequence[tuple[Ids, Ids]]  # (prompt, completion)


Score = TypeVar("Score")  # of a completion: a sum, or a value per token


class _Stepwise:
    """What all trainers share: our batches instead of a data loader's, a stop at the first number that is not finite, our checkpoints."""

    logps_slot = "log_probs"  # which of a model's outputs has the log-probability of each token
    average = ""  # over what the values of rows are averaged, where a loss is a value per row
    strange = False  # whether rows come with answers to other prompts

    def __init__(
        self,
        spec: TrainSpec,
        rows: Sequence[Row],
        split: Share,
        references: References,
        is_flat: bool,
        resumption: Resumption,
        offloads: bool,
        agreement: Agreement | None = None,
        **more: Any,
    ) -> None:
        self.agreement = agreement
        self.resumption, self.offloads = resumption, offloads
        self.rows, self.split, self.order_seed, self.latest = rows, split, spec.seed, math.nan
        self.nll, self.reference_of, self.is_flat = spec.nll, references, is_flat
        first = {name: [value] for name, value in self._first_record(rows[0]).items()}
        super().__init__(train_dataset=Dataset.from_dict(first), **more)  # type: ignore[call-arg]
        self.remove_callback(PrinterCallback)  # type: ignore[attr-defined]
        self.add_callback(resumption)  # type: ignore[attr-defined]
        self.shard = sharded.is_sharded(self.model)  # type: ignore[attr-defined]
        if self.shard:
            self.model._is_accelerate_prepared = True  # type: ignore[attr-defined]  # else Accelerate would wrap it in DDP
        if handler := self.accelerator.ddp_handler:  # type: ignore[attr-defined]
            handler.gradient_as_bucket_view = True  # else what ranks exchange is a second copy of all gradients

    @staticmethod
    def _first_record(row: Row) -> dict[str, Any]:
        """Return what TRL is shown of the rows."""
        return collator_record(row, 1.0, False)

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def get_train_dataloader(self) -> Feed:
        rank = self.accelerator.process_index  # type: ignore[attr-defined]
        return Feed(self.rows, self.split, self.order_seed, rank, self._collate, self.average, self.strange)

    def create_optimizer(self, *arguments: Any) -> Any:
        made = self.optimizer is None  # type: ignore[has-type]
        self.optimizer = super().create_optimizer(*arguments)  # type: ignore[misc]
        return offload(self.optimizer) if self.offloads and made else self.optimizer

    # ---- called by transformers where it goes on from a checkpoint, which is ours and not in its form ----

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """The weights come with the optimiser's state, once both lie where they belong."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._settle_buckets()
            self.resumption.put_back(self)

    def _settle_buckets(self) -> None:
        """Have ranks lay out what they exchange as they did behind their first step: three and more add up in the order in which it lies.

        torch does so once it has seen the gradients of a step; here of one that is thrown away, before anything is put back.
        """
        model = self.model_wrapped  # type: ignore[attr-defined]
        if self.split.ranks > 2 and isinstance(model, torch.nn.parallel.DistributedDataParallel):
            feed = self.get_train_dataloader()
            inputs, items = self.get_batch_samples(iter(feed), 1, self.args.device)  # type: ignore[attr-defined]
            self.training_step(model, inputs[0], items)
            model.zero_grad()
            self._metrics["train"].clear()  # type: ignore[attr-defined]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.resumption.put_back_random_numbers()

    def _collate(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.data_collator(records)  # type: ignore[attr-defined]
        if "scale" in records[0]:
            batch["scale"] = torch.tensor([entry["scale"] for entry in records])
        return batch

    def _outputs(self, model: Any, **arguments: Any) -> Any:
        """Return what the model gives for a padded batch, through it without padding where it can be fed so."""
        with self._autocast():
            outputs = flat.forward(model, **arguments) if self.is_flat else model(**arguments)
        if self.agreement and self.agreement.known and not self.state.global_step:  # type: ignore[attr-defined]
            self.agreement.hear(arguments, getattr(outputs, self.logps_slot))
        return outputs

    def _autocast(self) -> Any:
        """Compute in bf16 where that is asked and Accelerate, which prepared nothing of a divided model, does not see to it."""
        asked = self.shard and self.args.bf16  # type: ignore[attr-defined]
        return torch.autocast(self.args.device.type, torch.bfloat16) if asked else contextlib.nullcontext()  # type: ignore[attr-defined]

    def training_step(self, *arguments: Any, **more: Any) -> Any:
        # A last step with fewer rows has fewer micro-batches, and their factors are those of a whole one.
        self.current_gradient_accumulation_steps = self.split.accumulation
        loss = super().training_step(*arguments, **more)  # type: ignore[misc]
        self.latest = loss.detach()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Called on every rank before each optimiser step, with gradients already summed over ranks: all stop together."""
        norm = sharded.number(super()._get_grad_norm(model, grad_norm=grad_norm))  # type: ignore[misc]
        if not math.isfinite(norm):
            raise not_finite(self.state.global_step + 1, f"the gradient norm is {norm}, the loss {float(self.latest)}")  # type: ignore[attr-defined]
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        loss = logs.get("loss", 0.0)
        if not math.isfinite(loss):
            raise not_finite(self.state.global_step, f"the loss is {loss}")  # type: ignore[attr-defined]
        if self.agreement and self.agreement.known and self.state.global_step == 1:  # type: ignore[attr-defined]
            logs = {**logs, **self.agreement.logged(self.split.ranks)}
        super().log(logs, start_time)  # type: ignore[misc]


def not_finite(step: int, what: str) -> GuardError:
    return GuardError(f"at optimiser step {step} {what}", "train", LOWER_THE_STEP)


class Supervised(_Stepwise, SFTTrainer):
    """Negative log-likelihood of the completions, per token over the whole global batch; `scale` weighs rows within it."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        # TRL's loss divides by the tokens of the whole step, whatever the model's signature
        self.model_accepts_loss_kwargs = True
        del self.model.forward
        trl.trainer.utils.add_fused_lm_head(self.model)  # log-probabilities and nothing more: see UNKNOWN

    @staticmethod
    def settings(spec: TrainSpec) -> dict[str, Any]:
        """Return the fields of TRL's config that selfkd decides for this trainer."""
        return {"dataset_kwargs": {"skip_prepare_dataset": True}, "padding_free": False}  # batches are flattened in `flat`

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        scale = inputs.pop("scale", None)

        def through(**arguments: Any) -> Any:
            outputs = self._outputs(model, **arguments)
            outputs.entropy = outputs.is_top1 = UNKNOWN.to(outputs.log_probs.device)
            if scale is not None:
                outputs.log_probs = outputs.log_probs * scale[:, None]
            return outputs

        return super().compute_loss(through, inputs, return_outputs, num_items_in_batch)


class Preference(_Stepwise, DPOTrainer):
    """A preference loss of TRL against reference log-probabilities that come with the rows; `nll` adds IRPO's second term."""

    @staticmethod
    def references(model: Any, plan: Any, is_flat: bool) -> References:
        """Return the log-probabilities of the answers of all rows of an update's plan, summed."""
        sides = [(row.prompt, side) for row in plan.rows for side in row.answers]
        values = completion_logprobs(model, sides, plan.bf16, is_flat, plan.rank, plan.split.ranks)
        return {row.id: (values[2 * i], values[2 * i + 1]) for i, row in enumerate(plan.rows)}

    @staticmethod
    def settings(spec: TrainSpec) -> dict[str, Any]:
        """Return the fields of TRL's config that selfkd decides for this trainer."""
        return {"beta": spec.beta, "precompute_ref_log_probs": True}

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _collate(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        for entry in records:
            entry["ref_chosen_logps"], entry["ref_rejected_logps"] = self.reference_of[entry["id"]]
        return super()._collate(records)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> torch.Tensor:
        """Return TRL's loss of a micro-batch, or with `scale` the scaled sum of TRL's losses of its pairs, from one forward pass."""
        scale = inputs.pop("scale", None)
        pairs = len(inputs["ref_chosen_logps"])
        mask = inputs["completion_mask"]
        arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        arguments["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
        outputs = self._outputs(model, **arguments, fused_lm_head=True)
        nll = self._length_normalised(outputs.log_probs[:pairs], mask[:pairs, 1:])
        if scale is None:
            loss = super()._compute_loss(lambda **_: outputs, inputs, False)
            return loss + self.nll * nll.mean() if self.nll else loss
        losses = torch.stack([self._loss_of_pair(at, pairs, outputs, inputs) for at in range(pairs)])
        return (scale * (losses + self.nll * nll)).sum()

    def _loss_of_pair(self, at: int, pairs: int, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Return TRL's loss of pair `at` of a micro-batch, which has been through the model already."""
        its_outputs = type(outputs)(**_cut(outputs, at, pairs))
        return super()._compute_loss(lambda **_: its_outputs, _cut(inputs, at, pairs), False)

    def _length_normalised(self, log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return -log p(y|x) / |y| of each chosen answer (Pang et al. 2024, arXiv 2404.19733, eq. 1).

        TRL's own loss type `sft` is the mean over all chosen tokens of a micro-batch instead: long answers weigh more there.
        """
        values = -log_probs.sum(1) / mask.sum(1).clamp(min=1)
        if self.nll:
            self._metrics["train"]["nll/chosen"].append(self.accelerator.gather(values.detach()).mean().item())
        return values


def _cut(fields: Mapping[str, Any], at: int, pairs: int) -> dict[str, Any]:
    """Return pair `at` alone. A tensor of `2 * pairs` sequences holds the chosen ones first, then the rejected ones."""

    def of_pair(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.ndim:
            return value
        return value[[at, pairs + at]] if len(value) == 2 * pairs else value[at : at + 1]

    return {name: of_pair(value) for name, value in fields.items()}


class StepReporter(TrainerCallback):
    """Calls `on_progress` after each optimiser step; `seconds` is the time from the start of the first to the end of the last.

    `before` are the seconds that the steps before a checkpoint took.
    """

    def __init__(self, on_progress: OnSteps = nobody_listens) -> None:
        self.on_progress, self.started, self.before, self.seconds = on_progress, 0.0, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.started or time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.seconds = self.before + time.perf_counter() - self.started
        self.on_progress(
            TrainProgress(
                step=state.global_step,
                steps=state.max_steps,
                loss=logs["loss"],
                tokens=int(logs["num_tokens"]),
                seconds=self.seconds,
            )
        )


def completion_logprobs(
    model: Any, pairs: Sides, bf16: bool, is_flat: bool = False, rank: int = 0, ranks: int = 1
) -> list[float]:
    """Return the sum of log p(completion | prompt) of each (prompt, completion), computed as TRL's losses do; dropout is off."""
    return _scored(model, pairs, lambda few: _sums(model, few, bf16, is_flat), is_flat, (rank, ranks))


def token_logprobs(
    model: Any, pairs: Sides, bf16: bool, is_flat: bool = False, rank: int = 0, ranks: int = 1
) -> list[np.ndarray]:
    """Return the log-probability of each token of each completion, as `completion_logprobs` adds them up."""
    return _scored(model, pairs, lambda few: _tokens(model, few, bf16, is_flat), is_flat, (rank, ranks))


def _scored(
    model: Any, pairs: Sides, score: Callable[[Sides], list[Score]], is_flat: bool, place: tuple[int, int]
) -> list[Score]:
    """Return the score of each (prompt, completion); `place` is this rank, and how many there are.

    Equal ones are computed once. Batches are cut from the list sorted by length, whoever computes them: the numbers do not depend on
    the number of ranks. The model is as before afterwards. Ranks that hold it together go through it equally often.
    """
    names = [(prompt.tobytes(), completion.tobytes()) for prompt, completion in pairs]
    distinct = list(dict(zip(names, pairs, strict=True)).values())
    cuts = _cut_by_tokens([len(prompt) + len(completion) for prompt, completion in distinct], _most_tokens(model), is_flat)
    found: dict[int, Score] = {}
    training, (rank, ranks) = model.training, place
    model.eval()
    trl.trainer.utils.add_fused_lm_head(model)
    try:
        mine = cuts[rank::ranks]
        idle = len(cuts[::ranks]) - len(mine) if sharded.is_sharded(model) else 0
        for cut in mine + cuts[:1] * idle:
            found.update(zip(cut, score([distinct[i] for i in cut]), strict=True))
    finally:
        del model.forward  # the class's own forward shows again
        sharded.rest(model)
        model.train(training)
    for part in gathered(found, ranks):
        found.update(part)
    by_name = {(prompt.tobytes(), completion.tobytes()): found[i] for i, (prompt, completion) in enumerate(distinct)}
    return [by_name[name] for name in names]


def _most_tokens(model: Any) -> int:
    return REFERENCE_TOKENS.get(next(model.parameters()).device.type, REFERENCE_TOKENS["cuda"])


def _cut_by_tokens(lengths: Sequence[int], most: int, is_flat: bool) -> list[list[int]]:
    """Cut rows, shortest first, into batches of at most `most` tokens, padding included where there is some; a longer row goes alone."""
    cuts: list[list[int]] = []
    size = 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        size = size + lengths[i] if is_flat else lengths[i] * (len(cuts[-1]) + 1 if cuts else 1)
        if not cuts or size > most:
            cuts.append([])
            size = lengths[i]
        cuts[-1].append(i)
    return cuts


def _sums(model: Any, pairs: Sides, bf16: bool, is_flat: bool) -> list[float]:
    sums: list[float] = _label_logprobs(model, pairs, bf16, is_flat).sum(1).tolist()
    return sums


def _tokens(model: Any, pairs: Sides, bf16: bool, is_flat: bool) -> list[np.ndarray]:
    table = _label_logprobs(model, pairs, bf16, is_flat).cpu().numpy()
    starts = [len(prompt) - 1 for prompt, _ in pairs]
    return [line[start : start + len(one)].copy() for line, start, (_, one) in zip(table, starts, pairs, strict=True)]


def _label_logprobs(model: Any, pairs: Sides, bf16: bool, is_flat: bool) -> torch.Tensor:
    device = next(model.parameters()).device
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids, labels = torch.zeros((len(pairs), width), dtype=torch.long), torch.full((len(pairs), width), -100)
    mask = torch.zeros_like(ids)
    for at, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[at, :end] = torch.tensor([*prompt.tolist(), *completion.tolist()])
        labels[at, len(prompt) : end] = ids[at, len(prompt) : end]
        mask[at, :end] = 1
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if is_flat:
            outputs = flat.forward(model, **batch)
        else:  # padded on the right, and nothing is read there: without a mask attention is quicker
            outputs = model(input_ids=batch["input_ids"], labels=batch["labels"], fused_lm_head=True)
    found: torch.Tensor = outputs.log_probs.float()
    return found


def refuse_unsplittable(rows: Sequence[Row], split: Share, loss_types: Sequence[str]) -> None:
    """Raise UsageError for loss types that are not a mean over rows: they honour no weights, and some need their batch whole."""
    weighted = len({row.weight for row in rows}) > 1
    odd = sorted(({"dft"} | UNSPLITTABLE) & set(loss_types))
    if odd and weighted:
        raise UsageError(
            f"loss_type {odd[0]} cannot honour rows of unequal weight", "trl.loss_type", "Leave out `weight` in `build`."
        )
    if UNSPLITTABLE & set(odd) and split.ranks * split.accumulation > 1:
        fix = "Use one rank and trl.gradient_accumulation_steps: 1."
        raise UsageError(f"loss_type {odd[0]} sorts a whole batch, which must not be split", "trl.loss_type", fix)
