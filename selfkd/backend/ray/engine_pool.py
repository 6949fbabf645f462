"""The engines of a run as Ray actors that outlive rounds: starting them, giving them weights and calls, ending them.

An actor is never restarted by Ray: it would come back with the weights of its constructor. A dead one is replaced by a new
one, which is given the current weights and proves them. Which engine gets which call is the business of `dispatch.py`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfkd.backend.engine.held_engine import HeldEngine, Importable
from selfkd.backend.probe import Earlier
from selfkd.backend.ray.cluster import POLL_SECONDS, actor_class, in_one_line, unwrapped
from selfkd.backend.ray.dispatch import START_SECONDS, Call, EngineState
from selfkd.backend.ray.placement import Placement, Seat
from selfkd.core.accelerator import await_memory, free_memory
from selfkd.core.facts import Facts
from selfkd.core.pool import Model
from selfkd.errors import SelfkdError

SLEEP_SECONDS = 120.0  # an idle engine falls asleep in one or two
SCORE_SECONDS = 600.0  # reading all rows of an update, and one pass over twelve short sequences
ROOM_SECONDS = 60.0  # asking the driver of a card, ten seconds of waiting included


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

    def ensure(self, model: Model, earlier: Earlier | None = None) -> tuple[str, dict[str, Any], Facts]:
        if self._asleep:
            self.has_room()
        return super().ensure(model, earlier)

    def has_room(self) -> bool:
        """Whether the memory that this engine gave back is free again; waits a little for a process that has just ended."""
        if not self._given_back:
            return True
        free = await_memory(self._given_back)
        print(f"{free} bytes of the card are free, and {self._given_back} were given back")
        return free is None or free >= self._given_back


@dataclass(eq=False, kw_only=True)
class EngineHandle(EngineState):
    """An engine as the driver sees it: its actor, where it sits, and where its beat can be read."""

    actor: Any
    seat: Seat
    beat: Path


class EnginePool:
    """The engines that run, one for each seat of the placement at most.

    `facts`: what those that came up compute with. `in_flight`: {Ray's reference: who is at work}.
    """

    def __init__(self, engine: Importable, numerics: dict[str, Any], placement: Placement, log: Path) -> None:
        self._engine, self._numerics, self._placement, self._log = engine, numerics, placement, log
        self._logger = _logger(log / "ray.log")
        self._started = 0
        self._swaps: dict[str, list[dict[str, Any]]] = {}
        self._earlier: Earlier | None = None
        self.facts: dict[str, Facts] = {}
        self.engines: list[EngineHandle] = []
        self.in_flight: dict[Any, EngineHandle] = {}

    def start_engine(self) -> EngineHandle:
        """Start one more actor, on a seat that is free; it imports what it needs while the caller goes on."""
        name = f"engine-{self._started}"
        self._started += 1
        taken = [engine.seat for engine in self.engines]
        seat = next(seat for seat in self._placement.planned.engines if seat not in taken)
        beat, log = self._log / f"{name}.beat", self._log / f"{name}.log"
        kind = actor_class(SeatedEngine, **self._placement.options(seat))
        actor = kind.remote(self._engine, self._numerics, beat, log, self._placement.visible(seat))
        actor.preload.remote()  # not awaited: the next call queues behind it, and what fails here fails there too
        self.engines.append(EngineHandle(name, log, actor=actor, seat=seat, beat=beat))
        return self.engines[-1]

    def kill_engine(self, engine: EngineHandle) -> None:
        """End an engine whatever it is doing, and forget it."""
        import ray

        with suppress(ray.exceptions.RayError):  # it may be dead already
            ray.kill(engine.actor, no_restart=True)
        if engine in self.engines:
            self.engines.remove(engine)
        self.in_flight = {reference: other for reference, other in self.in_flight.items() if other is not engine}
        engine.beat.unlink(missing_ok=True)

    def send(self, engine: EngineHandle, call: Call, following: Call | None) -> None:
        """Give an idle engine something to answer, and tell it what it is given next."""
        ahead = [following.ahead] if following else []
        self.in_flight[getattr(engine.actor, call.method).remote(*call.arguments, *ahead)] = engine

    def ensure(self, engine: EngineHandle, model: Model) -> None:
        """Have an engine start or swap its weights, so that it holds `model`."""
        self.in_flight[engine.actor.ensure.remote(model, self._earlier)] = engine

    def ensured(self, engine: EngineHandle, weights: str, notes: dict[str, Any], facts: Facts) -> None:
        """Note how an engine came to hold weights, and what it computes with. Notes of other weights are history."""
        self.facts[engine.name] = facts
        self._swaps = {weights: [*self._swaps.get(weights, []), notes]}
        self._logger.info("weights %s: %s", weights[:12], notes)

    def lost(self, engine: EngineHandle, during: str, reason: str) -> None:
        """End an engine that died, hangs, or raised an exception after which nobody can trust it."""
        self.kill_engine(engine)
        self._logger.warning("engine %s lost during %s: %s", engine.name, during, reason)

    def before_update(self, start: Model, rows: Sequence[Path], pairs: bool, max_length: int) -> None:
        """Have an engine that holds `start` score what an update may keep as evidence, for every engine that is given the child."""
        self._earlier = None
        awake = next((one for one in self.engines if one.work is None and one.weights == start.digest), None)
        if awake:
            call = awake.actor.before_update.remote(start, list(rows), pairs, max_length)
            found = self._await({call: awake}, SCORE_SECONDS, "scoring before an update")
            self._earlier = found[0] if found else None

    def sleep(self) -> None:
        """Have every engine give its card's memory back. One that cannot is ended, which gives it back too."""
        starting = any(engine.work and engine.work.call is None for engine in self.in_flight.values())
        self.in_flight = {reference: one for reference, one in self.in_flight.items() if one.work and one.work.call}
        calls = {engine.actor.sleep.remote(): engine for engine in self.engines}
        self._await(calls, START_SECONDS if starting else SLEEP_SECONDS, "going to sleep")
        for engine in self.engines:
            engine.weights, engine.work = "", None  # whatever it was loading meanwhile, it does not hold it any more

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
        self._logger.warning("engine %s lost while %s: %s", engine.name, during, in_one_line(error))

    def swap_notes(self, weights: str) -> dict[str, Any]:
        """Return notes on the engines that got these weights: the longest swap, the worst proof, the smallest surviving share."""
        notes = self._swaps.get(weights, [])
        survived = [note["survived"] for note in notes if note.get("survived") is not None]
        unproved = [note.get("proved") for note in notes if note.get("proved") is not True]
        apart = max((note["apart"] for note in notes if note.get("apart")), key=lambda one: one["mean"], default=None)
        return {
            **({"apart": apart} if apart else {}),
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
