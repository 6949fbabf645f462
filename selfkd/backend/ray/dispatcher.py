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
from selfkd.backend.ray import placement
from selfkd.backend.ray.cluster import POLL_SECONDS, Cluster, actor_class, in_one_line, is_private, result_of, unwrapped
from selfkd.backend.ray.engine_pool import START_SECONDS, Call, EnginePool, InFlight
from selfkd.backend.ray.placement import Node, Placement, Plan, Seat, nobody_hears
from selfkd.backend.ray.rank import GROUP_SECONDS, Group
from selfkd.backend.ray.trainer_group import TrainerGroup
from selfkd.core.accelerator import Accelerator, accelerator
from selfkd.core.facts import Facts
from selfkd.core.pool import Model
from selfkd.errors import BackendError, SelfkdError, UsageError

REPORT_SECONDS = 1.0  # between two reports of progress
MOST_LOST_ENGINES = 2  # this many engines lost to one chunk stop the run: it is the chunk
MOST_FAILED_STARTS = 2  # this many engines lost while starting or swapping stop the run: it is the machine
SCORED_ROWS = 256  # rows per call of logprobs
LOAD_SECONDS = 24 * 3600.0  # a large model over a slow network


class RayBackend:
    """Engines and ranks as actors on a Ray cluster, private or joined, each on its seat of the run's own placement.

    `ahead` starts the trainer's processes while engines answer for the first time: their imports (16 s of processor time, 13 s from
    end to end on idle cores) are over when there is something to learn. `say` hears what a person should know meanwhile.
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
        say: Callable[[str], None] = nobody_hears,
        hardware: Accelerator | None = None,
    ) -> None:
        self.machine, self.log = machine, log.absolute()
        self._numerics = fixed_numerics(machine) if numerics is None else dict(numerics)
        self._loader, self._ahead = loader, ahead
        hardware = hardware or accelerator()
        if engine == ENGINE:
            refuse_unusable(hardware)
        self._cluster, planned = self._opened(hardware)
        try:
            self._placement = Placement.reserve(planned, nobody_hears if self._cluster.folder else say)
        except BaseException:
            self._cluster.close()
            raise
        self._engines = EnginePool(engine, self._numerics, self._placement, self.log)
        self._trainers = TrainerGroup(self._group(trainer), [self._placement.options(seat) for seat in planned.ranks])
        self._weights = ""  # those that the last call of generate or logprobs asked for

    def numerics(self) -> dict[str, Any]:
        return dict(self._numerics)

    def facts(self) -> dict[str, Facts]:
        return {**self._engines.facts, **self._trainers.facts}

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        """Load a model in a process of its own, whose memory is free afterwards; the first engine's imports run beside it."""
        import ray

        if not self._placement.planned.cards and not self._engines.engines:
            self._engines.start_engine()
        log = self.log / "load.log"
        options = self._placement.options(Seat(self._placement.planned.engines[0].bundle))
        actor = actor_class(OneCall, **options).remote(log)
        try:
            call = actor.run.remote(self._loader, dict(source), out, dither, asked)
            notes: dict[str, Any] = result_of(call, "loading the model", log, LOAD_SECONDS)
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
        if self._takes_turns:
            self._engines.sleep()
        steps_log = self.log / f"train-{out.name}.jsonl"
        trained = self._trainers.train(
            start, reference, list(rows), spec, out, self._numerics, steps_log=steps_log, on_progress=on_progress
        )
        if self._takes_turns and not self._engines.have_room():
            self._trainers.close()  # even without tensors a process holds a part of a card, and this one is small
        return trained

    def swap_notes(self) -> dict[str, Any]:
        return self._engines.swap_notes(self._weights)

    def close(self) -> None:
        """End every actor and a private cluster, within seconds, whatever they are doing; give what was reserved back."""
        self._trainers.close()
        self._engines.close()
        if not self._cluster.folder:
            self._placement.close()  # a private cluster ends with all that was reserved of it
        self._cluster.close()

    # Where everybody sits

    @property
    def _takes_turns(self) -> bool:
        """Whether an engine sits where ranks sit too, on a card that has no room for both at work."""
        return bool(self._placement.planned.cards) and self.machine.turns == "share"

    def _opened(self, hardware: Accelerator) -> tuple[Cluster, Plan]:
        """Open the cluster, and plan for what it has; UsageError where it could never hold what is asked, before anything starts."""
        threads = self._numerics["threads"]
        if is_private():
            planned = placement.plan(self.machine, self._numerics, hardware.on_cards)
            if planned.cards:
                placement.check(planned, [Node(planned.cpus, len(hardware.cards))], self.machine, self._numerics)
                placement.check_slices(planned, hardware.cards, self._numerics)
            return Cluster(self.log, planned.cpus, threads, planned.cards, hardware.visible(planned.cards)), planned
        cluster = Cluster(self.log, 0, threads)
        try:
            nodes = [Node.of(resources) for resources in cluster.nodes()]
            planned = placement.plan(self.machine, self._numerics, hardware.cuda_build and any(node.cards for node in nodes))
            placement.check(planned, nodes, self.machine, self._numerics)
        except BaseException:
            cluster.close()
            raise
        return cluster, planned

    def _group(self, trainer: Importable) -> Group:
        seconds = self._numerics.get("trainer", {}).get("ddp_timeout", GROUP_SECONDS)
        process_group = "nccl" if self._placement.planned.cards else "gloo"
        return Group(self._numerics["trainers"], self.log, trainer, process_group, seconds)

    def _start_trainers_early(self) -> None:
        """Start the ranks: their imports take nothing of a card."""
        if self._ahead:
            self._trainers.start()


def refuse_unusable(hardware: Accelerator) -> None:
    """Raise UsageError for an engine that was built for cards where none can be used: it would die at its start, twice."""
    if hardware.cuda_build and not hardware.on_cards and is_private():
        fix = "`selfkd doctor` shows what is there. To run on the CPU, install selfkd[cpu] in a fresh environment."
        raise UsageError(f"the installed engine needs an NVIDIA card: {hardware.why}", "machine", fix)


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
