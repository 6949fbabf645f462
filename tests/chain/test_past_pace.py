"""A plan counts with the speed that a run had on this machine; with no other run's."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chains import Killed, recipe_in
from weighty import COLUMNS, ROWS, Weighty

from selfkd.backend.base import Trained
from selfkd.backend.machine import Machine
from selfkd.chain import round as rounds
from selfkd.chain.loop import walk
from selfkd.chain.past_pace import newest
from selfkd.chain.run import Run
from selfkd.core.facts import of_process

HERE = Machine(backend="local", dtype="float32", threads=1, generator="transformers")
SECONDS = 30  # that every step takes by the clock of these tests
LEARNED = 700


class Timed(Weighty):
    """It learns so many tokens in each update."""

    def train(self, *arguments: Any, **more: Any) -> Trained:
        trained = super().train(*arguments, **more)
        return replace(trained, metrics={**trained.metrics, "tokens": LEARNED})


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count(step=SECONDS)
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def run_in(folder: Path, name: str = "sums", machine: Machine = HERE, kill: str = "", **facts: Any) -> Run:
    """Walk a run; `kill` names the call of the backend before which it is killed once, in round 1 or later."""
    calls = count()

    def hook(call: str) -> None:
        if call == kill and next(calls) == 1:
            raise Killed

    run = Run.open(recipe_in(folder / "recipes"), folder / "runs" / name, machine)
    backend = Timed(run.numerics, hook=hook, facts={**of_process(()), **facts})
    if kill:
        with pytest.raises(Killed):
            walk(run, backend, run.begin())
        run = Run.open(run.recipe, run.folder, machine)
    walk(run, backend, run.begin())
    return run


def about(tokens_per_second: float) -> Any:
    return pytest.approx(tokens_per_second * ROWS * COLUMNS, rel=0.01)  # a file has a header beside its weights


def test_the_pace_is_that_of_the_rounds_behind_the_base(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    sampled = sum(run.samples(index)["tokens"].sum() for index in (1, 2))
    made = sampled + sum(seal.metrics["dev/tokens"] for seal in run.sealed()[1:])  # in four steps
    found = newest(tmp_path / "runs", HERE)
    assert found is not None
    assert found.made == about(made / (4 * SECONDS))
    assert found.learned == about(LEARNED / SECONDS)
    assert "runs/sums was here" in found.source and "23 learned in a second" in found.source


def test_a_step_that_a_kill_cut_in_two_says_nothing_of_the_speed(tmp_path: Path) -> None:
    run_in(tmp_path, kill="train")  # the second update
    found = newest(tmp_path / "runs", HERE)
    assert found is not None and found.learned == about(LEARNED / SECONDS)


def test_the_newest_run_counts(tmp_path: Path) -> None:
    run_in(tmp_path, "a")
    run_in(tmp_path, "b")
    found = newest(tmp_path / "runs", HERE)
    assert found is not None and "runs/b was here" in found.source


@pytest.mark.parametrize(
    ("asked", "facts"),
    [
        ({}, {"cpu": "another processor"}),
        ({}, {"gpu": "a card (sm_90)"}),
        ({"dtype": "bfloat16"}, {}),
        ({"threads": 2}, {}),
        ({"generator": "vllm"}, {}),
        ({"cards": 1, "card_gb": 24.0}, {}),
        ({"backend": "fake"}, {}),
    ],
)
def test_a_run_elsewhere_or_otherwise_says_nothing_of_this_machine(
    tmp_path: Path, asked: dict[str, Any], facts: dict[str, Any]
) -> None:
    run_in(tmp_path, **facts)
    assert newest(tmp_path / "runs", replace(HERE, **asked)) is None


def test_a_run_that_was_too_short_to_tell_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: 0.0))
    run_in(tmp_path)
    assert newest(tmp_path / "runs", HERE) is None


def test_a_run_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    run_in(tmp_path, "whole")
    damaged = run_in(tmp_path, "damaged")
    seal = damaged.paths.round(1).seal
    seal.write_text(seal.read_text().replace('"accepted": true', '"accepted": false'))
    found = newest(tmp_path / "runs", HERE)
    assert found is not None and "runs/whole was here" in found.source
