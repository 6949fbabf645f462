"""Which tokens of a training row are learned, and which are masked: read, so that the others follow from them, and not learned.

Rows are encoded, refused and labelled by the code that the trainer's batches are made of (`backend/trainer/batches.py`), with the
tokenizer that lies beside the run's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from selfkd.backend.trainer import batches
from selfkd.report.as_prompted import pieces
from selfkd.report.history import History
from selfkd.report.origins import rows_of
from selfkd.steps.train import TrainStep

PAIR, RANK = "pair", "rank"
AGAINST = "rejected"  # the side whose tokens are made less likely


@dataclass(frozen=True)
class Update:
    """What an update did with a row: where it stands, its loss, the longest row that it takes, the tokens of a completion that it leaves out.

    `refused` is why it left the row out, as it was recorded; '' where it learned from it.
    """

    where: str
    loss: str
    limit: int
    skip: int = 0
    first: int = 0
    refused: str = ""


@dataclass(frozen=True)
class Side:
    """One sequence that goes through the model: the ids of a prompt and of an answer, and whether each is learned."""

    name: str
    ids: Sequence[int]
    learned: Sequence[bool]

    @property
    def count(self) -> int:
        return sum(self.learned)


@dataclass(frozen=True)
class Span:
    """A run of tokens that are all learned or all masked, and all control tokens or none."""

    text: str
    learned: bool
    control: bool


@dataclass(frozen=True)
class Learned:
    """A training row in tokens. `refused` says why it is not trained on, '' where it is; `teacher` is the prompt that a teacher reads."""

    id: str
    sides: Sequence[Side]
    teacher: Sequence[int] = ()
    refused: str = ""


def split(record: Mapping[str, Any], tok: Any, update: Update) -> Learned:
    """Return which tokens of a record of the `rows` table an update learns, each answer of it as a sequence of its own.

    A row is never cut: one that is too long is refused as a whole, and its tokens are then all masked.
    """
    row, reason = batches.read_row(tok, dict(record), record["kind"] == PAIR, update.limit)
    if row is None:
        return Learned(record["id"], (), refused=reason)
    if update.skip or update.first:
        row, short = batches.counted(row, update.skip, update.first)
        reason = reason or short
    refused = update.refused or reason
    sides = [
        Side(name, ids, [label != batches.MASKED and not refused for label in labels])
        for name, (ids, labels) in zip(_names(record), batches.labelled(row), strict=True)
    ]
    return Learned(row.id, sides, () if row.teacher is None else row.teacher.tolist(), refused)


def _names(record: Mapping[str, Any]) -> list[str]:
    if record["kind"] == PAIR:
        return ["chosen", AGAINST]
    answers = record["ranked"] or () if record["kind"] == RANK else ()
    return [f"answer {at + 1}" for at in range(len(answers))] or ["completion"]


def spans(tok: Any, side: Side) -> Iterator[Span]:
    """Yield what a sequence says, in runs that are learned or masked as a whole; together they are its text to the letter."""
    begin = 0
    for learned, run in groupby(side.learned):
        end = begin + len(list(run))
        for piece in pieces(tok, side.ids[:begin], side.ids[begin:end]):
            yield Span(piece.text, learned, piece.control)
        begin = end


def updates_of(history: History, index: int, ids: Sequence[str]) -> dict[str, list[Update]]:
    """Return {row: the updates of round `index` that were given it}, whether they learned from it or left it out."""
    found: dict[str, list[Update]] = {name: [] for name in ids}
    for commit in (one for one in history.commits if one.round == index):
        step = history.step(commit)
        if not isinstance(step, TrainStep):
            continue
        rows, refused = rows_of(history, commit, step)
        reasons = {**{row["id"]: "" for _, row in rows}, **refused}
        for name in (name for name in ids if name in reasons):
            found[name].append(_update(history, history.where(commit), step, reasons[name]))
    return found


def _update(history: History, where: str, step: TrainStep, refused: str) -> Update:
    how = step.divergence.spec() if step.divergence and step.kind.teacher else None
    limit = int(history.info.recipe["context"])
    return Update(where, step.loss, limit, how.skip if how else 0, how.first if how else 0, refused)


def no_update(history: History) -> Update:
    """Return what stands for an update where none was given a row yet: it is shown as plain training would learn it."""
    return Update("", "", int(history.info.recipe["context"]))
