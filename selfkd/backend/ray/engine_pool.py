"""The engines of a run as Ray actors that outlive rounds: starting them, giving them weights and calls, ending them.

An actor is never restarted by Ray: it would come back with the weights of its constructor. A dead one is replaced by a new
one, which is given the current weights and proves them. Which engine gets which call is the dispatcher's business.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfkd.backend.engine.held_engine import Beat, HeldEngine, Importable
from selfkd.backend.ray.cluster import POLL_SECONDS, actor_class, in_one_line, unwrapped
from selfkd.backend.ray.placement import Placement, Seat
from selfkd.core.accelerator import await_memory, free_memory
from selfkd.core.facts import Facts
from selfkd.core.pool import Model
from selfkd.errors import SelfkdError

START_SECONDS = 1800.0  # an engine may compile kernels and read a large checkpoint before it first answers
SLEEP_SECONDS = 120.0  # an idle engine falls asleep in one or two
ROOM_SECONDS = 60.0  # asking the driver of a card, ten seconds of waiting included
STALL_SECONDS = 600.0  # an engine that produced tokens for this chunk and then none for so long is hanging


class SeatedEngine(HeldEngine):
    """An engine on a card that ranks use while it sleeps. It knows what it gave back then, and waits for that before it wakes."""

    def __init__(
        self, engine: Importable, numerics: Mapping[str, Any], beat: Path, log: Path | None = None, cards: str | None = None
    ) -> None:
        if cards is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = cards
        super().__init__(engine, numerics, beat, log)
        self._given_back = 0

    def sleep(self) -> None:
        before = free_memory()
        super().sleep()
        after = free_memory()
        self._given_back = max(0, after - before) if before is not None and after is not None else 0

    def ensure(self, model: Model) -> tuple[str, dict[str, Any], Facts]:
        if self._asleep:
            self.has_room()
        return super().ensure(model)

    def has_room(self) -> bool:
        """Whether the memory that this engine gave back is free again; waits a little for a process that has just ended."""
        if not self._given_back:
            return True
        free = await_memory(self._given_back)
        print(f"{free} bytes of the card are free, and {self._given_back} were given back")
        return free is None or free >= self._given_back


@dataclass
class Call:
    """One call of an engine's method, and why each engine was lost that worked on it."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    losses: list[str] = field(default_factory=list)


@dataclass
class EngineHandle:
    """An engine as the driver sees it: the weights it proved to hold, and where its beat and its log can be read."""

    actor: Any
    seat: Seat
    beat: Path
    log: Path
    weights: str = ""


@dataclass
class InFlight:
    """What one engine is doing. `call` is None while it starts or swaps its weights."""

    engine: EngineHandle
    call: Call | None
    deadline: float
    requests: int = 0
    tokens: int = 0
    moved: float = field(default_factory=time.monotonic)

    def overdue(self) -> str:
        """Return why the engine counts as hanging, or ''. Reads its beat on the way."""
        now = time.monotonic()
        requests, tokens = Beat.read(self.engine.beat) if self.call else (0, 0)
        if tokens != self.tokens:
            self.requests, self.tokens, self.moved = requests, tokens, now
        if now > self.deadline:
            return "it did not answer by its deadline (chunk_timeout of the machine)"
        if self.tokens and now - self.moved > STALL_SECONDS:
            return f"it produced no token for {STALL_SECONDS:.0f} s"
        return ""


class EnginePool:
    """The engines that run, one for each seat of the placement at most.

    `facts`: what those that came up compute with. `in_flight`: {Ray's reference: what it is doing}.
    """

    def __init__(self, engine: Importable, numerics: dict[str, Any], placement: Placement, log: Path) -> None:
        self._engine, self._numerics, self._placement, self._log = engine, numerics, placement, log
        self._logger = _logger(log / "ray.log")
        self._started = 0
        self._swaps: dict[str, list[dict[str, Any]]] = {}
        self.facts: dict[str, Facts] = {}
        self.engines: list[EngineHandle] = []
        self.in_flight: dict[Any, InFlight] = {}

    def start_engine(self) -> None:
        """Start one more actor, on a seat that is free; it imports what it needs while the caller goes on."""
        name = f"engine-{self._started}"
        self._started += 1
        taken = [engine.seat for engine in self.engines]
        seat = next(seat for seat in self._placement.planned.engines if seat not in taken)
        beat, log = self._log / f"{name}.beat", self._log / f"{name}.log"
        kind = actor_class(SeatedEngine, **self._placement.options(seat))
        actor = kind.remote(self._engine, self._numerics, beat, log, self._placement.visible(seat))
        actor.preload.remote()  # not awaited: the next call queues behind it, and what fails here fails there too
        self.engines.append(EngineHandle(actor, seat, beat, log))

    def kill_engine(self, engine: EngineHandle) -> None:
        """End an engine whatever it is doing, and forget it."""
        import ray

        with suppress(ray.exceptions.RayError):  # it may be dead already
            ray.kill(engine.actor, no_restart=True)
        if engine in self.engines:
            self.engines.remove(engine)
        engine.beat.unlink(missing_ok=True)

    def idle(self) -> list[EngineHandle]:
        """Return the engines with nothing in flight."""
        busy = [id(work.engine) for work in self.in_flight.values()]
        return [engine for engine in self.engines if id(engine) not in busy]

    def answering(self) -> list[InFlight]:
        """Return what is in flight without the starts and swaps."""
        return [work for work in self.in_flight.values() if work.call]

    def send(self, engine: EngineHandle, call: Call, timeout: float) -> None:
        """Give an idle engine something to answer within `timeout` seconds."""
        reference = getattr(engine.actor, call.method).remote(*call.arguments)
        self.in_flight[reference] = InFlight(engine, call, time.monotonic() + timeout)

    def ensure(self, engine: EngineHandle, model: Model) -> None:
        """Have an engine start or swap its weights, so that it holds `model`."""
        reference = engine.actor.ensure.remote(model)
        self.in_flight[reference] = InFlight(engine, None, time.monotonic() + START_SECONDS)

    def ensured(self, engine: EngineHandle, weights: str, notes: dict[str, Any], facts: Facts) -> None:
        """Note which weights an engine proved to hold, and what it computes with. Notes of other weights are history."""
        engine.weights = weights
        self.facts[engine.log.stem] = facts
        self._swaps = {weights: [*self._swaps.get(weights, []), notes]}
        self._logger.info("weights %s: %s", weights[:12], notes)

    def lost(self, work: InFlight, reason: str) -> None:
        """End an engine that died, hangs, or raised an exception after which nobody can trust it."""
        self.kill_engine(work.engine)
        during = work.call.name if work.call else "its start"
        self._logger.warning("engine %s lost during %s: %s", work.engine.log.stem, during, reason)

    def sleep(self) -> None:
        """Have every engine give its card's memory back. One that cannot is ended, which gives it back too."""
        starting = any(work.call is None for work in self.in_flight.values())
        self.in_flight = {reference: work for reference, work in self.in_flight.items() if work.call}
        calls = {engine.actor.sleep.remote(): engine for engine in self.engines}
        self._await(calls, START_SECONDS if starting else SLEEP_SECONDS, "going to sleep")
        for engine in self.engines:
            engine.weights = ""

    def have_room(self) -> bool:
        """Whether what the sleeping engines gave back is free again."""
        calls = {engine.actor.has_room.remote(): engine for engine in self.engines}
        return all(self._await(calls, ROOM_SECONDS, "looking for room on its card"))

    def _await(self, calls: dict[Any, EngineHandle], seconds: float, during: str) -> list[Any]:
        """Return what each engine answers; one that fails, dies or hangs is ended, for it can be replaced."""
        import ray

        deadline, answers = time.monotonic() + seconds, []
        waiting = list(calls)
        while waiting and time.monotonic() < deadline:
            ready, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            for call in ready:
                try:
                    answers.append(ray.get(call, timeout=seconds))
                except Exception as error:
                    self._give_up(calls[call], unwrapped(error), during)
        for call in waiting:
            self._give_up(calls[call], TimeoutError(f"no answer within {seconds:.0f} s"), during)
        return answers

    def _give_up(self, engine: EngineHandle, error: BaseException, during: str) -> None:
        if isinstance(error, SelfkdError):
            raise error
        self.kill_engine(engine)
        self._logger.warning("engine %s lost while %s: %s", engine.log.stem, during, in_one_line(error))

    def abandon(self) -> None:
        """End the engines that answer: a busy one takes no other call, and a process can be replaced."""
        for reference, work in list(self.in_flight.items()):
            if work.call:
                del self.in_flight[reference]
                self.kill_engine(work.engine)

    def swap_notes(self, weights: str) -> dict[str, Any]:
        """Return notes on the engines that got these weights: the longest swap, the worst proof, the smallest surviving share."""
        notes = self._swaps.get(weights, [])
        survived = [note["survived"] for note in notes if note.get("survived") is not None]
        unproved = [note.get("proved") for note in notes if note.get("proved") is not True]
        return {
            "seconds": max((note.get("seconds", 0.0) for note in notes), default=0.0),
            "proved": unproved[0] if unproved else True if notes else None,
            "survived": min(survived, default=None),
            "engines": len(notes),
        }

    def close(self) -> None:
        for engine in list(self.engines):
            self.kill_engine(engine)


def _logger(path: Path) -> logging.Logger:
    logger = logging.getLogger("selfkd.ray")
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    return logger
