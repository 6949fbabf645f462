"""The engines of a run as Ray actors that outlive rounds: starting them, giving them weights and calls, ending them.

An actor is never restarted by Ray: it would come back with the weights of its constructor. A dead one is replaced by a new
one, which is given the current weights and proves them. Which engine gets which call is the business of `dispatch.py`.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfkd.backend.engine.held_engine import HeldEngine, Importable
from selfkd.backend.ray.cluster import actor_class
from selfkd.backend.ray.dispatch import Call, EngineState
from selfkd.core.facts import Facts
from selfkd.core.pool import Model


@dataclass(eq=False, kw_only=True)
class EngineHandle(EngineState):
    """An engine as the driver sees it: its actor, and where its beat can be read."""

    actor: Any
    beat: Path


class EnginePool:
    """The engines that run, `facts`: what those that came up compute with, and `in_flight`: {Ray's reference: who is at work}."""

    def __init__(self, engine: Importable, numerics: dict[str, Any], gpus: float, log: Path) -> None:
        self._engine, self._numerics, self._log = engine, numerics, log
        self._options = {"num_cpus": numerics["threads"], "num_gpus": gpus}
        self._logger = _logger(log / "ray.log")
        self._started = 0
        self._swaps: dict[str, list[dict[str, Any]]] = {}
        self.facts: dict[str, Facts] = {}
        self.engines: list[EngineHandle] = []
        self.in_flight: dict[Any, EngineHandle] = {}

    def start_engine(self) -> EngineHandle:
        """Start one more actor; it imports what it needs while the caller goes on."""
        name = f"engine-{self._started}"
        self._started += 1
        beat, log = self._log / f"{name}.beat", self._log / f"{name}.log"
        actor = actor_class(HeldEngine, **self._options).remote(self._engine, self._numerics, beat, log)
        actor.preload.remote()  # not awaited: the next call queues behind it, and what fails here fails there too
        self.engines.append(EngineHandle(name, log, actor=actor, beat=beat))
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
        self.in_flight[engine.actor.ensure.remote(model)] = engine

    def ensured(self, engine: EngineHandle, weights: str, notes: dict[str, Any], facts: Facts) -> None:
        """Note how an engine came to hold weights, and what it computes with. Notes of other weights are history."""
        self.facts[engine.name] = facts
        self._swaps = {weights: [*self._swaps.get(weights, []), notes]}
        self._logger.info("weights %s: %s", weights[:12], notes)

    def lost(self, engine: EngineHandle, during: str, reason: str) -> None:
        """End an engine that died, hangs, or raised an exception after which nobody can trust it."""
        self.kill_engine(engine)
        self._logger.warning("engine %s lost during %s: %s", engine.name, during, reason)

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
