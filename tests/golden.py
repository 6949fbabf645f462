"""A shipped recipe, walked with a scripted model, and what it asked and trained: the shared part of the tests in tests/recipes/.

Each of those tests derives by hand, from the paper, who is asked what, how it draws, which rows come of it and with which weights, and
what is trained from which model, against which reference, on which rounds' rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import Sampling, TrainSpec
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.backend.reading import Read
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.recipe.load import load

Says = Callable[
    [list[dict[str, str]], int], str
]  # what the model was shown; how often it was shown this before: what it writes


Likes = Callable[
    [int, str], float
]  # which weights, in the order in which they were first asked; an answer: its log-probability
Reads = Callable[[str, str], float]  # a text and a second one: what a model of others that only scores reads of them


@dataclass(frozen=True)
class Asked:
    """A table of requests that went to a model."""

    stream: str
    model: str  # the digest of its weights
    sampling: Sampling


@dataclass(frozen=True)
class Update:
    """A training: from which weights, against which, on which rows."""

    start: str
    reference: str | None
    rows: pl.DataFrame
    spec: TrainSpec


class Scripted(Fake):
    """A model that writes what a function says, and that notes what it is asked and how it is trained."""

    def __init__(self, says: Says, likes: Likes | None = None, reads: Reads | None = None) -> None:
        super().__init__({}, self.said)
        self.says, self.likes, self.reads = says, likes, reads
        self.met: dict[str, int] = {}  # which weights were asked, numbered
        self.shown: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self.updates: list[Update] = []

    def said(self, messages: list[dict[str, str]], seed: int, skill: float) -> str:
        shown = "\n".join(message["content"] for message in messages)
        self.shown[shown] += 1
        return self.says(messages, self.shown[shown] - 1)

    def generate(self, model, chunks, sampling, *listener):
        self.met.setdefault(model.digest, len(self.met))
        self.asked += [Asked(chunk.stream, model.digest, sampling) for chunk in chunks]
        return super().generate(model, chunks, sampling, *listener)

    def logprobs(self, model, rows, *listener):
        if self.likes is None:
            yield from super().logprobs(model, rows, *listener)
            return
        for row in rows.iter_rows(named=True):
            yield row["id"], self.likes(self.met.setdefault(model.digest, len(self.met)), row["text"]), len(row["text"])

    def read(self, model, reading, rows, *listener):
        if self.reads is None:
            yield from super().read(model, reading, rows, *listener)
            return
        for row in rows.iter_rows(named=True):
            yield Read(row["id"], (self.reads(row["text"], row["second"]),))

    def train(self, start, reference, rows, spec, out, *listener):
        frame = pl.concat([pl.read_parquet(path) for path in rows], how="diagonal_relaxed").sort("id")
        self.updates.append(Update(start.digest, reference and reference.digest, frame, spec))
        return super().train(start, reference, rows, spec, out, *listener)


@dataclass
class Golden:
    """A walked chain."""

    run: Run
    backend: Scripted
    rounds: int = field(init=False)

    def __post_init__(self) -> None:
        self.rounds = len(self.run.sealed()) - 1

    def weights(self, role: str = "policy") -> list[str]:
        """The digest of a role's weights after each round, the base's first."""
        return [seal.models[role].digest for seal in self.run.sealed() if role in seal.models]

    def metrics(self, index: int) -> Mapping[str, Any]:
        return self.run.sealed()[index].metrics

    def table(self, index: int, step: str, name: str) -> pl.DataFrame:
        """What a step of a round left in one of the tables `samples`, `scores`, `rows`, …"""
        return pl.concat([pl.read_parquet(self.run.folder / path) for path in self.run.made(index)[step].tables[name].files])

    def answers(self, index: int, stream: str = "sample") -> pl.DataFrame:
        """The samples of a stream in a round, with their scores."""
        return self.run.samples(index).filter(pl.col("stream") == stream)

    def pairs(self, index: int, step: str = "build") -> list[tuple[str, str]]:
        """Which answer wins against which in the rows that a step of a round built."""
        return sorted(self.table(index, step, "rows").select("chosen", "rejected").iter_rows())

    def pairings(self) -> list[tuple[str, str | None]]:
        """Of each update the weights that it starts from, and those that it is held against."""
        return [(update.start, update.reference) for update in self.backend.updates]

    def asked(self, stream: str) -> set[tuple[str, float, float]]:
        """Which weights were asked for a stream, with which temperature and top-p."""
        return {(one.model, one.sampling.temperature, one.sampling.top_p) for one in self.backend.asked if one.stream == stream}


def golden(
    name: str,
    says: Says,
    folder: Path,
    train: Sequence[Mapping[str, Any]],
    dev: Sequence[Mapping[str, Any]] = ({"prompt": "3 + 4", "answer": "7"},),
    overrides: Sequence[str] = (),
    likes: Likes | None = None,
    reads: Reads | None = None,
    **prompts: Any,
) -> Golden:
    """Walk the shipped recipe `name` on these prompts; `prompts` changes other words of its `prompts:`, such as `take`."""
    recipe = load(name, list(overrides))
    words = {"train": list(train), "dev": list(dev), **prompts}
    recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update=words)})
    backend = Scripted(says, likes, reads)
    run = Run.open(recipe, folder / "run", Machine(backend="fake"))
    walk(run, backend, run.begin())
    return Golden(run, backend)


def between(text: str, opening: str, closing: str) -> str:
    """What a template has put between two of its lines."""
    return text.split(f"{opening}\n", 1)[1].split(f"\n{closing}", 1)[0]


def optimisers(walked: Golden) -> list[tuple[bool, bool]]:
    """Of each update whether it leaves the state of its optimiser, and whether it goes on with that of an earlier one."""
    return [(update.spec.keeps_state, update.spec.state is not None) for update in walked.backend.updates]
