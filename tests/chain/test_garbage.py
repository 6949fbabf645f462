"""What no record names is found and taken away; what counts, and what an unfinished round may still use, stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from chains import RECIPE, Faults, Killed, end, go, recipe_in

from selfkd.backend.machine import Machine
from selfkd.chain.garbage import collect, garbage
from selfkd.chain.run import Run
from selfkd.errors import BusyError
from selfkd.report.verify import verify


def test_a_whole_run_has_no_garbage_once_its_tmp_is_empty(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    assert {one.path.parent for one in garbage(run)} <= {run.paths.tmp}
    collect(run)
    assert garbage(run) == [] and verify(run.folder).problems == []


def test_leftovers_of_a_sealed_round_go_and_nothing_that_counts(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    (run.paths.round(1).folder / "01-sample" / "torn.parquet").write_bytes(b"x" * 10)
    other = run.paths.round(2).folder / "04-train" / "policy-0000"
    other.mkdir()
    (other / "weights.json").write_text("{}")
    found = {one.path.name: one.bytes for one in collect(run) if run.paths.tmp not in one.path.parents}
    assert found == {"torn.parquet": 10, "policy-0000": 2}
    assert verify(run.folder).problems == [] and garbage(run) == []


def test_after_any_kill_collecting_changes_no_digest(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, RECIPE, "rounds=1")
    whole = end(go(recipe, tmp_path / "whole"))
    with Faults() as count:
        go(recipe, tmp_path / "count")
    for at in range(1, count.count, 7):
        folder = tmp_path / f"killed-{at}"
        with Faults(at), pytest.raises(Killed):
            go(recipe, folder)
        if (folder / "run.json").exists():
            collect(Run.open(recipe, folder, Machine(backend="fake")))
        assert end(go(recipe, folder)) == whole


def test_a_run_that_is_driven_is_left_alone(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    with run.lease(), pytest.raises(BusyError):
        collect(Run.at(run.folder))
