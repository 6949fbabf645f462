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
