"""Readers as Ray actors: each sits where a rank sits, whose card is idle while nothing is trained, and is gone when all is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import AnswerProgress, OnAnswers
from selfkd.backend.engine.held_engine import Importable, redirect, resolve, traced
from selfkd.backend.ray.cluster import FETCH_SECONDS, POLL_SECONDS, actor_class, in_one_line, unwrapped
from selfkd.backend.ray.placement import Placement, Seat
from selfkd.backend.reading import Read, Reading
from selfkd.core.facts import Facts
from selfkd.core.pool import Model
from selfkd.errors import BackendError, SelfkdError

MOST_LOST = 2  # readers lost to one part of the texts stop the run: it is the part, or the memory


class ReaderActor:
    """A process that opens one model at its first call and reads with it."""

    def __init__(self, target: Importable, numerics: Mapping[str, Any], model: Model, reading: Reading, log: Path) -> None:
        redirect(log)
        self._make, self._log = (target, dict(numerics), model, reading), log
        self._reader: Any = None

    def read(self, rows: pl.DataFrame) -> tuple[list[Read], Facts]:
        with traced(self._log):
            if self._reader is None:
                target, *arguments = self._make
                self._reader = resolve(target)(*arguments)
            return self._reader.read(rows), self._reader.facts


@dataclass
class Part:
    """A part of the texts, its number, and why each reader was lost that worked on it."""

    number: int
    rows: pl.DataFrame
    losses: list[str] = field(default_factory=list)


@dataclass
class Readers:
    """The readers of one call. `facts`: what each computes with, by name. Call `close` whatever happens."""

    target: Importable
    numerics: Mapping[str, Any]
    model: Model
    reading: Reading
    placement: Placement
    log: Path
    facts: dict[str, Facts] = field(default_factory=dict)
    _idle: list[tuple[Seat, Any]] = field(default_factory=list)
    _busy: dict[Any, tuple[Part, Seat, Any]] = field(default_factory=dict)

    def read(self, parts: Sequence[pl.DataFrame], on_progress: OnAnswers) -> Iterator[Read]:
        """Yield what is read, in the order of the parts; a reader that dies is replaced, and its part is read again."""
        waiting = deque(Part(number, rows) for number, rows in enumerate(parts))
        seats = list(self.placement.planned.ranks[: len(parts)])
        self._idle = [(seat, self._start(seat)) for seat in seats]
        ready: dict[int, list[Read]] = {}
        told = 0
        while told < len(parts):
            while waiting and self._idle:
                self._send(waiting.popleft())
            waiting.extendleft(reversed(self._collected(ready)))
            while told in ready:
                yield from ready.pop(told)
                told += 1
            on_progress(AnswerProgress(requests=0, tokens=0, chunks=told + len(ready), waiting=len(waiting)))

    def _start(self, seat: Seat) -> Any:
        number = self.placement.planned.ranks.index(seat)
        kind = actor_class(ReaderActor, **self.placement.options(seat))
        return kind.remote(self.target, self.numerics, self.model, self.reading, self.log / f"reader-{number}.log")

    def _send(self, part: Part) -> None:
        seat, actor = self._idle.pop()
        self._busy[actor.read.remote(part.rows)] = (part, seat, actor)

    def _collected(self, ready: dict[int, list[Read]]) -> list[Part]:
        """Put what was read into `ready`; return the parts that are to be read again."""
        import ray

        done, _ = ray.wait(list(self._busy), num_returns=1, timeout=POLL_SECONDS)
        again = []
        for call in done:
            part, seat, actor = self._busy.pop(call)
            try:
                ready[part.number], facts = ray.get(call, timeout=FETCH_SECONDS)
            except Exception as raised:
                again.append(self._lost(part, seat, actor, unwrapped(raised)))
                continue
            self.facts[f"reader-{self.placement.planned.ranks.index(seat)}"] = facts
            self._idle.append((seat, actor))
        return again

    def _lost(self, part: Part, seat: Seat, actor: Any, error: BaseException) -> Part:
        import ray

        if isinstance(error, SelfkdError):
            raise error
        part.losses.append(in_one_line(error))
        if len(part.losses) >= MOST_LOST:
            what = f"{len(part.losses)} processes were lost that read with {self.model.path}: {part.losses[-1]}"
            raise BackendError(what, str(self.log), "The log says more. Too little memory? `selfkd run … --plan` counts it.")
        ray.kill(actor, no_restart=True)
        self._idle.append((seat, self._start(seat)))
        return part

    def close(self) -> None:
        """End every reader, whatever it is doing; its card is free then."""
        import ray

        for _, actor in [*self._idle, *((seat, actor) for _, seat, actor in self._busy.values())]:
            ray.kill(actor, no_restart=True)
        self._idle, self._busy = [], {}
