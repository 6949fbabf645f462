"""The engines of a run as Ray actors that outlive rounds: starting them, giving them weights and calls, ending them.

An actor is never restarted by Ray: it would come back with the weights of its constructor. A dead one is replaced by a new
one, which is given the current weights and proves them. Which engine gets which call is the dispatcher's business.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfkd.backend.engine.held_engine import Beat, HeldEngine, Importable
from selfkd.backend.ray.cluster import actor_class
from selfkd.core.facts import Facts
from selfkd.core.pool import Model

START_SECONDS = 1800.0  # an engine may compile kernels and read a large checkpoint before it first answers
STALL_SECONDS = 600.0  # an engine that made steps for this chunk and then none for so long is hanging


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
    steps: int = 0
    moved: float = field(default_factory=time.monotonic)

    def overdue(self) -> str:
        """Return why the engine counts as hanging, or ''. Reads its beat on the way."""
        now = time.monotonic()
        requests, tokens, steps = Beat.read(self.engine.beat) if self.call else (0, 0, 0)
        if (tokens, steps) != (self.tokens, self.steps):
            self.requests, self.tokens, self.steps, self.moved = requests, tokens, steps, now
        if now > self.deadline:
            return "it did not answer by its deadline (chunk_timeout of the machine)"
        if (self.tokens or self.steps) and now - self.moved > STALL_SECONDS:
            return f"it made no step for {STALL_SECONDS:.0f} s"
        return ""


class EnginePool:
    """The engines that run, `facts`: what those that came up compute with, and `in_flight`: {Ray's reference: what it is doing}."""

    def __init__(self, engine: Importable, numerics: dict[str, Any], gpus: float, log: Path) -> None:
        self._engine, self._numerics, self._log = engine, numerics, log
        self._options = {"num_cpus": numerics["threads"], "num_gpus": gpus}
        self._logger = _logger(log / "ray.log")
        self._started = 0
        self._swaps: dict[str, list[dict[str, Any]]] = {}
        self.facts: dict[str, Facts] = {}
        self.engines: list[EngineHandle] = []
        self.in_flight: dict[Any, InFlight] = {}

    def start_engine(self) -> None:
        """Start one more actor; it imports what it needs while the caller goes on."""
        name = f"engine-{self._started}"
        self._started += 1
        beat, log = self._log / f"{name}.beat", self._log / f"{name}.log"
        actor = actor_class(HeldEngine, **self._options).remote(self._engine, self._numerics, beat, log)
        actor.preload.remote()  # not awaited: the next call queues behind it, and what fails here fails there too
        self.engines.append(EngineHandle(actor, beat, log))

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
