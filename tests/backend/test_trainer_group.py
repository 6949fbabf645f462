"""The trainer group on real processes: one group for all updates, and what a rank that dies or fails costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toys import OLD

from selfkd.backend.base import Trained, TrainSpec
from selfkd.errors import BackendError


def train(ray: Any, out: Path, **trl: Any) -> Trained:
    return ray.train(OLD, None, [], TrainSpec("sft", 1, trl=trl), out)


def test_one_trainer_process_serves_every_round_and_tells_its_numbers_and_its_errors(backend: Any, tmp_path: Path) -> None:
    ray, told = backend(), []
    ray.progress = told.append
    first, second = train(ray, tmp_path / "a"), train(ray, tmp_path / "b")
    assert first.metrics["pid"] == second.metrics["pid"]
    assert first.metrics["threads"] == "1"
    assert [said["loss"] for said in told if "loss" in said] == [0.5, 0.5]
    with pytest.raises(BackendError, match="KeyError: 'completion'"):
        train(ray, tmp_path / "c", bug=True)
    assert (ray.log / "trainer-0.log").read_text().count("rank 0, process") == 1


def test_a_trainer_that_is_killed_twice_stops_the_run(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    with pytest.raises(BackendError, match=r"died twice \(rank 0: its process ended"):
        train(ray, tmp_path / "a", die=True)
    assert (ray.log / "trainer-0.log").read_text().count("rank 0, process") == 2
