"""Asking checkpoints of a run the same thing, outside its chain: nothing is committed, and nothing in the run's folder is written.

Every model is asked in the same way, with the same seed, by an engine of this process; its weights are hashed before they answer.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from selfkd.backend.base import REQUESTS, Backend, Chunk, Sampling
from selfkd.backend.choose import open_backend
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import UsageError

STREAM = "chat"
FAKE = "fake"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a model wrote: its `name` as it was asked for, its own, and why it ended; `length` where it was cut at the limit."""

    name: str
    model: str
    text: str
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Talk:
    """Checkpoints by the names they were asked for, and who computes their answers."""

    run: Run
    models: Mapping[str, Model]
    backend: Backend
    place: Path

    def ask(self, said: Mapping[str, Messages], sampling: Sampling, seed: int) -> Iterator[Answer]:
        """Yield the answer of each model to its conversation, in their order. UsageError for one that the context does not hold."""
        for name, model in self.models.items():
            key = digest.of(STREAM, model.digest, said[name], seed)
            request = {"id": key[:16], "prompt": key[:16], "number": 0, "parents": [], "seed": seed, "tiebreak": 0.0}
            requests = pl.DataFrame([{**request, "teacher_messages": said[name]}], schema=REQUESTS)
            chunk = Chunk(key, STREAM, requests, self.place, self.place)
            for reply in self.backend.generate(self.run.trust.weights(model), [chunk], sampling):
                row = pl.read_parquet(reply.path).row(0, named=True)
                yield Answer(name, str(model), row["text"], row["finish_reason"], row["tokens"])


@contextmanager
def talking(run: Run, names: Sequence[str], machine: Machine | None = None) -> Iterator[Talk]:
    """Open a talk with checkpoints: `base`, `now`, `best`, a number for a round, or role@when. ChainError for one that is not there."""
    models = {name: run.named(_reference(name)) for name in names}
    for name in names:
        run.model(_reference(name))  # refused now, and not behind the first question
    where = _where(run, machine)
    with (
        tempfile.TemporaryDirectory(prefix="selfkd-chat-") as place,
        closing(open_backend(where, fixed_numerics(where), Path(place))) as backend,
    ):
        yield Talk(run, models, backend, Path(place))


def _reference(name: str) -> str:
    """Return a checkpoint as `role@when`: 3 is what round 3 left."""
    role, at, when = name.rpartition("@")
    if not when:
        raise UsageError(f"'{name}' names no checkpoint", "--rounds", "Write base, now, best, a number, or role@when.")
    return f"{role if at else 'policy'}@{f'round-{when}' if re.fullmatch('[0-9]+', when) else when}"


def _where(run: Run, machine: Machine | None) -> Machine:
    """Return the machine that answers: this process, in the number format of the run; with transformers, which starts at once, unless one is named."""
    if run.machine.backend == FAKE:
        return run.machine
    alone = {"backend": "local", "generators": 1, "trainers": 1, "shard": False, "dtype": run.numerics["dtype"]}
    given = machine or Machine(generator="transformers")
    return replace(given, **{**alone, "max_model_len": run.recipe.context})
