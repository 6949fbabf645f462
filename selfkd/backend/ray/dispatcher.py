"""The Ray backend: which engine answers which chunk, what happens when one is lost, and a trainer group beside the engines.

Ray is imported when a backend is opened; torch, vLLM and TRL only in the actors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import (
    AnswerProgress,
    Chunk,
    Logprob,
    OnAnswers,
    OnSteps,
    Questions,
    Reply,
    Sampling,
    Trained,
    TrainSpec,
    nobody_listens,
)
from selfkd.backend.engine.held_engine import ENGINE, LOADER, TRAINER, Importable, must_match, redirect, resolve, traced
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.backend.ray.cluster import POLL_SECONDS, Cluster, actor_class, in_one_line, result_of, unwrapped
from selfkd.backend.ray.engine_pool import START_SECONDS, Call, EnginePool, InFlight
from selfkd.backend.ray.trainer_group import GroupSpec, TrainerGroup
from selfkd.core.facts import Facts
from selfkd.core.pool import Model
from selfkd.errors import BackendError, SelfkdError

REPORT_SECONDS = 1.0  # between two reports of progress
MOST_LOST_ENGINES = 2  # this many engines lost to one chunk stop the run: it is the chunk
MOST_FAILED_STARTS = 2  # this many engines lost while starting or swapping stop the run: it is the machine
SCORED_ROWS = 256  # rows per call of logprobs
CARD_SHARE = {"engine": 0.6, "trainer": 0.4}  # of a GPU: Ray then never puts two engines, nor two ranks, on the same one


class RayBackend:
    """Engines and ranks as actors on a Ray cluster, private or joined.

    `ahead` starts the trainer's processes while engines answer for the first time: their imports (16 s of processor time, 13 s from
    end to end on idle cores) are over when there is something to learn.
    """

    name = "ray"

    def __init__(
        self,
        machine: Machine,
        numerics: Mapping[str, Any] | None,
        log: Path,
        engine: Importable = ENGINE,
        trainer: Importable = TRAINER,
        loader: Importable = LOADER,
        ahead: bool = True,
    ) -> None:
        self.machine, self.log = machine, log.absolute()
        self._numerics = fixed_numerics(machine) if numerics is None else dict(numerics)
        self._loader, self._ahead = loader, ahead
        threads, ranks = self._numerics["threads"], self._numerics["trainers"]
        self._cluster = Cluster(self.log, cpus=threads * (machine.generators + ranks) + 4, threads=threads)
        self._gpus = self._cluster.gpus()
        storage = (self._cluster.folder or self.log) / "train"
        self._trainers = TrainerGroup(GroupSpec(ranks, threads, self._cards("trainer"), storage, self.log, trainer))
        engine_numerics = {**self._numerics, "turns": machine.turns}  # whether an engine must be able to sleep
        self._engines = EnginePool(engine, engine_numerics, self._cards("engine"), self.log)
        self._weights = ""  # those that the last call of generate or logprobs asked for

    def numerics(self) -> dict[str, Any]:
        return dict(self._numerics)

    def facts(self) -> dict[str, Facts]:
        return {**self._engines.facts, **self._trainers.facts}

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        """Load a model in a process of its own, whose memory is free afterwards; the first engine's imports run beside it."""
        import ray

        if not self._gpus and not self._engines.engines:
            self._engines.start_engine()
        log = self.log / "load.log"
        actor = actor_class(OneCall, num_cpus=1).remote(log)
        try:
            call = actor.run.remote(self._loader, dict(source), out, dither, asked)
            notes: dict[str, Any] = result_of(call, "loading the model", log)
            return notes
        finally:
            ray.kill(actor, no_restart=True)

    def warm(self, model: Model) -> None:
        """Start every engine with `model` now, beside whatever the caller does next."""
        while len(self._engines.engines) < self.machine.generators:
            self._engines.start_engine()
        for engine in self._engines.idle():
            self._engines.ensure(engine, model)

    def generate(
        self, model: Model, chunks: Sequence[Chunk], sampling: Sampling, on_progress: OnAnswers = nobody_listens
    ) -> Iterator[Reply]:
        calls = [Call(f"chunk {chunk.key[:12]}", "generate", (model, chunk, sampling)) for chunk in chunks]
        with closing(self._dispatch(model, calls, on_progress)) as replies:
            for reply in replies:
                must_match(reply, model)
                yield reply

    def logprobs(self, model: Model, rows: pl.DataFrame, on_progress: OnAnswers = nobody_listens) -> Iterator[Logprob]:
        slices = [rows.slice(start, SCORED_ROWS) for start in range(0, rows.height, SCORED_ROWS)]
        calls = [Call(f"rows from {part.item(0, 'id')}", "logprobs", (model, part)) for part in slices]
        with closing(self._dispatch(model, calls, on_progress)) as results:
            for scores in results:
                yield from scores

    def _dispatch(self, model: Model, calls: Sequence[Call], on_progress: OnAnswers) -> Generator[Any, None, None]:
        self._weights = model.digest
        dispatch = Dispatch(self._engines, model, calls, self.machine, on_progress, self._start_trainers_early)
        return dispatch.results()

    def train(
        self,
        start: Model,
        reference: Model | None,
        rows: Sequence[Path],
        spec: TrainSpec,
        out: Path,
        on_progress: OnSteps = nobody_listens,
    ) -> Trained:
        shared = self._gpus and self.machine.turns == "share"
        if shared:
            self._free_cards()
        steps_log = self.log / f"train-{out.name}.jsonl"
        try:
            return self._trainers.train(
                start, reference, list(rows), spec, out, self._numerics, steps_log=steps_log, on_progress=on_progress
            )
        finally:
            if shared:
                self._trainers.close(wait=True)

    def swap_notes(self) -> dict[str, Any]:
        return self._engines.swap_notes(self._weights)

    def close(self) -> None:
        """End every actor and a private cluster, within seconds, whatever they are doing."""
        self._trainers.close()
        self._engines.close()
        self._cluster.close()

    # Sharing cards between engines and ranks

    def _cards(self, who: str) -> float:
        """Return how many GPUs one engine or one rank asks Ray for."""
        if not self._gpus:
            return 0
        parallel: int = self._numerics["tensor_parallel"]
        if self.machine.turns == "share" and parallel == 1:
            return CARD_SHARE[who]
        return parallel if who == "engine" else 1

    def _free_cards(self) -> None:
        """Put engines to sleep before training on their card; those that span several end, for Ray lends only whole ones."""
        for engine in list(self._engines.engines):
            if self._numerics["tensor_parallel"] > 1:
                self._engines.kill_engine(engine)
            else:
                engine.weights = ""
                result_of(engine.actor.sleep.remote(), "putting an engine to sleep", engine.log)

    def _start_trainers_early(self) -> None:
        """Start the ranks, but not where they would take memory of a card that the engines use."""
        if self._ahead and not (self._gpus and self.machine.turns == "share"):
            self._trainers.start()


class Dispatch:
    """One call of `generate` or `logprobs`: which calls wait, and which engines were lost. Only the engines outlive it."""

    def __init__(
        self,
        engines: EnginePool,
        model: Model,
        calls: Iterable[Call],
        machine: Machine,
        on_progress: OnAnswers,
        on_sent: Callable[[], None],
    ) -> None:
        self._engines, self._model, self._waiting = engines, model, deque(calls)
        self._most_engines = min(machine.generators, len(self._waiting))
        self._timeout, self._on_progress, self._on_sent = machine.chunk_timeout, on_progress, on_sent
        self._failed_starts: list[str] = []
        self._done = 0
        self._reported = 0.0

    def results(self) -> Generator[Any, None, None]:
        """Yield the results of all calls in the order in which they finish; closing it abandons what is in flight."""
        try:
            while self._waiting or self._engines.answering():
                self._assign()
                results = self._collect()
                self._assign()  # before yielding: the caller may take its time, the engines need not wait
                self._done += len(results)
                if not results:  # else the caller learns it from the results
                    self._report()
                yield from results
        finally:
            self._engines.abandon()

    def _assign(self) -> None:
        """Start engines that are missing, and give each idle one the weights, or its next call."""
        while self._waiting and len(self._engines.engines) < self._most_engines:
            self._engines.start_engine()
        for engine in self._engines.idle() if self._waiting else []:
            if engine.weights != self._model.digest:
                self._engines.ensure(engine, self._model)
            elif self._waiting:
                self._engines.send(engine, self._waiting.popleft(), self._timeout)
                self._on_sent()

    def _collect(self) -> list[Any]:
        """Wait a moment; return what finished. A call whose engine was lost is the next to be sent again."""
        import ray

        in_flight = self._engines.in_flight
        ready, _ = ray.wait(list(in_flight), num_returns=1, timeout=POLL_SECONDS)
        results = []
        for reference in ready:
            work = in_flight.pop(reference)
            try:
                result = ray.get(reference, timeout=START_SECONDS)
            except Exception as error:
                self._lose(work, unwrapped(error))
                continue
            if work.call:
                results.append(result)
            else:
                self._engines.ensured(work.engine, *result)
        for reference, work in list(in_flight.items()):
            if reason := work.overdue():
                del in_flight[reference]
                self._lose(work, TimeoutError(reason))
        return results

    def _lose(self, work: InFlight, error: BaseException) -> None:
        """Give up an engine and ask again, unless the error is one for the user or one loss too many."""
        if isinstance(error, SelfkdError):
            raise error
        reason = in_one_line(error)
        self._engines.lost(work, reason)
        if work.call:
            work.call.losses.append(reason)
            if len(work.call.losses) >= MOST_LOST_ENGINES:
                raise _too_many_lost(work.call, work.engine.log)
            self._waiting.appendleft(work.call)
        else:
            self._failed_starts.append(reason)
            if len(self._failed_starts) >= MOST_FAILED_STARTS:
                raise _too_many_failed_starts(self._failed_starts, work.engine.log)

    def _report(self) -> None:
        answering, now = self._engines.answering(), time.monotonic()
        if answering and now - self._reported >= REPORT_SECONDS:
            self._reported = now
            requests, tokens = sum(work.requests for work in answering), sum(work.tokens for work in answering)
            waiting = len(self._waiting) + len(answering)
            self._on_progress(AnswerProgress(requests=requests, tokens=tokens, chunks=self._done, waiting=waiting))


class OneCall:
    """An actor for one call of a function."""

    def __init__(self, log: Path) -> None:
        redirect(log)

    def run(self, target: Importable, *arguments: Any) -> Any:
        with traced():
            return resolve(target)(*arguments)


def _too_many_lost(call: Call, log: Path) -> BackendError:
    advice = (
        "Repeat the command: finished chunks are kept and only the rest is asked again. If this one fails again:\n"
        "more memory (lower kv_cache_gb), more time (chunk_timeout of the machine), or find the prompt in the log."
    )
    return BackendError(f"{call.name} ended {len(call.losses)} engines", str(log), f"{_reasons(call.losses)}\n{advice}")


def _too_many_failed_starts(failed: list[str], log: Path) -> BackendError:
    advice = "`selfkd doctor` checks versions and memory. Repeat the command when the cause is gone: nothing is lost."
    return BackendError(f"{len(failed)} engines in a row did not start", str(log), f"{_reasons(failed)}\n{advice}")


def _reasons(losses: list[str]) -> str:
    return "\n".join(f"engine lost: {reason}" for reason in losses)
