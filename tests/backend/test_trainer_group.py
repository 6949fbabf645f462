"""The trainer group on real processes: one group for all updates, and what a rank that dies or fails costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toys import OLD

from selfkd.backend.base import OnSteps, Trained, TrainProgress, TrainSpec, nobody_listens
from selfkd.core.facts import of_process
from selfkd.errors import BackendError


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
