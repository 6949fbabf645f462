"""Who does what next: which engine starts, is given weights or a call, is given up, and when the run stops. A function of events.

Knows neither Ray nor a clock: whoever drives it says what happened and when, and carries out what it answers. So a test or a
simulator drives it as the backend does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from selfkd.backend.base import REPORT_SECONDS, AnswerProgress
from selfkd.errors import BackendError, SelfkdError

START_SECONDS = 1800.0  # an engine may compile kernels and read a large checkpoint before it first answers
STALL_SECONDS = 600.0  # an engine that made steps for this chunk and then none for so long is hanging
MOST_LOST_ENGINES = 2  # this many engines lost to one chunk stop the run: it is the chunk
MOST_FAILED_STARTS = 2  # this many engines lost while starting or swapping stop the run: it is the machine
MOST_STEPS = 2  # for each token that is asked for, which is more than prompts and answers need: an engine that makes more turns in a circle
USUAL_TOKENS = 256 * 256  # that a call may ask for within `chunk_timeout`: 256 answers of 256 tokens


class Pulse(NamedTuple):
    """How far a call in flight is: requests finished, tokens, and steps of the engine."""

    requests: int = 0
    tokens: int = 0
    steps: int = 0


NO_PULSE = Pulse()


@dataclass
class Call:
    """One call of an engine's method, the most tokens it asks for, and why each engine was lost that worked on it.

    `ahead` is what an engine may be told of it while it works on another call.
    """

    name: str
    method: str
    arguments: tuple[Any, ...]
    tokens: int = 0
    ahead: Any = None
    losses: list[str] = field(default_factory=list)

    def seconds(self, timeout: float) -> float:
        """Return how long an engine may take: `timeout`, and in proportion where more than USUAL_TOKENS are asked for."""
        return timeout * max(1.0, self.tokens / USUAL_TOKENS)


@dataclass
class Work:
    """What an engine is doing, until when at most, and how far it was last. `call` is None while it starts or swaps its weights."""

    call: Call | None
    deadline: float
    pulse: Pulse = NO_PULSE
    moved: float = 0.0

    def overdue(self, pulse: Pulse, now: float) -> str:
        """Note how far the engine is; return why it counts as hanging, or ''."""
        if self.call and pulse != self.pulse:
            self.pulse, self.moved = pulse, now
        if self.pulse.steps and now - self.moved > STALL_SECONDS:
            return f"it made no step for {STALL_SECONDS:.0f} s"
        if now > self.deadline and not self._goes_on():
            return "it did not answer by its deadline (chunk_timeout of the machine)"
        return ""

    def _goes_on(self) -> bool:
        """Whether the engine makes steps that answers need: one long answer takes as many as it has tokens, however long each takes."""
        return self.call is not None and 0 < self.pulse.steps <= MOST_STEPS * self.call.tokens


@dataclass(eq=False)
class EngineState:
    """An engine as the dispatcher sees it: the weights it proved to hold, the kind it came up with, and what it is doing.

    `promised` is the call that it is sent next: it was told of it, and may be at work on it already.
    """

    name: str
    log: Path
    weights: str = ""
    kind: str = ""
    work: Work | None = None
    promised: Call | None = None


@dataclass(frozen=True)
class Wanted:
    """The weights that answer, and the kind of engine that can hold them."""

    weights: str
    kind: str


@dataclass(frozen=True)
class Limits:
    """How many engines there may be, how long a usual call may take, and how many calls an engine may know of (1 or 2)."""

    engines: int
    timeout: float
    depth: int = 1


# ---- what happens ----


@dataclass(frozen=True)
class Started:
    """The engine that was asked for is there; its imports may still run."""

    engine: EngineState


@dataclass(frozen=True)
class Ensured:
    """An engine proved that it holds these weights."""

    engine: EngineState
    weights: str


@dataclass(frozen=True)
class Answered:
    engine: EngineState
    result: Any


@dataclass(frozen=True)
class Failed:
    """An engine died, or its call raised. `error` is there where it is one for the user."""

    engine: EngineState
    reason: str
    error: SelfkdError | None = None


@dataclass(frozen=True)
class Tick:
    """Time has passed. `pulses`: how far the calls of busy engines are, by the engine's name."""

    pulses: Mapping[str, Pulse] = field(default_factory=dict)


Event = Started | Ensured | Answered | Failed | Tick

# ---- what is to be done ----


@dataclass(frozen=True)
class Start:
    """Start one more engine."""


@dataclass(frozen=True)
class Ensure:
    """Have an engine start or swap its weights, so that it holds those that are wanted."""

    engine: EngineState


@dataclass(frozen=True)
class Send:
    """Give an engine a call; it may begin with `following`, which it is sent next."""

    engine: EngineState
    call: Call
    following: Call | None


@dataclass(frozen=True)
class End:
    """End an engine whatever it is doing. `reason` is why it counts as lost; '' where it is only in the way."""

    engine: EngineState
    during: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Report:
    progress: AnswerProgress


@dataclass(frozen=True)
class Stop:
    """Raise the error: asking again would not help."""

    error: SelfkdError


Action = Start | Ensure | Send | End | Report | Stop


class Dispatch:
    """One call of `generate` or `logprobs`: which calls wait, and which engines were lost. Only the engines outlive it."""

    def __init__(self, engines: Iterable[EngineState], wanted: Wanted, calls: Iterable[Call], limits: Limits) -> None:
        self.engines, self._wanted, self._limits = list(engines), wanted, limits
        self._waiting = deque(calls)
        self._most_engines = min(limits.engines, len(self._waiting))
        self._starting = 0
        self._failed_starts: list[str] = []
        self._delivered = 0
        self._reported = -math.inf
        self._quiet = True  # nothing was delivered since the last tick

    @property
    def done(self) -> bool:
        return not self._waiting and not any(engine.promised for engine in self.engines) and not self._answering()

    def begin(self, now: float) -> list[Action]:
        return list(self._assign(now))

    def warm(self, now: float) -> list[Action]:
        """Have all engines there may be start with the weights, before there is anything to answer."""
        missing = self._limits.engines - len(self.engines) - self._starting
        self._starting += max(0, missing)
        return [*(Start() for _ in range(missing)), *self._ensure_idle(now)]

    def on(self, event: Event, now: float) -> list[Action]:
        """Return what is to be done now that this has happened."""
        match event:
            case Started(engine):
                self._starting -= 1
                self.engines.append(engine)
                return list(self._ensure_idle(now))
            case Ensured(engine, weights):
                engine.weights, engine.work = weights, None
                return list(self._assign(now))
            case Answered(engine):
                engine.work = None
                self._delivered, self._quiet = self._delivered + 1, False
                return list(self._assign(now))
            case Failed(engine, reason, error):
                return list(self._lose(engine, reason, error, now))
            case Tick(pulses):
                return [*self._overdue(pulses, now), *self._report(now)]

    def abandon(self) -> list[Action]:
        """End the engines that answer: a busy one takes no other call, and a process can be replaced."""
        ended = self._answering()
        for engine in ended:
            self._leave(engine)
        for engine in self.engines:
            engine.promised = None  # those of an engine that is not at work
        return [End(engine) for engine in ended]

    # ---- engines ----

    def _fits(self, engine: EngineState) -> bool:
        return engine.kind in ("", self._wanted.kind)

    def _idle(self) -> list[EngineState]:
        return [engine for engine in self.engines if engine.work is None and self._fits(engine)]

    def _answering(self) -> list[EngineState]:
        return [engine for engine in self.engines if engine.work and engine.work.call]

    def _assign(self, now: float) -> Iterator[Action]:
        """Start engines that are missing, and give each idle one the weights, or its next call."""
        yield from self._hire()
        for engine in self._idle():
            if engine.weights == self._wanted.weights and (engine.promised or self._waiting):
                yield self._send(engine, engine.promised or self._waiting.popleft(), now)
        if self._waiting:
            yield from self._ensure_idle(now)

    def _hire(self) -> Iterator[Action]:
        """Start engines while fewer fit than are wanted; an idle one of another kind makes room."""
        fitting = sum(self._fits(engine) for engine in self.engines) + self._starting
        for _ in range(self._most_engines - fitting if self._waiting else 0):
            if len(self.engines) + self._starting >= self._limits.engines:
                other = next((engine for engine in self.engines if engine.work is None and not self._fits(engine)), None)
                if other is None:
                    return  # they are busy with a swap that nobody wants any more
                self.engines.remove(other)
                yield End(other)
            self._starting += 1
            yield Start()

    def _ensure_idle(self, now: float) -> Iterator[Action]:
        for engine in self._idle():
            if engine.weights != self._wanted.weights:
                engine.kind, engine.work = self._wanted.kind, Work(None, now + START_SECONDS)
                yield Ensure(engine)

    # ---- calls ----

    def _send(self, engine: EngineState, call: Call, now: float) -> Send:
        engine.work = Work(call, now + call.seconds(self._limits.timeout), moved=now)
        engine.promised = self._waiting.popleft() if self._may_know_two(engine) else None
        return Send(engine, call, engine.promised)

    def _may_know_two(self, engine: EngineState) -> bool:
        """Whether a second call would still be within the engine's share of what is left: the last ones go to who is free first."""
        held = sum(bool(one.work and one.work.call) + bool(one.promised) for one in self.engines if one is not engine)
        left = len(self._waiting) + held + 1
        return self._limits.depth > 1 and bool(self._waiting) and math.ceil(left / self._most_engines) > 1

    def _lose(self, engine: EngineState, reason: str, error: SelfkdError | None, now: float) -> Iterator[Action]:
        """Give up an engine and ask again, unless the error is one for the user or one loss too many."""
        call = engine.work.call if engine.work else None
        if error is not None:
            engine.work = None
            yield Stop(error)
            return
        self._leave(engine)
        yield End(engine, call.name if call else "its start", reason)
        losses, most = (call.losses, MOST_LOST_ENGINES) if call else (self._failed_starts, MOST_FAILED_STARTS)
        losses.append(reason)
        if len(losses) >= most:
            yield Stop(_too_many_lost(call, engine.log) if call else _too_many_failed_starts(losses, engine.log))
            return
        if call:
            self._waiting.appendleft(call)  # the next one to be sent
        yield from self._assign(now)

    def _leave(self, engine: EngineState) -> None:
        """Forget an engine that ends; what it was promised waits again."""
        self.engines.remove(engine)
        if engine.promised:
            self._waiting.appendleft(engine.promised)
        engine.work = engine.promised = None

    # ---- time ----

    def _overdue(self, pulses: Mapping[str, Pulse], now: float) -> Iterator[Action]:
        for engine in [engine for engine in self.engines if engine.work]:
            if engine.work and (reason := engine.work.overdue(pulses.get(engine.name, NO_PULSE), now)):
                yield from self._lose(engine, f"TimeoutError: {reason}", None, now)

    def _report(self, now: float) -> Iterator[Action]:
        """Tell how far unfinished calls are, where no result has told it."""
        answering = [engine.work for engine in self._answering() if engine.work]
        if self._quiet and answering and now - self._reported >= REPORT_SECONDS:
            self._reported = now
            waiting = len(self._waiting) + len(answering) + sum(bool(engine.promised) for engine in self.engines)
            requests, tokens = sum(work.pulse.requests for work in answering), sum(work.pulse.tokens for work in answering)
            yield Report(AnswerProgress(requests=requests, tokens=tokens, chunks=self._delivered, waiting=waiting))
        self._quiet = True


class Transport(Protocol):
    """What reaches the engines: Ray's actors, or a test's."""

    def wait(self) -> Sequence[Event]:
        """Wait a moment; return what happened to engines."""

    def pulses(self) -> Mapping[str, Pulse]:
        """Return how far the calls of busy engines are, by the engine's name."""

    def perform(self, action: Action) -> Iterable[Event]:
        """Carry out what is to be done; return what it brought about at once."""


def results(dispatch: Dispatch, transport: Transport, clock: Callable[[], float]) -> Generator[Any, None, None]:
    """Yield the results of all calls in the order in which they finish; closing it abandons what is in flight.

    The caller may take its time with a result: what follows from it was sent before. What has arrived is delivered even where
    that fails, or something else stops the run: the error is raised after it.
    """
    try:
        carry_out(dispatch.begin(clock()), dispatch, transport, clock)
        while not dispatch.done:
            events = transport.wait()
            try:
                for event in (*events, Tick(transport.pulses())):
                    carry_out(dispatch.on(event, clock()), dispatch, transport, clock)
            finally:
                yield from [event.result for event in events if isinstance(event, Answered)]
    finally:
        for action in dispatch.abandon():
            transport.perform(action)


def carry_out(actions: Iterable[Action], dispatch: Dispatch, transport: Transport, clock: Callable[[], float]) -> None:
    """Perform actions and those they lead to."""
    todo = deque(actions)
    while todo:
        match todo.popleft():
            case Stop(error):
                raise error
            case action:
                for event in transport.perform(action):
                    todo += dispatch.on(event, clock())


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
