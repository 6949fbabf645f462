"""Adapters in a chain on the fake backend: what is committed, what the base must be, and that a kill changes nothing."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from chains import RECIPE, Faults, Killed, end, go, recipe_in

from selfkd.backend.base import Trained
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import records
from selfkd.chain.records import Commit
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.errors import ChainError
from selfkd.report.verify import verify

LORA = RECIPE.replace("train: {loss: sft}", "train: {loss: sft, lora: {r: 4}, continue: true}")
STALE = LORA.replace("rounds: 2", "rounds: 3") + "keep: {last: 1, base: false, best: false}\n"


def trained(run: Run, index: int) -> Commit:
    return records.read(next((run.folder / f"round-{index:03}").glob("*-train.json")), Commit)


def test_an_adapter_is_committed_with_its_base_and_verify_compares_both(tmp_path):
    run = go(recipe_in(tmp_path, LORA), tmp_path / "runs" / "sums")
    loaded = records.read(run.folder / "round-000/01-load.json", Commit).models["policy"]
    for index in (1, 2):
        entry = trained(run, index).models["policy"]
        assert (entry.kind, entry.base) == ("adapter", loaded.path)
        assert digest.base_of(run.folder / entry.path) == loaded.digest
    assert verify(run.folder).problems == []


class Forger(Fake):
    """A trainer that names another base than the one it changed."""

    def train(self, *arguments: Any, **more: Any) -> Trained:
        found = super().train(*arguments, **more)
        (found.folder / digest.ADAPTER).write_text(json.dumps({"base": "0" * 64}))
        return found


def test_an_adapter_that_names_another_base_stops_the_run_and_is_found(tmp_path):
    recipe, folder = recipe_in(tmp_path, LORA), tmp_path / "runs" / "sums"
    with pytest.raises(ChainError, match="weights were changed"):
        go(recipe, folder, Forger(Run.open(recipe, folder, Machine(backend="fake")).numerics))
    assert any("says that 000000000000 is its base" in problem for problem in verify(folder).problems)


def test_a_base_that_was_swapped_stops_the_run_and_is_found(tmp_path):
    recipe, folder = recipe_in(tmp_path, LORA), tmp_path / "runs" / "sums"
    run = go(recipe_in(tmp_path, LORA.replace("rounds: 2", "rounds: 1")), folder)
    base = run.folder / (trained(run, 1).models["policy"].base or "")
    weights = json.loads((base / "weights.json").read_text())
    (base / "weights.json").write_text(json.dumps({**weights, "skill": 0.9}))
    assert verify(run.folder).problems
    with pytest.raises(ChainError, match="changed"):
        go(recipe, folder)


def test_the_base_of_a_kept_adapter_stays_whatever_keep_says(tmp_path):
    run = go(recipe_in(tmp_path, STALE), tmp_path / "runs" / "sums")
    entry = trained(run, 3).models["policy"]
    assert (run.folder / (entry.base or "")).is_dir() and not (run.folder / trained(run, 1).models["policy"].path).exists()
    assert verify(run.folder).problems == []


def test_a_recipe_without_lora_keeps_its_keys_and_one_with_it_has_others(tmp_path):
    plain, other = (
        next(step for step in recipe_in(tmp_path / name, text).steps_of(1) if step.verb == "train").identity()
        for name, text in (("plain", RECIPE), ("lora", LORA))
    )
    assert "lora" not in plain and "continue" not in plain
    assert other["lora"]["r"] == 4 and other["continue"] is True


def test_killed_anywhere_a_chain_of_adapters_ends_on_the_same_digest(tmp_path):
    recipe = recipe_in(tmp_path, LORA)
    with Faults() as faults:
        whole = end(go(recipe, tmp_path / "runs" / "sums"))
    for at in range(0, faults.count, 17):
        folder = tmp_path / "killed" / "sums"
        with pytest.raises(Killed), Faults(at):
            go(recipe, folder)
        assert end(go(recipe, folder)) == whole
        shutil.rmtree(folder)
