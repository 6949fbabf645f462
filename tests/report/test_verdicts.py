"""A round that was kept or rolled back against its recipe's keep_if is named by verify, and so is a head that does not follow from the verdict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in

from selfkd.chain import records
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit, Seal
from selfkd.core import digest
from selfkd.report import changes
from selfkd.report.verify import verify

NEVER = f"{RECIPE}keep_if: dev_last_number > prev_dev_last_number + 2\n"
EVER = f"{RECIPE}keep_if: dev_last_number > prev_dev_last_number - 2\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, text in (("rolled back", NEVER), ("kept", EVER)):
        folder = tmp_path_factory.mktemp("verdicts")
        made[name] = go(recipe_in(folder, text), folder / "run").folder
    return made


@pytest.fixture
def run(runs, request, tmp_path) -> Path:
    return Path(shutil.copytree(runs[request.param], tmp_path / "run"))


def forged(path: Path, kind: type, **change: object) -> None:
    """A careful forger's edit: every digest of the record itself fits again, the chain's included."""
    record = {**json.loads(path.read_text()), **change}
    if kind is Seal:
        seal = Seal.from_json(record)
        last = records.read(path.parent / record["steps"][-1]["file"], Commit).digest
        record["digest"] = records.round_digest(seal.round, last, seal.models, seal.accepted)
    path.write_bytes(json.dumps(digest.with_self_digest(record), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def seal_of(run: Path, index: int) -> dict:
    return json.loads((run / f"round-00{index}/sealed.json").read_text())


@pytest.mark.parametrize("run", ["rolled back", "kept"], indirect=True)
def test_an_honest_verdict_holds_whichever_it_was(run):
    assert verify(run).problems == []


@pytest.mark.parametrize("run", ["rolled back"], indirect=True)
def test_a_last_round_that_was_kept_against_keep_if_is_named(run):
    trained = json.loads(next((run / "round-002").glob("*-train.json")).read_text())["models"]
    forged(run / "round-002/sealed.json", Seal, accepted=True, models=trained, why="")
    [problem] = verify(run).problems
    assert problem.startswith("round-002/sealed.json: the round was kept, and by its metrics it is to be rolled back: not ")


@pytest.mark.parametrize("run", ["kept"], indirect=True)
def test_a_last_round_that_was_rolled_back_against_keep_if_is_named(run):
    before = seal_of(run, 1)["models"]
    forged(run / "round-002/sealed.json", Seal, accepted=False, models=before, why="not so good")
    [problem] = verify(run).problems
    assert problem.startswith("round-002/sealed.json: the round was rolled back, and of its metrics keep_if holds")


@pytest.mark.parametrize("run", ["rolled back", "kept"], indirect=True)
def test_a_head_that_does_not_follow_from_the_verdict_is_named(run):
    """Another committed model stands at the head: that of the round before, or that which was not kept."""
    models = seal_of(run, 1 if seal_of(run, 2)["accepted"] else 2)["models"]
    other = json.loads(next((run / "round-002").glob("*-train.json")).read_text())["models"]
    forged(run / "round-002/sealed.json", Seal, models=models if models != seal_of(run, 2)["models"] else other)
    [problem] = verify(run).problems
    assert problem.startswith("round-002/sealed.json: its 'policy' is not the model that the round leaves, which was ")


@pytest.mark.parametrize("quick", [True, False])
def test_each_round_is_judged_by_the_recipe_that_was_in_force_when_it_was_sealed(tmp_path, quick):
    go(recipe_in(tmp_path, NEVER), tmp_path / "run")
    run = go(recipe_in(tmp_path, EVER, "rounds=3"), tmp_path / "run", amend=True)
    assert [seal.accepted for seal in run.sealed()] == [True, False, False, True]
    assert verify(run.folder, quick).problems == []


def test_a_keep_if_that_asks_for_the_best_round_and_for_a_change_is_judged_again(tmp_path):
    text = f"{RECIPE}best: {{metric: dev/last_number}}\nkeep_if: dev_last_number >= best_dev_last_number - 0.9 AND dev_last_number_change > -2\n"
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    assert verify(run.folder).problems == []


@pytest.mark.parametrize("run", ["kept"], indirect=True)
def test_a_mean_that_is_not_that_of_the_scores_is_named(run):
    """Whoever changes the scores beside it, or the mean and every digest, must change both."""
    paths = Paths(run)
    commit = records.read(run / "round-001/05-measure.json", Commit)
    assert list(changes.of_answers(paths, commit)) == []
    [file] = commit.tables["scores"].files
    pl.read_parquet(run / file).with_columns(value=pl.lit(1.0)).write_parquet(run / file)
    [problem] = changes.of_answers(paths, commit)
    assert problem == f"dev/last_number is {commit.metrics['dev/last_number']}, and the scores come to 1.0"
