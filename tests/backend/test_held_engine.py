"""The engine as the process around it holds it: what it does asleep, and what its beat says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from toys import NEW, OLD, Toy, chunk_of

from selfkd.backend.base import Sampling
from selfkd.backend.engine.held_engine import Beat, HeldEngine
from selfkd.backend.probe import Earlier
from selfkd.backend.ray import dispatch
from selfkd.backend.ray.dispatch import Call, Pulse, Work
from selfkd.core.pool import Model
from selfkd.errors import GuardError, WeightsError


class Sleeper(Toy):
    """A toy on a card: asleep it holds nothing."""

    def sleep(self) -> None:
        self.weights = ""

    def wake(self, model: Model) -> dict[str, Any]:
        return self.swap(model)


def held(folder: Path) -> HeldEngine:
    return HeldEngine(Sleeper, {"threads": 1}, folder / "engine.beat")


def test_a_call_wakes_a_sleeping_engine_with_the_weights_it_wants(tmp_path: Path) -> None:
    """As where the driver reads the result of an `ensure` only after it has put the engine to sleep."""
    engine = held(tmp_path)
    engine.ensure(OLD)
    engine.sleep()
    assert not engine.holds(OLD)
    assert engine.generate(OLD, chunk_of(tmp_path, ["answer"]), Sampling()).weights == OLD.digest
    engine.sleep()
    assert engine.logprobs(NEW, pl.DataFrame({"id": ["a"]})) == [("a", -64.0, 3)] and engine.holds(NEW)


def test_only_an_engine_that_holds_the_start_scores_before_an_update_and_what_is_wrong_with_rows_is_for_the_trainer(
    tmp_path: Path,
) -> None:
    class Scorer(Sleeper):
        def before_update(self, rows: list[Path], pairs: bool, max_length: int) -> Earlier:
            if not rows:
                raise GuardError("there are no rows to train on", "train")
            return Earlier(self.weights, {(1, 2): [-1.0]})

    engine = HeldEngine(Scorer, {"threads": 1}, tmp_path / "engine.beat")
    assert engine.before_update(OLD, [tmp_path], False, 64) is None
    engine.ensure(OLD)
    assert engine.before_update(NEW, [tmp_path], False, 64) is engine.before_update(OLD, [], False, 64) is None
    assert engine.before_update(OLD, [tmp_path], False, 64) == Earlier(OLD.digest, {(1, 2): [-1.0]})
    engine.sleep()
    assert engine.before_update(OLD, [tmp_path], False, 64) is None


def test_an_engine_that_is_awake_answers_with_no_other_weights(tmp_path: Path) -> None:
    engine = held(tmp_path)
    engine.ensure(OLD)
    with pytest.raises(WeightsError, match="the engine holds 000000000000, and policy@111111111111 was asked for"):
        engine.generate(NEW, chunk_of(tmp_path, ["answer"]), Sampling())


def test_a_beat_tells_requests_tokens_and_steps_and_an_old_one_nothing(tmp_path: Path) -> None:
    beat = Beat(tmp_path / "beat")
    assert Beat.read(tmp_path / "beat") == (0, 0, 0) == Beat.read(tmp_path / "none")
    beat.put(3, 120, 45)
    assert Beat.read(tmp_path / "beat") == (3, 120, 45)
    beat.put(0, 0)
    assert Beat.read(tmp_path / "beat") == (0, 0, 0)


def test_steps_without_tokens_are_no_hang_and_no_steps_are() -> None:
    """An engine over several cards tells of tokens only when an answer is whole."""
    work = Work(Call("chunk", "generate", ()), deadline=10_000)
    for minute in range(60):
        assert work.overdue(Pulse(0, 0, 1 + minute), now=60 * minute) == ""
    assert work.overdue(Pulse(0, 0, 60), now=3540 + dispatch.STALL_SECONDS) == ""
    assert work.overdue(Pulse(0, 0, 60), now=3540 + dispatch.STALL_SECONDS + 1) == "it made no step for 600 s"


def test_an_engine_with_a_log_of_its_own_lets_vllm_tell_what_it_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfkd.backend.engine.held_engine.redirect", lambda log: None)
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    held(tmp_path)
    assert "VLLM_LOGGING_LEVEL" not in os.environ
    HeldEngine(Sleeper, {}, tmp_path / "engine.beat", tmp_path / "engine.log")
    assert os.environ.pop("VLLM_LOGGING_LEVEL") == "INFO"
