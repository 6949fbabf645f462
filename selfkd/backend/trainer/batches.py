"""Training rows as token ids, and which of them make up each optimiser step on each rank.

The order follows from the seed and the rows' ids, never from files, ranks or a library's random generator: two ranks see the
same global batches as one. Nothing is ever cut: a row that is too long is refused with its length. Knows neither TRL nor a model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from selfkd.backend import probe, tokens
from selfkd.core import digest
from selfkd.core.pool import shape
from selfkd.errors import GuardError, UsageError

MASKED = -100  # the label of a token that is not learned, as torch's losses have it
Ids = np.ndarray  # int32: a million rows of Python integers would not fit


@dataclass(frozen=True)
class Row:
    """One training row in token ids; `rejected` is None for plain SFT. `numbers` are its columns by name, its label among them.

    Of a ranking `chosen` is the best answer, `others` are the rest, and `scores` those of all of them. `teacher` is the prompt behind which
    a teacher reads the answer: of it the `first` tokens, 0 is all, and the first `skip` of these are not learned. `logprob` is what all
    tokens had under the model that sampled them.
    """

    id: str
    weight: float
    prompt: Ids
    chosen: Ids
    rejected: Ids | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    others: tuple[Ids, ...] = ()
    scores: tuple[float, ...] = ()
    teacher: Ids | None = None
    skip: int = 0
    first: int = 0
    logprob: float | None = None

    @property
    def answers(self) -> tuple[Ids, ...]:
        if self.first:
            return (self.chosen[: self.first],)
        return (self.chosen, *self.others) if self.rejected is None else (self.chosen, self.rejected)

    @property
    def learned(self) -> int:
        """Tokens that a loss is made of: those of the answers."""
        return sum(map(len, self.answers)) - self.skip

    @property
    def longest(self) -> int:
        told = 0 if self.teacher is None else len(self.teacher)
        return max(len(self.prompt), told) + max(map(len, self.answers))

    @property
    def tokens(self) -> int:
        """Positions that go through the model."""
        return len(self.answers) * len(self.prompt) + sum(map(len, self.answers))


def read_rows(tok: Any, paths: Sequence[Path], pairs: bool, max_length: int) -> tuple[list[Row], dict[str, str]]:
    """Return the rows to train on, and {row id: reason} of those refused. No row left is a GuardError, before any model is loaded."""
    rows: list[Row] = []
    drops: dict[str, str] = {}
    known: dict[str, Ids] = {}
    for path in paths:
        for record in shape("rows", pl.read_parquet(path)).iter_rows(named=True):
            row, reason = read_row(tok, record, pairs, max_length, known)
            if row is None or reason:
                drops[record["id"]] = reason
            else:
                rows.append(row)
    if not rows:
        raise GuardError(_none_left(drops, max_length), "train", "Look at the rows: selfkd show RUN --training-rows")
    return rows, drops


def read_row(
    tok: Any, record: dict[str, Any], pair: bool, max_length: int, known: dict[str, Ids] | None = None
) -> tuple[Row | None, str]:
    """Return a record of the `rows` table in token ids (None where it cannot be written in them), and why it is not trained on, or ''."""
    try:
        row = encode(tok, record, pair, known)
    except UsageError as error:  # it names a special token that cannot be written as text
        return None, error.what
    return row, _refused(row, max_length)


def encode(tok: Any, record: dict[str, Any], pair: bool, known: dict[str, Ids] | None = None) -> Row:
    """Encode one record of the `rows` table in the ids that the generator used; an empty completion stays empty.

    `known` keeps the ids of prompts: one that many rows share is encoded once.
    """
    prompt = _prompt(tok, record["messages"], {} if known is None else known)
    weight = 1.0 if record["weight"] is None else record["weight"]
    rejected = _completion(tok, record, "rejected") if pair else None
    ranked = record.get("ranked") or []
    others = tuple(_completion(tok, _as_chosen(record, answer), "chosen") for answer in ranked[1:])
    scores = tuple(answer["score"] for answer in ranked)
    row = Row(record["id"], weight, prompt, _completion(tok, record, "chosen"), rejected, _numbers(record), others, scores)
    told = record.get("teacher_messages")
    return row if told is None else _taught(tok, row, record, {} if known is None else known)


def _taught(tok: Any, row: Row, record: dict[str, Any], known: dict[str, Ids]) -> Row:
    """Return a row with its teacher's prompt; an end that the engine never drew has no part in what the sampler said."""
    drawn = record.get("chosen_ids") is not None and len(record["chosen_ids"]) == len(row.chosen)
    teacher = _prompt(tok, record["teacher_messages"], known)
    return replace(row, teacher=teacher, logprob=record.get("chosen_logprob") if drawn else None)


def _as_chosen(record: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Return a record with one of its ranked answers in the place of the chosen one."""
    return {**record, "chosen": answer["text"], "chosen_ids": answer["ids"], "chosen_ended": answer["ended"]}


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    label = {} if record.get("label") is None else {"label": record["label"]}
    return {**label, **{column["name"]: column["value"] for column in record.get("columns") or ()}}


def _prompt(tok: Any, messages: list[dict[str, Any]], known: dict[str, Ids]) -> Ids:
    name = repr(messages)
    if name not in known:
        known[name] = np.array(tokens.encode_prompt(tok, messages), np.int32)
    return known[name]


def _completion(tok: Any, record: dict[str, Any], side: str) -> Ids:
    text, sampled, ended = record[side], record[f"{side}_ids"], record[f"{side}_ended"]
    if record.get(f"{side}_mask") is not None:
        raise GuardError(
            f"row {record['id']} says which tokens to learn, and every token would be", "train", "Leave the mask out."
        )
    if not text and not sampled:
        return np.zeros(0, np.int32)
    ids = tokens.encode_completion(tok, text or "", sampled, ended is not False, messages=record["messages"])
    return np.array(ids, np.int32)


def _refused(row: Row, max_length: int) -> str:
    if not all(map(len, row.answers)):
        return "empty completion"
    if not row.weight > 0:
        return f"weight {row.weight:g} is not positive"
    if row.longest > max_length:
        told = row.teacher is not None and len(row.teacher) > len(row.prompt)
        return f"{row.longest} tokens{' with the prompt of its teacher' if told else ''}, limit {max_length}"
    return ""


def _none_left(drops: dict[str, str], max_length: int) -> str:
    if not drops:
        return "there are no rows to train on"
    reasons = list(drops.values())
    counts = {"empty": reasons.count("empty completion"), "without weight": sum("weight" in reason for reason in reasons)}
    counts["not writable in this tokenizer"] = reasons.count(tokens.UNWRITABLE)
    counts["refused by the chat template"] = sum(reason.startswith(tokens.REFUSED) for reason in reasons)
    counts[f"longer than {max_length} tokens"] = len(reasons) - sum(counts.values())
    listed = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"all {len(drops)} rows were refused: {listed}"


def counted(row: Row, skip: int, first: int) -> tuple[Row, str]:
    """Return a row of which the completion's tokens from `skip` on are learned, and those behind `first` are not read (0: all are).

    Beside it why it is not trained on, or ''. What all tokens had under who sampled them is known of no part of them.
    """
    short = f"{len(row.chosen)} tokens, and the first {skip} do not count" if len(row.chosen) <= skip else ""
    whole = not skip and len(row.chosen) <= (first or np.inf)
    return replace(row, skip=skip, first=first, logprob=row.logprob if whole else None), short


def labelled(row: Row) -> list[tuple[list[int], list[int]]]:
    """Return each sequence that goes through the model, a prompt and an answer, with its labels: MASKED where nothing is learned."""
    prompt = row.prompt.tolist()
    masked = [MASKED] * (len(prompt) + row.skip)
    return [(prompt + answer.tolist(), masked + answer.tolist()[row.skip :]) for answer in row.answers]


@dataclass(frozen=True)
class Share:
    """A global batch of `rows`, divided over `ranks` ranks into `accumulation` micro-batches of `micro` rows on each."""

    rows: int
    ranks: int
    accumulation: int
    micro: int


def share(batch: int, accumulation: int, ranks: int) -> Share:
    """Divide the GLOBAL batch, `per_device_train_batch_size` x `gradient_accumulation_steps`, so that ranks change no number.

    Only the product counts: a rank computes at most `batch` rows at once, and where they do not come out even some micro-batches have
    a row less. A batch or an accumulation that divides is divided alone, as it always was: other micro-batches add up otherwise.
    """
    rows = batch * accumulation
    if rows < ranks:
        what = f"an optimiser step has {batch} x {accumulation} = {rows} rows, and {ranks} ranks are to share them"
        fix = f"Train on at most {rows} ranks (`trainers` in the machine file); a larger batch is another recipe."
        raise UsageError(what, "trl.per_device_train_batch_size", fix)
    if batch % ranks == 0:
        return Share(rows, ranks, accumulation, batch // ranks)
    if accumulation % ranks == 0:
        return Share(rows, ranks, accumulation // ranks, batch)
    turns = math.ceil(rows / (ranks * batch))
    return Share(rows, ranks, turns, math.ceil(rows / (ranks * turns)))


PADDED_TOKENS = 256
FLAT_TOKENS = 1024


def finer(split: Share, rows: Sequence[Row], fewest: int) -> Share:
    """Cut the same steps into micro-batches of at least `fewest` tokens: for CPUs, where larger ones gain nothing.

    Rows of like length then lie together, so less padding is computed (PADDED_TOKENS), and less memory is held. Where nothing is padded,
    each micro-batch costs a pass over all gradients and gains no tokens: they are larger there (FLAT_TOKENS).
    """
    return cut(split, sum(row.tokens for row in rows) / len(rows), fewest)


def cut(split: Share, mean: float, fewest: int) -> Share:
    """Cut steps of rows of so many tokens in the mean into the smallest micro-batches that have at least `fewest`."""
    for micro in range(1, split.micro):
        if split.micro % micro == 0 and micro * mean >= fewest:
            return replace(split, accumulation=split.accumulation * split.micro // micro, micro=micro)
    return split


def plan(rows: Sequence[Row], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the global batches of one epoch as row numbers: each row once, in an order hashed from seed, epoch and row id.

    Within a batch the longest rows come first, so that micro-batches hold rows of like length. Batches stay a random draw:
    grouping the whole set by length would tie what is learned together to how long it is.
    """
    order = ordered([row.id for row in rows], seed, epoch)
    cuts = [order[at : at + size] for at in range(0, len(order), size)]
    return [sorted(batch, key=lambda i: (-rows[i].longest, rows[i].id)) for batch in cuts]


def ordered(ids: Sequence[str], seed: int, epoch: int) -> list[int]:
    """Return the places of rows in the order in which an epoch takes them."""
    return sorted(range(len(ids)), key=lambda i: digest.of("order", seed, epoch, ids[i]))


def micro_batches(batch: list[int], split: Share) -> list[list[int]]:
    """Cut a global batch into `ranks` x `accumulation` runs of nearly equal size; micro-batch m of rank r is m * ranks + r."""
    parts = split.ranks * split.accumulation
    return [[int(i) for i in part] for part in np.array_split(np.array(batch, int), parts)]


def strangers(rows: Sequence[Row], batch: Sequence[int]) -> dict[int, int]:
    """Return {row of a step: the row before it in the step that has another prompt}; in a step of one prompt, the one before it of all rows.

    GuardError where all rows have one prompt.
    """
    found: dict[int, int] = {}
    for place, i in enumerate(batch):
        mine = rows[i].prompt.tobytes()
        before = chain(reversed(batch[:place]), reversed(batch[place + 1 :]), range(i - 1, -1, -1), range(len(rows) - 1, i, -1))
        other = next((j for j in before if rows[j].prompt.tobytes() != mine), None)
        if other is None:
            what = "the loss compares a prompt's answer with answers to other prompts, and all rows have one prompt"
            raise GuardError(what, "train", "Train on rows of two prompts or more.")
        found[i] = other
    return found


class Feed:
    """What the trainer iterates over: this rank's micro-batches, collated, one epoch per iteration.

    A micro-batch carries `scale` where TRL's plain mean would be wrong: rows of unequal weight, or pairs that do not divide
    evenly. A last step with fewer rows has fewer micro-batches. A rank without rows in one that others have rows in gets the first
    tokens of a row, of scale 0, so that all ranks take part in every exchange. With `average` ("rows" or "tokens") the loss is a value per
    row instead, every row has its share of the step's average, and such a rank gets a whole row: a loss of one's own may be no number for a
    part of one. `strange`: a row comes with a stranger, whose answer was given to another prompt.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        split: Share,
        seed: int,
        rank: int,
        collate: Callable[[list[dict[str, Any]]], Any],
        average: str = "",
        strange: bool = False,
    ):
        self.dataset, self.split, self.seed, self.rank, self.collate, self.epoch = rows, split, seed, rank, collate, 0
        self.weighted = len({row.weight for row in rows}) > 1
        self.skipped, self.average, self.strange = 0, average, strange

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.split.rows)
        return whole * self.split.accumulation + self._turns(rest)

    def _turns(self, rows: int) -> int:
        """Return how many micro-batches a step of so many rows has on each rank: no more than one of them has rows for."""
        whole = rows == self.split.rows  # the trainer counts on as many in each of these
        return self.split.accumulation if whole else min(self.split.accumulation, -(-rows // self.split.ranks))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def after(self, count: int) -> Feed:
        """Return what is left of one epoch behind so many micro-batches, whole steps of them, without making those."""
        rest = copy.copy(self)
        rest.skipped = count // self.split.accumulation
        return rest

    def steps(self, epoch: int) -> list[list[int]]:
        return plan(self.dataset, self.split.rows, self.seed, epoch)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.steps(self.epoch)[self.skipped :]:
            parts = micro_batches(batch, self.split)
            factors = self._factors(batch, parts)
            for part in parts[self.rank :: self.split.ranks][: self._turns(len(batch))]:
                yield self.collate(self._records(part, batch, max(map(len, parts)), factors))

    def _factors(self, batch: list[int], parts: list[list[int]]) -> dict[int, float] | None:
        """Return what each row's loss is multiplied with, so that the optimiser sees the weighted mean over the whole step."""
        rows = [self.dataset[i] for i in batch]
        if self.average:
            ratio = len(parts) / sum(row.weight * (row.learned if self.average == "tokens" else 1) for row in rows)
        elif rows[0].rejected is None:
            if not self.weighted:
                return None
            ratio = sum(len(row.chosen) for row in rows) / sum(row.weight * len(row.chosen) for row in rows)
        else:
            if not self.weighted and len({len(part) for part in parts}) == 1:
                return None
            ratio = len(parts) / sum(row.weight for row in rows)
        return {i: row.weight * ratio for i, row in zip(batch, rows, strict=True)}

    def _records(self, part: list[int], batch: list[int], width: int, factors: dict[int, float] | None) -> list[dict[str, Any]]:
        shortest = self.dataset[batch[-1]]
        if self.average:
            assert factors is not None
            found = [{"row": self.dataset[i], "scale": factors[i]} for i in part] or [{"row": shortest, "scale": 0.0}]
            others = strangers(self.dataset, batch) if self.strange else {}
            return [
                {**one, **({"stranger": self.dataset[others[i]]} if others else {})}
                for one, i in zip(found, part or batch[-1:])
            ]
        found = [collator_record(self.dataset[i], 1.0 if factors is None else factors[i], factors is not None) for i in part]
        pairs = self.dataset[batch[0]].rejected is not None
        missing = width - len(part) if pairs else int(not part)  # pairs are scored one by one: as often on every rank
        shortest = self.dataset[batch[-1]]
        filling = shortest if part or self.average else begun(shortest)
        return found + [collator_record(filling, 0.0, factors is not None)] * missing


def begun(row: Row) -> Row:
    """Return the first tokens of a row: what a rank computes that has none."""
    return replace(
        row, prompt=row.prompt[:1], chosen=row.chosen[:1], rejected=None if row.rejected is None else row.rejected[:1]
    )


def collator_record(row: Row, scale: float, scaled: bool) -> dict[str, Any]:
    """Make of a row what TRL's collators take. An SFT row of scale 0 has no token to learn."""
    if row.rejected is None:
        ids, labels = labelled(row)[0]
        fields: dict[str, Any] = {"input_ids": ids, "labels": labels if scale else [MASKED] * len(ids)}
    else:
        sides = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
        fields = {f"{name}_ids": side.tolist() for name, side in sides.items()}
    return {**fields, "id": row.id, **({"scale": scale} if scaled else {})}


def sequences(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Yield every prompt with its chosen answer, for the probe."""
    return (list(chain(row.prompt.tolist(), row.chosen.tolist())) for row in rows)


def candidates(start: str, paths: Sequence[Path], pairs: bool, max_length: int) -> list[list[int]]:
    """Return the sequences of which an update of the model folder `start` on these rows will keep some as its probe.

    For an engine that is about to sleep: what it scores on them now shows afterwards how far a swap moved it.
    """
    tok = tokens.tokenizer(start)
    return probe.candidate_sequences(tok, sequences(read_rows(tok, paths, pairs, max_length)[0]))
