"""A long update inside a run: killed behind a checkpoint it goes on from there, on other ranks too, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from chains import RECIPE, end, go, recipe_in
from real_chain import begins, finish, kill_group, make_home, pid_in, start, until

from selfkd.backend.base import LoraSpec, TrainSpec
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.backend.trainer.sealed import STOP
from selfkd.chain import records, updates
from selfkd.chain.loop import walk
from selfkd.chain.records import Computer
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.core.pool import Model, shape
from selfkd.report import status, tables
from selfkd.report.verify import verify

# ---- on the fake ----


class Sealing(Fake):
    """Leaves a checkpoint as a trainer would, says where it goes on, and dies in the update that it is told to."""

    def __init__(self, numerics: Any, dies: int = 0) -> None:
        super().__init__(numerics)
        self.dies, self.updates, self.seen = dies, 0, []

    def train(self, start: Any, reference: Any, rows: Any, spec: Any, out: Path, on_progress: Any = None) -> Any:
        self.updates += 1
        found = spec.saves.folder / "step-000001"
        self.seen.append((spec.saves.key, found.exists(), spec.saves.minutes))
        if found.exists():
            on_progress({"step": 1, "steps": 2, "loss": 0.5, "tokens": 3, "seconds": 0.1, "said": "train continues at step 1"})
        found.mkdir(exist_ok=True)
        (found / "seal.json").write_text("{}")
        if self.updates == self.dies:
            raise KeyboardInterrupt
        return super().train(start, reference, rows, spec, out)


def test_an_update_that_was_stopped_finds_its_own_checkpoints_and_its_commit_takes_them_away(tmp_path):
    recipe = recipe_in(tmp_path, RECIPE)
    machine = Machine(backend="fake", checkpoint_minutes=3)
    backend = Sealing({}, dies=2)
    run = Run.open(recipe, tmp_path / "run", machine)
    with pytest.raises(KeyboardInterrupt):
        walk(run, backend, run.begin())
    assert run.paths.holds_checkpoints and verify(run.folder).problems == []
    events: list[Any] = []
    again = Run.open(recipe, tmp_path / "run", machine)
    walk(again, backend, again.begin(events.append))
    first, second, third = backend.seen
    assert second == (third[0], False, 3) and third[1:] == (True, 3) and first[0] != second[0]
    assert [event["text"] for event in events if event["event"] == "continues"] == ["train continues at step 1"]
    assert not again.paths.updates.exists()
    assert end(again) == end(go(recipe, tmp_path / "whole"))


def test_whatever_decides_the_numbers_of_an_update_names_it_and_ranks_do_not():
    start, other = Model("policy", "a", "1"), Model("policy", "b", "2")
    rows = shape("rows", [{"id": "x", "chosen": "y", "weight": 1.0}])
    spec, numerics = TrainSpec("dpo", 3, precision="auto", trl={"learning_rate": 1e-3}), {"precision": "bf16", "trainers": 4}
    lora = LoraSpec(r=4, alpha=8.0)
    name = updates.key(start, other, rows, spec, numerics)
    alike = [
        updates.key(start, other, rows, spec, {**numerics, "trainers": 1, "shard": True, "threads": 3}),
        updates.key(start, other, rows, replace(spec, precision="bf16"), numerics),
    ]
    different = [
        updates.key(other, other, rows, spec, numerics),
        updates.key(start, None, rows, spec, numerics),
        updates.key(start, other, rows.with_columns(pl.lit("z").alias("chosen")), spec, numerics),
        updates.key(start, other, rows, replace(spec, seed=4), numerics),
        updates.key(start, other, rows, replace(spec, beta=0.2), numerics),
        updates.key(start, other, rows, replace(spec, trl={"learning_rate": 1e-4}), numerics),
        updates.key(start, other, rows, spec, {**numerics, "precision": "fp32"}),
        updates.key(start, other, rows, spec, {**numerics, "trainer": {"gradient_checkpointing": True}}),
        updates.key(start, other, rows, spec, {**numerics, "trainer": {"offload_optimiser": True}}),
        updates.key(start, other, rows, replace(spec, lora=lora), numerics),
        updates.key(start, other, rows, replace(spec, lora=replace(lora, quantise="nf4")), numerics),
    ]
    assert set(alike) == {name} and len({name, *different}) == 1 + len(different)


def test_a_run_that_goes_on_with_other_ranks_says_so_in_its_rounds_its_table_and_verify(tmp_path):
    recipe = recipe_in(tmp_path, RECIPE, "rounds=1")
    began = Run.open(recipe, tmp_path / "run", Machine(backend="fake", trainers=4, shard=True))
    walk(began, Fake(began.numerics), began.begin())
    longer = recipe_in(tmp_path, RECIPE, "rounds=3")
    for machine in (Machine(backend="fake", trainers=2), Machine(backend="fake")):  # the second one asks for nothing
        run = Run.open(longer if machine.trainers == 2 else recipe_in(tmp_path, RECIPE, "rounds=4"), tmp_path / "run", machine)
        assert run.ignored == []
        walk(run, Fake(run.numerics), run.begin())
    levels = [seal.notes["level"] for seal in run.sealed()]
    assert levels == ["exact", "exact", "data: trainers 4 → 2", "data: trainers 4 → 2", "exact"]
    rounds = status.rounds(run.paths)
    assert [one.moved for one in rounds] == ["", "", "trainers 4 → 2", "trainers 4 → 2", ""]
    said = [line.plain for line in tables.warnings(rounds[2], False)]
    assert "round 2 was not made with what the run began with: trainers 4 → 2" in said
    found = verify(run.folder)
    assert found.problems == [] and len(found.moved) == 2


def test_one_rank_holds_a_model_whole_that_more_of_them_divided(tmp_path):
    recipe = recipe_in(tmp_path, RECIPE, "rounds=1")
    began = Run.open(recipe, tmp_path / "run", Machine(backend="fake", trainers=2, shard=True))
    walk(began, Fake(began.numerics), began.begin())
    alone = Run.at(began.folder, Machine(backend="fake", trainers=1, named=("backend", "trainers")))
    assert (alone.numerics["trainers"], alone.numerics["shard"], alone.machine.shard) == (1, False, False)
    assert alone.other_ranks == ["trainers 2 → 1", "shard True → False"]
    named = Machine(backend="fake", trainers=1, shard=True, named=("backend", "trainers", "shard"))
    assert Run.at(began.folder, named).numerics["shard"] is True  # which the trainer refuses: there is one rank


def test_a_stop_that_an_earlier_attempt_was_asked_for_does_not_end_the_next_one(tmp_path):
    from selfkd.backend.ray.trainer_group import _ended_gently

    paths = Run.open(recipe_in(tmp_path, RECIPE), tmp_path / "run", Machine(backend="fake")).paths
    stop = updates.saves(paths, "name", 0).folder / STOP
    stop.touch()
    saves = updates.saves(paths, "name", 0)
    assert not stop.exists()
    stop.touch()
    with _ended_gently(saves):  # also where no checkpoint is to be made
        assert not stop.exists()


OLDER, NEWER = {"torch": "2.12.0"}, {"torch": "2.13.0"}


class Moved(Fake):
    """Its update was begun by ranks that computed with `OLDER`, and is gone on with by others."""

    came_up: Mapping[str, Any] = {}

    def train(self, start: Any, reference: Any, rows: Any, spec: Any, out: Path, on_progress: Any = None) -> Any:
        on_progress({"step": 1, "steps": 2, "loss": 0.5, "said": "goes on", "computers": [("trainer-0", OLDER)]})
        trained = super().train(start, reference, rows, spec, out)
        self.came_up = {"trainer-0": NEWER}
        groups = [{"trainers": 1, "shard": False, "facts": [digest.of(facts)]} for facts in (OLDER, NEWER)]
        return replace(trained, metrics={**trained.metrics, "made_by": groups})

    def facts(self) -> Any:
        return {**super().facts(), **self.came_up}


def test_a_round_names_what_the_ranks_computed_with_that_began_its_update_and_a_person_can_read_it(tmp_path):
    recipe = recipe_in(tmp_path, RECIPE, "rounds=1")
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    walk(run, Moved(run.numerics), run.begin())
    assert run.sealed()[-1].notes["level"] == "data: torch 2.12.0 → 2.13.0 (trainer-0)"
    met = [records.read(path, Computer).facts for path in run.paths.computers("trainer")]
    assert met == [OLDER, NEWER]
    assert verify(run.folder).moved == ["round 1 was not made with what the run began with: torch 2.12.0 → 2.13.0 (trainer-0)"]
    run.paths.computers("trainer")[0].unlink()
    assert [text for text in verify(run.folder).problems if "what made round-001" in text]


# ---- on the real trainer, under Ray ----


def steps_made(run: Path) -> int:
    newest = max(run.glob("logs/attempt-*/events.jsonl"))
    events = [json.loads(line) for line in newest.read_text().splitlines() if line.endswith("}")]
    return max((event["done"] for event in events if event["event"] == "progress" and event["unit"] == "steps"), default=0)


def wait_for_steps(run: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while steps_made(run) < step:
        assert time.monotonic() < deadline, "the update did not get so far"
        time.sleep(0.02)


def said(run: Path) -> list[str]:
    logs = sorted(run.glob("logs/attempt-*/events.jsonl"))
    events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [event["text"] for event in events if event["event"] == "continues"]


@pytest.mark.nightly
@pytest.mark.real
def test_a_rank_and_then_the_driver_killed_inside_an_update_cost_what_came_behind_its_checkpoint(tmp_path):
    home = make_home(tmp_path, machine="threads: 1\ncheckpoint_minutes: 0.0001\n", rounds=1)
    lines = (home / "chain.yaml").read_text().replace("num_train_epochs: 2", "num_train_epochs: 30").splitlines()
    (home / "chain.yaml").write_text("\n".join(line for line in lines if "pair" not in line and "dpo" not in line))
    whole, run = finish(home, "whole"), home / "runs" / "killed"
    process = start(home, "killed")
    until(run, begins(1, "train"), process)
    wait_for_steps(run, 12)
    os.kill(pid_in(run, "trainer-0.log", "rank 0"), signal.SIGKILL)
    until(run, lambda event: event["event"] == "continues", process)
    wait_for_steps(run, 24)
    kill_group(process)
    ended = finish(home, "killed")
    assert ended.sealed()[-1].digest == whole.sealed()[-1].digest
    texts = said(run)
    assert len(texts) == 2 and all(text.startswith("train continues at step ") for text in texts)
    reached = [int(text.split()[4]) for text in texts]
    assert 10 <= reached[0] < reached[1] and reached[1] >= 22
    assert ended.made(1)["train"].notes["train"]["continued_at"] == reached
    assert not ended.paths.updates.exists() and verify(run).problems == []
