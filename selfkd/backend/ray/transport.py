"""The way between the dispatcher and the engines: its actions become calls of Ray's actors, and Ray's references become events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selfkd.backend.base import OnAnswers
from selfkd.backend.engine.held_engine import Beat
from selfkd.backend.ray.cluster import FETCH_SECONDS, POLL_SECONDS, in_one_line, unwrapped
from selfkd.backend.ray.dispatch import (
    Action,
    Answered,
    End,
    Ensure,
    Ensured,
    Event,
    Failed,
    Pulse,
    Report,
    Send,
    Start,
    Started,
)
from selfkd.backend.ray.engine_pool import EngineHandle, EnginePool
from selfkd.core.pool import Model
from selfkd.errors import SelfkdError


class RayTransport:
    """The engines of `pool`, which are given the weights of `model`. `on_sent` is called after each call that was sent."""

    def __init__(self, pool: EnginePool, model: Model, on_progress: OnAnswers, on_sent: Callable[[], None]) -> None:
        self._pool, self._model, self._on_progress, self._on_sent = pool, model, on_progress, on_sent

    def wait(self) -> list[Event]:
        import ray

        ready, _ = ray.wait(list(self._pool.in_flight), num_returns=1, timeout=POLL_SECONDS)
        return [self._event(reference) for reference in ready]

    def _event(self, reference: Any) -> Event:
        import ray

        engine = self._pool.in_flight.pop(reference)
        try:
            result = ray.get(reference, timeout=FETCH_SECONDS)
        except Exception as raised:
            error = unwrapped(raised)
            return Failed(engine, in_one_line(error), error if isinstance(error, SelfkdError) else None)
        if engine.work and engine.work.call:
            return Answered(engine, result)
        weights, notes, facts = result
        self._pool.ensured(engine, weights, notes, facts)
        return Ensured(engine, weights)

    def pulses(self) -> Mapping[str, Pulse]:
        busy = [engine for engine in self._pool.engines if engine.work and engine.work.call]
        return {engine.name: Pulse(*Beat.read(engine.beat)) for engine in busy}

    def perform(self, action: Action) -> Sequence[Event]:
        match action:
            case Start():
                return [Started(self._pool.start_engine())]
            case Ensure(EngineHandle() as engine):
                self._pool.ensure(engine, self._model)
            case Send(EngineHandle() as engine, call, following):
                self._pool.send(engine, call, following)
                self._on_sent()
            case End(EngineHandle() as engine, during, reason):
                self._pool.lost(engine, during, reason) if reason else self._pool.kill_engine(engine)
            case Report(progress):
                self._on_progress(progress)
        return []
