"""The Ray backend: engines that answer chunks, as `dispatch.py` says, and a trainer group beside them.

Ray is imported when a backend is opened; torch, vLLM and TRL only in the actors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend import lengths
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
from selfkd.backend.engine.held_engine import (
    AVERAGE,
    ENGINE,
    LOADER,
    READER,
    TRAINER,
    Importable,
    must_match,
    redirect,
    resolve,
    traced,
)
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.backend.model_files import engine_kind
from selfkd.backend.ray import placement
from selfkd.backend.ray.cluster import Cluster, actor_class, is_private, result_of
from selfkd.backend.ray.dispatch import Call, Dispatch, Limits, Wanted, carry_out, results
from selfkd.backend.ray.engine_pool import EnginePool
from selfkd.backend.ray.placement import Node, Placement, Plan, Seat, nobody_hears
from selfkd.backend.ray.rank import GROUP_SECONDS, Group
from selfkd.backend.ray.readers import Readers
from selfkd.backend.ray.trainer_group import TrainerGroup
from selfkd.backend.ray.transport import RayTransport
from selfkd.backend.reading import Read, Reading, parts_of
from selfkd.backend.trainer.loss_kinds import kind_of
from selfkd.core.accelerator import Accelerator, accelerator
from selfkd.core.facts import Facts
from selfkd.core.install import lock
from selfkd.core.pool import Model
from selfkd.errors import UsageError

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
        reader: Importable = READER,
        ahead: bool = True,
        say: Callable[[str], None] = nobody_hears,
        hardware: Accelerator | None = None,
    ) -> None:
        self.machine, self.log = machine, log.absolute()
        self._numerics = fixed_numerics(machine) if numerics is None else dict(numerics)
        self._loader, self._reader, self._ahead = loader, reader, ahead
        self._read_by: dict[str, Facts] = {}
        hardware = hardware or accelerator()
        if engine == ENGINE:
            refuse_unusable(hardware)
        self._cluster, planned = self._opened(hardware)
        try:
            self._placement = Placement.reserve(planned, nobody_hears if self._cluster.folder else say)
        except BaseException:
            self._cluster.close()
            raise
        engine_numerics = {**self._numerics, "turns": machine.turns}  # whether an engine must be able to sleep
        self._engines = EnginePool(engine, engine_numerics, self._placement, self.log)
        self._trainers = TrainerGroup(self._group(trainer), [self._placement.options(seat) for seat in planned.ranks])
        self._weights = ""  # those that the last call of generate or logprobs asked for

    def numerics(self) -> dict[str, Any]:
        return dict(self._numerics)

    def facts(self) -> dict[str, Facts]:
        return {**self._engines.facts, **self._trainers.facts, **self._read_by}

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        """Load a model in a process of its own, whose memory is free afterwards; the first engine's imports run beside it."""
        if not self._placement.planned.cards and not self._engines.engines:
            self._engines.start_engine()
        notes: dict[str, Any] = self._once("loading the model", "load.log", self._loader, dict(source), out, dither, asked)
        return notes

    def _once(self, what: str, log_name: str, target: Importable, *arguments: Any) -> Any:
        """Call a function in a process of its own, without a card, and return its result."""
        import ray

        log = self.log / log_name
        options = self._placement.options(Seat(self._placement.planned.engines[0].bundle))
        actor = actor_class(OneCall, **options).remote(log)
        try:
            return result_of(actor.run.remote(target, *arguments), what, log, LOAD_SECONDS)
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

    def read(
        self, model: Model, reading: Reading, rows: pl.DataFrame, on_progress: OnAnswers = nobody_listens
    ) -> Iterator[Read]:
        """Read where ranks sit: engines on the same cards sleep meanwhile, as they do for an update."""
        if self._takes_turns:
            self._engines.sleep()
        readers = Readers(self._reader, self._numerics, model, reading, self._placement, self.log)
        with closing(readers):
            yield from readers.read(parts_of(rows), on_progress)
            self._read_by |= readers.facts

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
        if self._takes_turns:
            self._engines.before_update(start, rows, kind_of(spec.loss, spec.rows).rows == "pair", spec.max_length)
            self._engines.sleep()
        steps_log = self.log / f"train-{out.name}.jsonl"
        trained = self._trainers.train(
            start, reference, list(rows), spec, out, self._numerics, steps_log=steps_log, on_progress=on_progress
        )
        if self._takes_turns and not self._engines.have_room():
            self._trainers.close()  # even without tensors a process holds a part of a card, and this one is small
        return trained

    def average(self, models: Sequence[tuple[Model, float]], out: Path) -> None:
        if self._takes_turns:
            self._engines.sleep()
        self._once("averaging checkpoints", f"average-{out.name}.log", AVERAGE, list(models), out)

    def lengths(self, model: Model, rows: pl.DataFrame) -> list[int]:
        return lengths.learned(model, rows)

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
        exact = bool(self._numerics.get("exact"))
        return Group(self._numerics["trainers"], self.log, trainer, process_group, seconds, exact)

    def _start_trainers_early(self) -> None:
        """Start the ranks: their imports take nothing of a card."""
        if self._ahead:
            self._trainers.start()


def refuse_unusable(hardware: Accelerator) -> None:
    """Raise UsageError for an engine that was built for cards where none can be used: it would die at its start, twice."""
    if hardware.cuda_build and not hardware.on_cards and is_private():
        fix = f"`selfkd doctor` shows what is there. To run on the CPU, in a fresh environment: {lock('cpu')}"
        raise UsageError(f"the installed engine needs an NVIDIA card: {hardware.why}", "machine", fix)


class OneCall:
    """An actor for one call of a function."""

    def __init__(self, log: Path) -> None:
        redirect(log)
        self._log = log

    def run(self, target: Importable, *arguments: Any) -> Any:
        with traced(self._log):
            return resolve(target)(*arguments)


def _generate_call(model: Model, chunk: Chunk, sampling: Sampling) -> Call:
    tokens = chunk.requests.height * sampling.max_tokens
    return Call(f"chunk {chunk.key[:12]}", "generate", (model, chunk, sampling), tokens, ahead=chunk)
