"""The Ray backend: engines that answer chunks, as `dispatch.py` says, and a trainer group beside them.

Ray is imported when a backend is opened; torch, vLLM and TRL only in the actors.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import (
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
from selfkd.backend.model_files import engine_kind
from selfkd.backend.ray.cluster import Cluster, actor_class, result_of
from selfkd.backend.ray.dispatch import Call, Dispatch, Limits, Wanted, carry_out, results
from selfkd.backend.ray.engine_pool import EnginePool
from selfkd.backend.ray.trainer_group import GroupSpec, TrainerGroup
from selfkd.backend.ray.transport import RayTransport
from selfkd.core.facts import Facts
from selfkd.core.pool import Model

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
        dispatch, transport = self._dispatch(model, []), self._transport(model)
        carry_out(dispatch.warm(time.monotonic()), dispatch, transport, time.monotonic)

    def generate(
        self, model: Model, chunks: Sequence[Chunk], sampling: Sampling, on_progress: OnAnswers = nobody_listens
    ) -> Iterator[Reply]:
        calls = [_generate_call(model, chunk, sampling) for chunk in chunks]
        with closing(self._results(model, calls, on_progress)) as replies:
            for reply in replies:
                must_match(reply, model)
                yield reply

    def logprobs(self, model: Model, rows: pl.DataFrame, on_progress: OnAnswers = nobody_listens) -> Iterator[Logprob]:
        slices = [rows.slice(start, SCORED_ROWS) for start in range(0, rows.height, SCORED_ROWS)]
        calls = [Call(f"rows from {part.item(0, 'id')}", "logprobs", (model, part)) for part in slices]
        with closing(self._results(model, calls, on_progress)) as parts:
            for scores in parts:
                yield from scores

    def _results(self, model: Model, calls: Sequence[Call], on_progress: OnAnswers) -> Generator[Any, None, None]:
        self._weights = model.digest
        return results(self._dispatch(model, calls), self._transport(model, on_progress), time.monotonic)

    def _dispatch(self, model: Model, calls: Sequence[Call]) -> Dispatch:
        """Answers that depend on nothing but the chunk need it alone in an engine; else the next chunk fills what its tail leaves free."""
        depth = 1 if self._numerics.get("exact", True) else 2
        kind = engine_kind(Path(model.path), model.digest, self._numerics.get("dtype", ""))
        limits = Limits(self.machine.generators, self.machine.chunk_timeout, depth)
        return Dispatch(self._engines.engines, Wanted(model.digest, kind), calls, limits)

    def _transport(self, model: Model, on_progress: OnAnswers = nobody_listens) -> RayTransport:
        return RayTransport(self._engines, model, on_progress, self._start_trainers_early)

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


class OneCall:
    """An actor for one call of a function."""

    def __init__(self, log: Path) -> None:
        redirect(log)

    def run(self, target: Importable, *arguments: Any) -> Any:
        with traced():
            return resolve(target)(*arguments)


def _generate_call(model: Model, chunk: Chunk, sampling: Sampling) -> Call:
    tokens = chunk.requests.height * sampling.max_tokens
    return Call(f"chunk {chunk.key[:12]}", "generate", (model, chunk, sampling), tokens, ahead=chunk)
