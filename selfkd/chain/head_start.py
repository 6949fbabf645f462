"""Rewards that run while answers still come: a head start of the score step that follows. It stays in memory and is in no record.

A value is used once, where the very same function is then asked about the very same row of the very same sample, and else thrown
away: a function may draw, and equal answers are then no equal values. What fails or hangs here is not kept: it fails again in its
own step, which says so. Only cores that no engine uses work ahead.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from selfkd.core import digest
from selfkd.core.accelerator import accelerator
from selfkd.core.hardware import usable_cores
from selfkd.core.pool import Function, Pool, read_light
from selfkd.rewards.contract import Result, failed
from selfkd.rewards.pool import MEMORY_GB, WorkerPool, cut
from selfkd.rewards.process import WorkerSpec, spec_of
from selfkd.steps.score import ScoreStep

BATCH = 64  # samples per call of a worker: what a stop throws away
MOST_WORKERS = 4
JOIN_SECONDS = 5.0
Row = dict[str, Any]
Key = tuple[str, str]
Known = dict[Key, Result]


def spare_workers(engines: int, threads: int) -> int:
    """Return how many workers may run beside the engines: the cores that these and the driver leave, MOST_WORKERS at most.

    An engine on a card keeps one core busy, and its host threads a second one.
    """
    busy = engines * (2 if accelerator().on_cards else threads)
    return max(0, min(MOST_WORKERS, usable_cores() - busy - 1))


def key_of(sample: str, row: Row) -> Key | None:
    """Return what names the row of a sample: its id and the content; None where the row holds what has no one text."""
    try:
        return sample, digest.of(row)
    except (TypeError, ValueError):
        return None


@dataclass(frozen=True)
class Reward:
    """A score that the next step gives, by this function."""

    score: str
    function: Function
    workers: WorkerPool


class HeadStart:
    """What the score step after a step that asks a model can have done already, with `workers` processes; with 0 it does nothing."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._job: _Job | None = None

    def expect(self, step: ScoreStep, functions: Iterable[Function], pool: Pool) -> None:
        """Score what comes now as `step` will, which scores the samples of `pool` and those that come."""
        self.stop()
        if self._workers:
            self._job = _Job(step, functions, pool, self._workers)

    def add(self, answers: Path) -> None:
        """Take a file of finished answers."""
        if self._job:
            self._job.add(answers)

    def known(self, function: Function) -> Known:
        """Return {key of a row: result} of what was scored by this function; ends the head start. What is used is to be taken out."""
        job = self._job
        if job is None:
            return {}
        job.stop()
        return job.known.get(_spec(function), {})

    def stop(self) -> None:
        """End it, and forget what it scored."""
        if self._job:
            self._job.stop()
        self._job = None


class _Job:
    """The threads of one head start, each of which has one worker process at a time. They die with this process."""

    def __init__(self, step: ScoreStep, functions: Iterable[Function], pool: Pool, workers: int) -> None:
        self._step, self._pool = step, pool
        named = zip(step.scores(), functions, strict=True)
        self._rewards = [Reward(name, one, WorkerPool(_spec(one), step.timeout)) for name, one in named]
        self.known: dict[WorkerSpec, Known] = {reward.workers.spec: {} for reward in self._rewards}
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._stopped = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def add(self, answers: Path) -> None:
        for reward in self._rewards:
            self._todo.put(partial(self._open, answers, reward))

    def stop(self) -> None:
        self._stopped = True
        for reward in self._rewards:
            reward.workers.stop()
        for _ in self._threads:
            self._todo.put(None)
        for thread in self._threads:
            thread.join(JOIN_SECONDS)

    def _work(self) -> None:
        while (task := self._todo.get()) and not self._stopped:
            try:
                task()
            except Exception:
                continue  # the step itself will say what is wrong

    def _open(self, answers: Path, reward: Reward) -> None:
        """Cut a file of answers into batches, as the step cuts all of them."""
        tables = {**self._pool.tables, "samples": read_light("samples", [answers])}
        pool = replace(self._pool, tables=tables, files={**self._pool.files, "samples": (answers,)})
        ids, rows = self._step.rows_ahead(pool, reward.function, reward.score)
        names = iter(ids)
        for batch in cut(rows, BATCH):
            self._todo.put(partial(self._score, list(islice(names, len(batch))), batch, reward))

    def _score(self, ids: list[str], batch: list[Row], reward: Reward) -> None:
        """Keep the values of a batch. Where all of it failed the function is broken, and scores no more ahead."""
        found = zip(map(key_of, ids, batch), reward.workers.score(batch), strict=True)
        kept = {key: result for key, result in found if key and not failed(*result)}
        self.known[reward.workers.spec] |= kept
        if not kept:
            reward.workers.stop()


def _spec(function: Function) -> WorkerSpec:
    return spec_of(function, MEMORY_GB)


def completed(
    batches: Iterable[list[Row]],
    samples: Iterable[str],
    known: Known,
    compute: Callable[[Iterable[list[Row]]], Iterator[list[Result]]],
) -> Iterator[list[Result]]:
    """Yield the results of each batch, in order: those that are known, and of the other rows what `compute` makes of them.

    `samples` are the ids of the rows of all batches. What was known and is used is taken out of `known`.
    """
    if not known:
        yield from compute(batches)
        return
    begun: deque[list[Result | None]] = deque()
    names = iter(samples)

    def missing() -> Iterator[list[Row]]:
        for batch in batches:
            keys = map(key_of, islice(names, len(batch)), batch)
            found = [known.pop(key, None) if key else None for key in keys]
            begun.append(found)
            if rest := [row for row, result in zip(batch, found, strict=True) if result is None]:
                yield rest

    for results in compute(missing()):
        while None not in begun[0]:
            yield _whole(begun.popleft(), iter(()))
        yield _whole(begun.popleft(), iter(results))
    while begun:
        yield _whole(begun.popleft(), iter(()))


def _whole(found: list[Result | None], rest: Iterator[Result]) -> list[Result]:
    return [next(rest) if result is None else result for result in found]
