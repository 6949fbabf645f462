"""The dispatcher as a function of events: a fake world with a clock of its own drives it, so hours of hanging take no time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfkd.backend.engine.held_engine import Beat
from selfkd.backend.model_files import engine_kind
from selfkd.backend.ray.dispatch import (
    STALL_SECONDS,
    Action,
    Answered,
    Call,
    Dispatch,
    End,
    EngineState,
    Ensure,
    Ensured,
    Event,
    Failed,
    Limits,
    Pulse,
    Report,
    Send,
    Start,
    Started,
    Wanted,
    carry_out,
    results,
)
from selfkd.errors import BackendError, UsageError

NEW = Wanted("new", "small")
OTHER = Wanted("other", "large")
Fate = Callable[[EngineState, "Call | None"], Any]


def well(engine: EngineState, call: Call | None) -> Any:
    """The fate of an engine to which nothing happens: it takes one second."""
    return 1.0


@dataclass
class World:
    """Engines that do what `fate(engine, call)` says: answer after so many seconds, 'hang', 'stall' after a first step, or fail with an error."""

    fate: Fate = well
    wanted: Wanted = NEW
    now: float = 0.0
    engines: list[EngineState] = field(default_factory=list)
    due: list[tuple[float, int, EngineState, Event]] = field(default_factory=list)
    arrived: list[str] = field(default_factory=list)  # results that were told of
    at_once: bool = False  # whether one wait tells of all that is due
    broken: set[str] = field(default_factory=set)  # calls that cannot be sent
    stalled: set[str] = field(default_factory=set)
    began: dict[str, float] = field(default_factory=dict)
    sent: list[tuple[str, str, str]] = field(default_factory=list)  # engine, call, the one that is to follow
    ended: list[tuple[str, str]] = field(default_factory=list)
    ensured: list[tuple[str, str]] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    most: int = 0

    def clock(self) -> float:
        return self.now

    def wait(self) -> list[Event]:
        """Let a quarter of a second pass, or what is left until the next event; half a minute where engines only hang."""
        self.due.sort(key=lambda one: one[:2])
        if self.due and self.due[0][0] <= self.now + 0.25:
            self.now = max(self.now, self.due[0][0])
            count = sum(at <= self.now for at, *_ in self.due) if self.at_once else 1
            told, self.due = [event for *_, event in self.due[:count]], self.due[count:]
            self.arrived += [event.result for event in told if isinstance(event, Answered)]
            return told
        self.now += 0.25 if self.due else 30.0
        return []

    def pulses(self) -> Mapping[str, Pulse]:
        seconds = {engine.name: int(self.now - self.began.get(engine.name, self.now)) for engine in self.engines}
        return {
            name: Pulse(0, 0, 1) if name in self.stalled else Pulse(passed, 10 * passed, passed)
            for name, passed in seconds.items()
        }

    def perform(self, action: Action) -> Iterable[Event]:
        match action:
            case Start():
                self.engines.append(EngineState(f"engine-{len(self.ended) + len(self.engines)}", Path("engine.log")))
                self.most = max(self.most, len(self.engines))
                return [Started(self.engines[-1])]
            case Ensure(engine):
                self.ensured.append((engine.name, self.wanted.weights))
                self._later(engine, None, Ensured(engine, self.wanted.weights))
            case Send(_, call, _) if call.name in self.broken:
                raise ConnectionError(f"{call.name} cannot be sent")
            case Send(engine, call, following):
                assert engine.weights == self.wanted.weights and not any(one[2] is engine for one in self.due)
                self.sent.append((engine.name, call.name, following.name if following else ""))
                self.began[engine.name] = self.now
                self._later(engine, call, Answered(engine, call.name))
            case End(engine, _, reason):
                self.ended.append((engine.name, reason))
                self.engines.remove(engine)
                self.stalled.discard(engine.name)
                self.due = [one for one in self.due if one[2] is not engine]
            case Report(progress):
                self.reports.append(progress)
        return []

    def _later(self, engine: EngineState, call: Call | None, event: Event) -> None:
        fate = self.fate(engine, call)
        if isinstance(fate, UsageError):
            self.due.append((self.now + 1, len(self.sent), engine, Failed(engine, str(fate), fate)))
        elif isinstance(fate, Exception):
            self.due.append((self.now + 1, len(self.sent), engine, Failed(engine, f"{type(fate).__name__}: {fate}")))
        elif fate in ("hang", "stall"):
            self.stalled |= {engine.name} if fate == "stall" else set()
            self.began.pop(engine.name, None)  # no pulse
        else:
            self.due.append((self.now + fate, len(self.sent), engine, event))


def calls(count: int, tokens: int = 0) -> list[Call]:
    return [Call(f"c{number}", "generate", (), tokens) for number in range(count)]


def go(world: World, count: int, engines: int = 1, depth: int = 1, timeout: float = 100.0, tokens: int = 0) -> list[str]:
    dispatch = Dispatch(world.engines, world.wanted, calls(count, tokens), Limits(engines, timeout, depth))
    return list(results(dispatch, world, world.clock))


class Fates:
    """A fate for the first times that something is asked of a call (or of a start: None); well ever after."""

    def __init__(self, **fates: list[Any]) -> None:
        self.left = {name: list(given) for name, given in fates.items()}

    def __call__(self, engine: EngineState, call: Call | None) -> Any:
        left = self.left.get(call.name if call else "start", [])
        return left.pop(0) if left else 1.0


def test_each_call_is_answered_once_by_engines_that_were_given_the_weights_first() -> None:
    world = World()
    assert sorted(go(world, 5, engines=2)) == ["c0", "c1", "c2", "c3", "c4"]
    assert world.ensured == [("engine-0", "new"), ("engine-1", "new")]
    assert world.most == 2


def test_no_more_engines_start_than_there_are_calls() -> None:
    world = World()
    go(world, 2, engines=8)
    assert world.most == 2


def test_a_quick_engine_answers_more_than_a_slow_one() -> None:
    world = World(lambda engine, call: 10.0 if call and engine.name == "engine-0" else 1.0)
    go(world, 11, engines=2)
    assert Counter(engine for engine, _, _ in world.sent) == {"engine-0": 1, "engine-1": 10}


def test_a_call_whose_engine_died_is_the_next_to_be_asked_of_a_new_engine() -> None:
    world = World(Fates(c0=[RuntimeError("gone")]))
    assert go(world, 2) == ["c0", "c1"]
    assert [(engine, call) for engine, call, _ in world.sent] == [("engine-0", "c0"), ("engine-1", "c0"), ("engine-1", "c1")]
    assert world.ended == [("engine-0", "RuntimeError: gone")]


def test_a_call_that_ends_two_engines_stops_the_run_and_is_named() -> None:
    with pytest.raises(BackendError, match="c1 ended 2 engines") as caught:
        go(World(Fates(c1=[RuntimeError("one"), RuntimeError("two")])), 3)
    assert "engine lost: RuntimeError: one\nengine lost: RuntimeError: two" in caught.value.fix


def test_two_engines_that_do_not_start_stop_the_run() -> None:
    with pytest.raises(BackendError, match="2 engines in a row did not start"):
        go(World(Fates(start=[RuntimeError("no memory"), RuntimeError("no memory")])), 1)


def test_one_failed_start_is_made_up_for() -> None:
    world = World(Fates(start=[RuntimeError("no memory")]))
    assert go(world, 1) == ["c0"]


def test_an_error_for_the_user_stops_at_once_and_its_engine_lives_on() -> None:
    world = World(Fates(c0=[UsageError("prompt 7 is too long", "prompts")]))
    with pytest.raises(UsageError, match="prompt 7"):
        go(world, 3)
    assert [engine.name for engine in world.engines] == ["engine-0"]
    assert world.ended == [] and world.engines[0].work is None


def test_an_engine_that_does_not_answer_by_its_deadline_is_given_up() -> None:
    world = World(Fates(c0=["hang"]))
    assert go(world, 1, timeout=100.0) == ["c0"]
    assert world.ended == [("engine-0", "TimeoutError: it did not answer by its deadline (chunk_timeout of the machine)")]
    assert 100.0 <= world.now <= 134.0


def test_a_call_that_asks_for_four_times_the_usual_tokens_has_four_times_the_time() -> None:
    world = World(Fates(c0=[399.0]))
    assert go(world, 1, timeout=100.0, tokens=4 * 256 * 256) == ["c0"]
    assert world.ended == []


def test_an_engine_that_made_steps_and_then_none_is_given_up_before_its_deadline() -> None:
    world = World(Fates(c0=["stall"]))
    assert go(world, 1, timeout=1e9) == ["c0"]
    assert world.ended == [("engine-0", f"TimeoutError: it made no step for {STALL_SECONDS:.0f} s")]


def test_a_long_tail_in_which_no_request_finishes_is_no_stall(tmp_path: Path) -> None:
    """An engine that spans several cards knows no tokens of unfinished requests: it says how many steps it made."""
    beat = Beat(tmp_path / "beat")
    beat.put(0, 0, 2)
    assert Beat.read(tmp_path / "beat") == (0, 0, 2)
    world = World(Fates(c0=[3 * STALL_SECONDS]))
    assert go(world, 1, timeout=1e9) == ["c0"]
    assert world.ended == []


def test_one_very_long_answer_is_no_hang_however_slowly_its_tokens_come() -> None:
    """A token a second: 32,768 of them take nine hours, where an engine has an hour for a usual chunk."""
    world = World(Fates(c0=[32_768.0]))
    assert go(world, 1, timeout=3600.0, tokens=32_768) == ["c0"]
    assert world.ended == []


def test_an_engine_that_makes_more_steps_than_its_answers_can_have_is_given_up_at_its_deadline() -> None:
    world = World(Fates(c0=[10_000.0]))
    assert go(world, 1, timeout=3600.0, tokens=1000) == ["c0"]
    assert world.ended == [("engine-0", "TimeoutError: it did not answer by its deadline (chunk_timeout of the machine)")]
    assert world.now < 3600 + 60


def test_an_engine_that_makes_no_step_has_no_more_time_than_before_for_a_long_answer() -> None:
    world = World(Fates(c0=["hang"]))
    assert go(world, 1, timeout=3600.0, tokens=32_768) == ["c0"]
    assert 3600 <= world.now <= 3700 and len(world.ended) == 1


def test_progress_counts_unfinished_calls_about_once_a_second() -> None:
    world = World(Fates(c0=[3.0]))
    go(world, 2)
    assert {"requests": 2, "tokens": 20, "chunks": 0, "waiting": 2} in world.reports
    assert len(world.reports) <= 5


def until_stopped(world: World, count: int, engines: int, depth: int = 1) -> tuple[list[str], Exception | None]:
    """Return what was delivered, and the error that stopped the run after it."""
    dispatch = Dispatch(world.engines, world.wanted, calls(count), Limits(engines, 100.0, depth))
    delivered: list[str] = []
    try:
        delivered.extend(results(dispatch, world, world.clock))
    except (BackendError, UsageError, ConnectionError) as stopped:
        return delivered, stopped
    return delivered, None


def test_an_answer_of_the_very_moment_in_which_the_run_stops_is_delivered_before() -> None:
    world = World(Fates(c0=[UsageError("prompt 7 is too long", "prompts")]), at_once=True)
    delivered, stopped = until_stopped(world, 2, 2)
    assert delivered == ["c1"] and "prompt 7" in str(stopped)


def test_an_answer_is_delivered_where_the_call_that_follows_cannot_be_sent() -> None:
    delivered, stopped = until_stopped(World(broken={"c1"}), 2, 1)
    assert delivered == ["c0"] and str(stopped) == "c1 cannot be sent"


def test_an_answer_is_delivered_where_how_far_others_are_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> Mapping[str, Pulse]:
        if world.arrived:
            raise ConnectionError("no beat")
        return {}

    world = World()
    monkeypatch.setattr(world, "pulses", unreadable)
    assert until_stopped(world, 2, 1)[0] == ["c0"]


def test_closing_it_ends_the_engines_that_answer_and_keeps_those_that_swap() -> None:
    world = World(lambda engine, call: 1.0 if engine.name == "engine-0" else 50.0)
    replies = results(Dispatch(world.engines, NEW, calls(4), Limits(2, 100.0)), world, world.clock)
    assert next(replies) == "c0"
    replies.close()
    assert world.ended == [("engine-0", "")]
    assert [engine.name for engine in world.engines] == ["engine-1"]
    world.fate = well
    assert sorted(go(world, 4, engines=2)) == ["c0", "c1", "c2", "c3"]
    assert world.ensured == [("engine-0", "new"), ("engine-1", "new"), ("engine-2", "new")]  # its swap counted


def test_warm_engines_are_those_that_answer() -> None:
    world = World()
    warm = Dispatch(world.engines, NEW, [], Limits(3, 100.0))
    carry_out(warm.warm(0.0), warm, world, world.clock)
    assert len(world.ensured) == 3
    go(world, 3, engines=3)
    assert world.most == 3 and len(world.ensured) == 3


# ---- two calls in one engine ----


def test_where_two_are_allowed_an_engine_is_told_what_follows_and_gets_just_that() -> None:
    world = World()
    go(world, 3, depth=2)
    assert world.sent == [("engine-0", "c0", "c1"), ("engine-0", "c1", "c2"), ("engine-0", "c2", "")]


def test_where_one_is_allowed_nothing_is_told() -> None:
    world = World()
    go(world, 3, depth=1)
    assert {following for _, _, following in world.sent} == {""}


def test_no_engine_holds_two_calls_while_another_would_have_none() -> None:
    world = World(lambda engine, call: 1.0 if call else 5.0 * int(engine.name[-1]))  # engine-1 starts later
    go(world, 2, engines=2, depth=2)
    assert world.sent == [("engine-0", "c0", ""), ("engine-0", "c1", "")]  # it was free first


def test_what_a_lost_engine_was_promised_waits_again_and_is_not_blamed() -> None:
    world = World(Fates(c0=[RuntimeError("gone")], c1=[RuntimeError("gone")]))
    assert go(world, 4, depth=2) == ["c0", "c1", "c2", "c3"]
    asked = Counter(call for _, call, _ in world.sent)
    assert asked == {"c0": 2, "c1": 2, "c2": 1, "c3": 1}


# ---- kinds ----


def test_engines_of_another_kind_make_room_and_are_never_given_these_weights() -> None:
    world = World()
    go(world, 2, engines=2)
    world.wanted = OTHER
    assert sorted(go(world, 2, engines=2)) == ["c0", "c1"]
    assert world.ended == [("engine-0", ""), ("engine-1", "")]
    assert world.ensured[2:] == [("engine-2", "other"), ("engine-3", "other")]
    assert world.most == 2


def test_engines_of_two_kinds_stay_where_there_is_room_for_both() -> None:
    world = World()
    for wanted in (NEW, OTHER, NEW, OTHER):
        world.wanted = wanted
        go(world, 1, engines=2)
    assert world.ended == [] and len(world.ensured) == 2


def test_a_swap_of_another_kind_that_still_runs_is_waited_for() -> None:
    world = World(lambda engine, call: 7.0 if not call else 1.0)
    warm = Dispatch(world.engines, NEW, [], Limits(1, 100.0))
    carry_out(warm.warm(0.0), warm, world, world.clock)
    world.due = [(at, order, engine, Ensured(engine, "new")) for at, order, engine, _ in world.due]
    world.wanted = OTHER
    assert go(world, 1) == ["c0"]
    assert world.ended == [("engine-0", "")] and world.most == 1


@pytest.mark.parametrize("field, same", [("hidden_size", False), ("transformers_version", True)])
def test_a_kind_is_the_architecture_the_tokenizer_and_the_number_format(tmp_path: Path, field: str, same: bool) -> None:
    first, second = _model(tmp_path / "a"), _model(tmp_path / "b", **{field: 99})
    assert (engine_kind(first, "1", "float32") == engine_kind(second, "2", "float32")) is same
    assert engine_kind(first, "1", "float32") != engine_kind(first, "1", "bfloat16")
    (second / "tokenizer.json").write_text('{"other": 1}')
    assert engine_kind(first, "1", "float32") != engine_kind(second, "3", "float32")


def _model(folder: Path, **changed: int) -> Path:
    folder.mkdir()
    config = {"architectures": ["Llama"], "hidden_size": 8, "transformers_version": "5", **changed}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


# ---- whatever happens ----

trouble = st.sampled_from([RuntimeError("gone"), "hang", "stall"])


@settings(deadline=None)
@given(
    count=st.integers(1, 12),
    engines=st.integers(1, 5),
    depth=st.integers(1, 2),
    seconds=st.lists(st.floats(0.1, 9.0), min_size=1, max_size=7),
    losses=st.dictionaries(st.integers(0, 11), trouble, max_size=4),
    start=st.lists(trouble.filter(lambda one: one != "stall"), max_size=1),
    before=st.booleans(),
)
def test_whatever_is_lost_everything_is_answered_once_and_asked_again_only_where_its_engine_was_lost(
    count: int, engines: int, depth: int, seconds: list[float], losses: dict[int, Any], start: list[Any], before: bool
) -> None:
    fates = Fates(start=start, **{f"c{number}": [fate] for number, fate in losses.items()})
    times = iter(seconds * 100)

    def fate(engine: EngineState, call: Call | None) -> Any:
        found = fates(engine, call)
        return next(times) if found == 1.0 else found

    world = World(fate)
    if before:
        world.wanted = OTHER
        world.fate = well
        go(world, engines, engines)
        world.fate, world.wanted, world.sent = fate, NEW, []
    assert sorted(go(world, count, engines, depth)) == sorted(f"c{number}" for number in range(count))
    asked = Counter(call for _, call, _ in world.sent)
    assert asked == {f"c{number}": 2 if number in losses else 1 for number in range(count)}
    assert world.most <= engines
    for engine in {engine for engine, _, _ in world.sent}:
        mine = [(call, following) for name, call, following in world.sent if name == engine]
        assert all(following in ("", call) for (_, following), (call, _) in pairwise(mine))


@settings(deadline=None)
@given(
    count=st.integers(1, 12),
    engines=st.integers(1, 5),
    depth=st.integers(1, 2),
    seconds=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=7),
    losses=st.dictionaries(
        st.integers(0, 11), st.lists(trouble | st.just(UsageError("too long", "prompts")), min_size=1, max_size=2)
    ),
    broken=st.sets(st.integers(0, 11).map("c{}".format), max_size=2),
)
def test_whatever_stops_a_run_each_answer_that_arrived_is_delivered_once(
    count: int, engines: int, depth: int, seconds: list[float], losses: dict[int, list[Any]], broken: set[str]
) -> None:
    fates = Fates(**{f"c{number}": given for number, given in losses.items()})
    times = iter(seconds * 100)

    def fate(engine: EngineState, call: Call | None) -> Any:
        found = fates(engine, call)
        return next(times) if found == 1.0 else found

    world = World(fate, at_once=True, broken=broken)
    delivered, stopped = until_stopped(world, count, engines, depth)
    assert delivered == world.arrived and len(set(delivered)) == len(delivered)
    assert stopped or len(delivered) == count
