"""The trainer group on real processes: one group for all updates, and what a rank that dies or fails costs."""

from __future__ import annotations

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from toys import NUMERICS, OLD, Toy, learn_together

from selfkd.backend.base import OnSteps, Trained, TrainProgress, TrainSpec, nobody_listens
from selfkd.backend.machine import Machine
from selfkd.backend.ray import step_watch
from selfkd.core.facts import of_process
from selfkd.errors import BackendError, UsageError


def train(ray: Any, out: Path, on_progress: OnSteps = nobody_listens, **trl: Any) -> Trained:
    return ray.train(OLD, None, [], TrainSpec("sft", 1, trl=trl), out, on_progress)


def test_one_trainer_process_serves_every_round_and_reports_its_steps_and_its_errors(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    steps: list[TrainProgress] = []
    first, second = train(ray, tmp_path / "a", steps.append), train(ray, tmp_path / "b", steps.append)
    assert first.metrics["pid"] == second.metrics["pid"]
    assert first.metrics["threads"] == "1"
    assert set(ray.facts()) == {"trainer-0"} and ray.facts()["trainer-0"]["cpu"] == of_process(())["cpu"]
    assert [step["loss"] for step in steps] == [0.5, 0.5]
    with pytest.raises(BackendError, match="KeyError: 'completion'"):
        train(ray, tmp_path / "c", bug=True)
    assert (ray.log / "trainer-0.log").read_text().count("rank 0, process") == 1


def test_a_trainer_that_is_killed_twice_stops_the_run(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    with pytest.raises(BackendError, match=r"died 2 times \(rank 0: its process ended"):
        train(ray, tmp_path / "a", die=True)
    assert (ray.log / "trainer-0.log").read_text().count("rank 0, process") == 2


def test_a_rank_that_hangs_is_ended_and_replaced_and_twice_stops_the_run(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_watch, "HANG_SECONDS", 0.5)
    ray = backend()
    assert train(ray, tmp_path / "a", **{"hang-once": True}).folder == tmp_path / "a"
    assert (ray.log / "trainer-0.log").read_text().count("rank 0, process") == 2
    with pytest.raises(BackendError, match=r"hung 2 times \(rank 0: no step for 2 s, and the longest so far took 0 s"):
        train(ray, tmp_path / "b", hang=True)


def step(number: int, steps: int, seconds: float, **more: str) -> TrainProgress:
    return {"step": number, "steps": steps, "loss": 0.5, "tokens": 9, "seconds": seconds, **more}  # type: ignore[typeddict-item]


def looks(watch: step_watch.StepWatch, start: float, seconds: float) -> str:
    """What the watch says at the end of so many seconds, looked at each second."""
    return [watch.hangs(start + second) for second in range(int(seconds) + 1)][-1]


def test_only_what_made_a_step_and_has_one_to_make_can_hang(tmp_path: Path) -> None:
    watch = step_watch.StepWatch(tmp_path)
    assert not looks(watch, 0, 9000)  # it loads, and compiles
    watch.heard(step(1, 3, 60.0))
    assert not looks(watch, 9000, 3590)
    watch.heard(step(2, 3, 120.0))
    assert not looks(watch, 12600, 3590)
    (tmp_path / "draft").mkdir()
    assert not looks(watch, 16200, 9000)  # a checkpoint is written
    (tmp_path / "draft").rmdir()
    assert looks(watch, 25200, 100) == "no step for 3600 s, and the longest so far took 60 s"
    watch.heard(step(3, 3, 180.0))
    assert not looks(watch, 25300, 9000)  # the child is written


def test_long_steps_make_the_watch_patient_and_words_between_them_are_none(tmp_path: Path) -> None:
    watch = step_watch.StepWatch()
    watch.heard(step(7, 9, 5000.0, said="train continues at step 7"))  # the seconds before the checkpoint are of no step here
    assert not looks(watch, 0, 9000)
    watch.heard(step(8, 9, 5300.0))
    watch.heard(step(7, 9, 5000.0, warning="no checkpoint could be written"))
    assert watch.longest == 300.0
    assert not looks(watch, 9000, 5990) and looks(watch, 14990, 60)


def test_where_an_update_goes_on_from_is_no_step_and_behind_its_next_check_none_is_due(tmp_path: Path) -> None:
    if not find_spec("torch"):
        pytest.skip("needs torch")
    from selfkd.backend.trainer import resume

    told: list[Any] = []
    gone_on: Any = object.__new__(resume.Resumption)
    gone_on.rank, gone_on.tell, gone_on.interrupted, gone_on.folder, gone_on.computers = 0, told.append, False, tmp_path, []
    gone_on.words = {"step": 100, "steps": 1000, "loss": 0.5, "tokens": 9, "seconds": 36000.0}
    gone_on._say_where(())
    watch = step_watch.StepWatch(tmp_path, until=102)
    watch.heard(told[0])
    assert len(told) == 1 and watch.longest == 0.0
    assert not looks(watch, 0, 9000)  # it loads, and compiles
    watch.heard(step(101, 1000, 36010.0))
    assert watch.longest == 10.0 and looks(watch, 9000, 3610) == "no step for 3600 s, and the longest so far took 10 s"
    watch.heard(step(102, 1000, 36020.0))
    assert not looks(watch, 13000, 9000)  # the model that is checked is written


def test_a_driver_that_was_stopped_with_its_ranks_blames_nobody() -> None:
    watch = step_watch.StepWatch()
    watch.heard(step(1, 3, 1.0))
    assert not watch.hangs(0.0) and not watch.hangs(90_000.0)


def starts(log: Path, rank: int) -> int:
    return (log / f"trainer-{rank}.log").read_text().count(f"rank {rank}, process")


def test_ranks_meet_and_one_that_dies_or_fails_leaves_nobody_waiting(cluster: Any, tmp_path: Path) -> None:
    if not find_spec("torch"):
        pytest.skip("needs torch")
    from selfkd.backend.ray.dispatcher import RayBackend

    ray = RayBackend(Machine(), {**NUMERICS, "trainers": 2}, tmp_path / "log", engine=Toy, trainer=learn_together, ahead=False)
    steps: list[TrainProgress] = []
    first = train(ray, tmp_path / "a", steps.append, **{"die-once": True})
    assert (first.metrics["sum"], first.metrics["rank"]) == (3, 0)
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert first.metrics["variables"] == variables
    assert len(steps) == 2  # rank 0 tells of both tries, and rank 1 of none
    assert set(ray.facts()) == {"trainer-0", "trainer-1"}
    assert (starts(ray.log, 0), starts(ray.log, 1)) == (2, 2)  # a group is ended as a whole
    assert train(ray, tmp_path / "b").metrics["pid"] == first.metrics["pid"]
    began = time.monotonic()
    with pytest.raises(UsageError, match="row 7 is too long") as caught:
        train(ray, tmp_path / "c", refuse=True)
    assert type(caught.value) is UsageError
    assert time.monotonic() - began < 5.0
    ray.close()


def test_only_ranks_on_cards_get_memory_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toys import learn

    from selfkd.backend.ray.rank import GROWING, Group, Rank

    monkeypatch.setattr("selfkd.backend.ray.rank.redirect", lambda log: None)
    monkeypatch.setenv(GROWING[0], "mine")
    Rank(0, Group(1, tmp_path, learn, "nccl")).join(None)
    assert os.environ[GROWING[0]] == "mine"
    monkeypatch.delenv(GROWING[0])
    Rank(0, Group(1, tmp_path, learn, "gloo")).join(None)
    assert GROWING[0] not in os.environ
    Rank(0, Group(1, tmp_path, learn, "nccl")).join(None)
    assert os.environ[GROWING[0]] == "expandable_segments:True"
