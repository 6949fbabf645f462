"""The Ray backend: generator actors that outlive rounds, our own dispatcher, and a trainer group beside them.

An actor is never restarted by Ray: it would come back with the weights of its constructor. A dead one is replaced by a
new one, which is given the current weights and proves them. Ray is imported when a backend is opened; torch, vLLM and TRL only
in the actors.
"""

from __future__ import annotations

import logging
import time
from collections import abc, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import Chunk, Reply, Sampling, Trained, TrainSpec
from selfkd.backend.engine.held_engine import ENGINE, LOADER, TRAINER, Beat, Generator, must_match, redirect, resolve, traced
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.backend.ray.cluster import Cluster, first_line, unwrapped
from selfkd.backend.ray.trainer_group import Group, Trainers
from selfkd.core.pool import Model
from selfkd.errors import BackendError, SelfkdError

Target = str | Callable[..., Any]
TICK = 0.25  # seconds between two looks at deadlines and beats
TELL = 1.0  # seconds between two words of progress
START_SECONDS = 1800.0  # an engine may compile kernels and read a large checkpoint before it first answers
STALL_SECONDS = 600.0  # an engine that produced tokens for this chunk and then none for so long is hanging
FAILURES = 2  # this many engines lost to one chunk, or lost while starting, stop the run
ROWS = 256  # rows per call of logprobs
SHARE = {"engine": 0.6, "trainer": 0.4}  # of a card: Ray then never puts two engines, nor two ranks, on the same one


@dataclass
class Item:
    """One call of a generator's method, and the engines that were lost to it."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    lost: list[str] = field(default_factory=list)


@dataclass
class Seat:
    """A generator actor as the driver sees it: the weights it proved to hold, and where its tokens and words can be read."""

    actor: Any
    beat: Path
    log: Path
    weights: str = ""


@dataclass
class Flight:
    """What one actor is doing. `item` is None while it starts or swaps its weights."""

    seat: Seat
    item: Item | None
    deadline: float
    requests: int = 0
    tokens: int = 0
    moved: float = field(default_factory=time.monotonic)


class RayBackend:
    """`progress`, if set, is called about once a second with plain numbers: tokens in flight, or losses of a training.

    `ahead` starts the trainer's processes while engines answer for the first time: their imports (16 s of processor time, 13 s from
    end to end on idle cores) are over when there is something to learn.
    """

    name = "ray"

    def __init__(
        self,
        machine: Machine,
        numerics: Mapping[str, Any] | None,
        log: Path,
        engine: Target = ENGINE,
        trainer: Target = TRAINER,
        loader: Target = LOADER,
        ahead: bool = True,
    ) -> None:
        if numerics is None:
            numerics = fixed_numerics(machine)
        self.machine, self.log = machine, log.absolute()
        self._numerics = dict(numerics)
        self._engine, self._loader, self._ahead = engine, loader, ahead
        self.progress: Callable[[dict[str, Any]], None] = lambda numbers: None
        threads, ranks = self._numerics["threads"], self._numerics["trainers"]
        self._cluster = Cluster(self.log, cpus=threads * (machine.generators + ranks) + 4, threads=threads)
        self._gpus = self._cluster.gpus()
        storage = (self._cluster.folder or self.log) / "train"
        self._trainers = Trainers(Group(ranks, threads, self._card("trainer"), storage, self.log, trainer))
        self._words = _logger(self.log / "ray.log")
        self._seats: list[Seat] = []
        self._flights: dict[Any, Flight] = {}
        self._hired = 0
        self._failed_starts: list[str] = []
        self._swaps: dict[str, list[dict[str, Any]]] = {}
        self._current = ""
        self._told = 0.0

    def numerics(self) -> dict[str, Any]:
        return dict(self._numerics)

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None) -> dict[str, Any]:
        """In a process of its own, whose memory is free afterwards; the first engine's imports run beside it."""
        import ray

        if not self._gpus:
            self._hire()
        actor = self._actor(Errand, {"num_cpus": 1}).remote(self.log / "load.log")
        try:
            return self._get(
                actor.run.remote(self._loader, dict(source), out, dither), "loading the model", self.log / "load.log"
            )
        finally:
            ray.kill(actor, no_restart=True)

    def warm(self, model: Model) -> None:
        """Start every engine with `model` now, beside whatever the caller does next."""
        while len(self._seats) < self.machine.generators:
            self._hire()
        for seat in self._idle():
            self._ensure(seat, model)

    def generate(self, model: Model, chunks: Sequence[Chunk], sampling: Sampling, on_progress: Any = None) -> Iterator[Reply]:
        self.progress = on_progress or (lambda n: None)
        items = [Item(f"chunk {chunk.key[:12]}", "generate", (model, chunk, sampling)) for chunk in chunks]
        with closing(self._work(model, items)) as results:
            for reply in results:
                must_match(reply, model)
                yield reply

    def logprobs(self, model: Model, rows: pl.DataFrame, on_progress: Any = None) -> Iterator[tuple[str, float, int]]:
        self.progress = on_progress or (lambda n: None)
        slices = [rows.slice(start, ROWS) for start in range(0, rows.height, ROWS)]
        items = [Item(f"rows from {part.item(0, 'id')}", "logprobs", (model, part)) for part in slices]
        with closing(self._work(model, items)) as results:
            for scores in results:
                yield from scores

    def train(
        self, start: Model, reference: Model | None, rows: Sequence[Path], spec: TrainSpec, out: Path, on_progress: Any = None
    ) -> Trained:
        self.progress = on_progress or (lambda n: None)
        shared = self._gpus and self.machine.turns == "share"
        if shared:
            self._make_room()
        news = self.log / f"train-{out.name}.jsonl"
        try:
            return self._trainers.train(
                start, reference, list(rows), spec, out, self._numerics, news=news, follow=self.progress
            )
        finally:
            if shared:
                self._trainers.close(kindly=True)

    def swap_notes(self) -> dict[str, Any]:
        """Of the engines that hold the current model: the longest swap, the worst proof, the smallest surviving share."""
        notes = self._swaps.get(self._current, [])
        survived = [note["survived"] for note in notes if note.get("survived") is not None]
        unproved = [note.get("proved") for note in notes if note.get("proved") is not True]
        return {
            "seconds": max((note.get("seconds", 0.0) for note in notes), default=0.0),
            "proved": unproved[0] if unproved else True if notes else None,
            "survived": min(survived, default=None),
            "engines": len(notes),
        }

    def close(self) -> None:
        """End every actor and a private cluster, within seconds, whatever they are doing."""
        self._trainers.close()
        for seat in list(self._seats):
            self._dismiss(seat)
        self._cluster.close()

    # The dispatcher: items wait, seats take them, flights land. One call at a time uses it.

    def _work(self, model: Model, items: Iterable[Item]) -> abc.Generator[Any, None, None]:
        """Results of all items in the order in which they finish; closing it abandons what is in flight."""
        waiting = deque(items)
        self._current, self._failed_starts = model.digest, []
        wanted = min(self.machine.generators, len(waiting))
        done = 0
        try:
            while waiting or any(flight.item for flight in self._flights.values()):
                self._board(model, waiting, wanted)
                results = self._land(waiting)
                self._board(model, waiting, wanted)  # before yielding: the caller may take its time, the engines need not wait
                done += len(results)
                if not results:  # else the caller learns it from the results
                    self._tell_generation(done, len(waiting))
                yield from results
        finally:
            self._abandon()

    def _board(self, model: Model, waiting: deque[Item], wanted: int) -> None:
        while waiting and len(self._seats) < wanted:
            self._hire()
        for seat in self._idle() if waiting else []:
            if seat.weights != model.digest:
                self._ensure(seat, model)
            elif waiting:
                item = waiting.popleft()
                call = getattr(seat.actor, item.method).remote(*item.arguments)
                self._flights[call] = Flight(seat, item, time.monotonic() + self.machine.chunk_timeout)
                self._prepare_training()

    def _land(self, waiting: deque[Item]) -> list[Any]:
        """Wait a moment; what finished is returned, what was lost goes back to the head of `waiting`."""
        import ray

        ready, _ = ray.wait(list(self._flights), num_returns=1, timeout=TICK)
        results = []
        for call in ready:
            flight = self._flights.pop(call)
            try:
                result = ray.get(call, timeout=START_SECONDS)
            except Exception as error:
                self._lose(flight, unwrapped(error), waiting)
                continue
            if flight.item is None:
                flight.seat.weights = self._note(result)
            else:
                results.append(result)
        for call, flight in list(self._flights.items()):
            if reason := _overdue(flight):
                del self._flights[call]
                self._lose(flight, TimeoutError(reason), waiting)
        return results

    def _lose(self, flight: Flight, error: BaseException, waiting: deque[Item]) -> None:
        """An engine is lost: by its death, by ours after a deadline, or by an exception after which nobody can trust it."""
        if isinstance(error, SelfkdError):
            raise error
        self._dismiss(flight.seat)
        reason = first_line(error)
        what = flight.item.name if flight.item else "its start"
        self._words.warning("engine %s lost during %s: %s", flight.seat.log.stem, what, reason)
        lost = flight.item.lost if flight.item else self._failed_starts
        lost.append(reason)
        if len(lost) >= FAILURES:
            raise _too_many(flight, lost)
        if flight.item:
            waiting.appendleft(flight.item)

    def _abandon(self) -> None:
        """A busy engine cannot hear that its chunk is not wanted any more, and its process can be replaced: end it."""
        for call, flight in list(self._flights.items()):
            if flight.item:
                del self._flights[call]
                self._dismiss(flight.seat)

    # Seats

    def _idle(self) -> list[Seat]:
        busy = [id(flight.seat) for flight in self._flights.values()]
        return [seat for seat in self._seats if id(seat) not in busy]

    def _hire(self) -> Seat:
        name = f"engine-{self._hired}"
        self._hired += 1
        beat, log = self.log / f"{name}.beat", self.log / f"{name}.log"
        options = {"num_cpus": self._numerics["threads"], "num_gpus": self._card("engine")}
        actor = self._actor(Generator, options).remote(self._engine, self._numerics, beat, log)
        actor.preload.remote()  # not awaited: the next call queues behind it, and what fails here fails there too
        self._seats.append(Seat(actor, beat, log))
        return self._seats[-1]

    def _ensure(self, seat: Seat, model: Model) -> None:
        self._flights[seat.actor.ensure.remote(model)] = Flight(seat, None, time.monotonic() + START_SECONDS)

    def _note(self, result: tuple[str, dict[str, Any]]) -> str:
        weights, notes = result
        self._swaps = {weights: [*self._swaps.get(weights, []), notes]}
        self._words.info("weights %s: %s", weights[:12], notes)
        return weights

    def _dismiss(self, seat: Seat) -> None:
        import ray

        with suppress(ray.exceptions.RayError):  # it may be dead already
            ray.kill(seat.actor, no_restart=True)
        if seat in self._seats:
            self._seats.remove(seat)
        seat.beat.unlink(missing_ok=True)

    def _actor(self, kind: type, options: Mapping[str, Any]) -> Any:
        import ray

        return ray.remote(max_restarts=0, max_task_retries=0, **options)(kind)

    # Training and sharing cards

    def _card(self, who: str) -> float:
        """GPUs that one engine or one rank asks Ray for."""
        if not self._gpus:
            return 0
        parallel = self._numerics["tensor_parallel"] if who == "engine" else 1
        return SHARE[who] if self.machine.turns == "share" and self._numerics["tensor_parallel"] == 1 else parallel

    def _make_room(self) -> None:
        """Before training on the same card: engines sleep; those that span several cards end, for Ray lends only whole ones."""
        for seat in list(self._seats):
            if self._numerics["tensor_parallel"] > 1:
                self._dismiss(seat)
            else:
                seat.weights = ""
                self._get(seat.actor.sleep.remote(), "putting an engine to sleep", seat.log)

    def _prepare_training(self) -> None:
        """Start the ranks early, but not where they would take memory of a card that the engines use."""
        if self._ahead and not (self._gpus and self.machine.turns == "share"):
            self._trainers.start()

    def _tell_generation(self, done: int, waiting: int) -> None:
        flying = [flight for flight in self._flights.values() if flight.item]
        if flying and time.monotonic() - self._told >= TELL:
            self._told = time.monotonic()
            requests, tokens = sum(flight.requests for flight in flying), sum(flight.tokens for flight in flying)
            self.progress({"requests": requests, "tokens": tokens, "chunks": done, "waiting": waiting + len(flying)})

    def _get(self, call: Any, what: str, log: Path) -> Any:
        """The result of a call, with signals heard while it runs and its error in its own type."""
        import ray

        while not ray.wait([call], timeout=TICK)[0]:
            continue
        try:
            return ray.get(call, timeout=START_SECONDS)
        except Exception as error:
            cause = unwrapped(error)
            if isinstance(cause, SelfkdError):
                raise cause from None
            raise BackendError(f"{what} failed: {cause}", str(log), "The log says more. Repeat the command.") from error


class Errand:
    """An actor for one call of a function."""

    def __init__(self, log: Path) -> None:
        redirect(log)

    def run(self, target: Target, *arguments: Any) -> Any:
        with traced():
            return resolve(target)(*arguments)


def _overdue(flight: Flight) -> str:
    """Why an engine counts as hanging, or ''. Reads its beat on the way."""
    now = time.monotonic()
    requests, tokens = Beat.read(flight.seat.beat) if flight.item else (0, 0)
    if tokens != flight.tokens:
        flight.requests, flight.tokens, flight.moved = requests, tokens, now
    if now > flight.deadline:
        return "it did not answer by its deadline (chunk_timeout of the machine)"
    if flight.tokens and now - flight.moved > STALL_SECONDS:
        return f"it produced no token for {STALL_SECONDS:.0f} s"
    return ""


def _too_many(flight: Flight, lost: list[str]) -> BackendError:
    reasons = "\n".join(f"engine lost: {reason}" for reason in lost)
    if flight.item:
        what = f"{flight.item.name} ended {len(lost)} engines"
        advice = (
            "Repeat the command: finished chunks are kept and only the rest is asked again. If this one fails again:\n"
            "more memory (lower kv_cache_gb), more time (chunk_timeout of the machine), or find the prompt in the log."
        )
    else:
        what = f"{len(lost)} engines in a row did not start"
        advice = "`selfkd doctor` checks versions and memory. Repeat the command when the cause is gone: nothing is lost."
    return BackendError(what, str(flight.seat.log), f"{reasons}\n{advice}")


def _logger(path: Path) -> logging.Logger:
    logger = logging.getLogger("selfkd.ray")
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    return logger
