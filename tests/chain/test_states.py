"""Optimisers that live on over rounds, on the fake backend: whose state an update goes on with, and what of it stays."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from chains import RECIPE, Faults, Killed, end, go, recipe_in

from selfkd.backend.base import OptimiserState, TrainSpec
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import updates
from selfkd.chain.loop import walk
from selfkd.chain.records import Commit
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.core.pool import Model, shape
from selfkd.errors import ChainError, RecipeError
from selfkd.report.verify import verify

LIVES_ON = RECIPE.replace("train: {loss: sft}", "train: {loss: sft, optimiser: continue}").replace("rounds: 2", "rounds: 3")


def train_of(run: Run, index: int) -> Commit:
    return run.made(index)["train"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with Faults() as counted:
        run = go(recipe_in(folder, LIVES_ON), folder / "run")
    return run, counted.count


@pytest.fixture
def run(undisturbed, tmp_path) -> Run:
    return Run.at(shutil.copytree(undisturbed[0].folder, tmp_path / "moved"), Machine(backend="fake"))


def test_each_update_goes_on_with_the_state_that_was_committed_with_its_start(undisturbed):
    run, _ = undisturbed
    first, second, third = (train_of(run, index) for index in (1, 2, 3))
    assert first.notes["optimiser"]["state"] is None
    for made, before in ((second, first), (third, second)):
        assert made.notes["optimiser"] == {"of": before.models["policy"].digest, "state": before.states["policy"].digest}
        assert before.states["policy"].model == before.models["policy"].digest
    assert verify(run.folder).problems == []


def test_it_says_where_it_begins_with_an_empty_optimiser_and_where_it_goes_on(tmp_path):
    recipe, events = recipe_in(tmp_path, LIVES_ON), []
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    walk(run, Fake(run.numerics), run.begin(events.append))
    said = [event["text"] for event in events if event["event"] == "continues"]
    base = str(run.loaded()["policy"])
    assert said[0] == f"round-001/train begins with an empty optimiser: {base} brings none"
    assert said[1] == f"round-002/train goes on with the optimiser of {train_of(run, 1).models['policy'].model('policy')}"


def test_a_chain_whose_optimiser_lives_on_ends_elsewhere_and_one_that_does_not_keeps_its_keys(undisturbed, tmp_path):
    fresh = go(recipe_in(tmp_path, RECIPE.replace("rounds: 2", "rounds: 3")), tmp_path / "run")
    assert end(fresh) != end(undisturbed[0])
    made = train_of(fresh, 1)
    assert "optimiser" not in made.identity and made.states == {} and "optimiser" not in made.notes
    tables = {name: table.digest for name, table in made.tables.items()}
    weights = {"policy": made.models["policy"].digest}
    assert made.digest == digest.of("step", made.key, tables, weights, dict(made.metrics))  # as before there were states


@pytest.mark.parametrize("part", range(12))
def test_killed_at_a_file_operation_it_ends_on_the_same_digest(undisturbed, tmp_path, part):
    run, operations = undisturbed
    recipe = recipe_in(tmp_path, LIVES_ON)
    with Faults(operations * (2 * part + 1) // 24 + part % 5), pytest.raises(Killed):
        go(recipe, tmp_path / "run")
    again = go(recipe, tmp_path / "run")
    assert end(again) == end(run) and verify(again.folder).problems == []


@pytest.mark.nightly
def test_killed_at_every_file_operation_it_ends_on_the_same_digest(undisturbed, tmp_path):
    run, operations = undisturbed
    recipe = recipe_in(tmp_path, LIVES_ON)
    for at in range(operations):
        with Faults(at), pytest.raises(Killed):
            go(recipe, tmp_path / "run")
        assert end(go(recipe, tmp_path / "run")) == end(run), f"operation {at}"
        shutil.rmtree(tmp_path / "run")


# ---- what stays ----


def test_the_state_of_the_head_stays_and_those_behind_it_go_with_a_tombstone(undisturbed):
    run, _ = undisturbed
    there = {index: (run.folder / train_of(run, index).states["policy"].path).is_dir() for index in (1, 2, 3)}
    assert there == {1: False, 2: False, 3: True}
    assert (run.folder / train_of(run, 2).models["policy"].path).is_dir()  # `keep` says so; nobody trains on from it
    tombstones = [json.loads(path.read_text())["paths"] for path in (run.folder / "round-002").glob("pruned-*")]
    assert tombstones == [[train_of(run, 2).states["policy"].path]]
    assert train_of(run, 2).states["policy"].path in verify(run.folder).pruned


def test_after_a_round_that_was_rolled_back_it_goes_on_with_the_state_of_the_head(tmp_path):
    def worse_from_then_on(messages: Any, seed: int, skill: float) -> str:
        from selfkd.backend.fake import adder

        return adder(messages, seed, 1.0 if skill < 0.6 else 0.0)

    recipe = recipe_in(tmp_path, LIVES_ON + "keep_if: dev_last_number > 0.5\n")
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    walk(run, Fake(run.numerics, worse_from_then_on), run.begin())
    assert [seal.accepted for seal in run.sealed()] == [True, True, False, False]
    first = train_of(run, 1)
    for index in (2, 3):
        assert train_of(run, index).notes["optimiser"]["state"] == first.states["policy"].digest
        assert not (run.folder / train_of(run, index).states["policy"].path).exists()
    assert (run.folder / first.states["policy"].path).is_dir()


def test_a_state_that_was_taken_away_is_named_and_not_left_out_silently(tmp_path):
    late = "after:\n  - train: {loss: sft, optimiser: continue, from: round-1, name: late}\nkeep: {last: 9}\n"
    whole = go(recipe_in(tmp_path, LIVES_ON + "keep: {last: 9}\n"), tmp_path / "run")
    recipe = recipe_in(tmp_path, LIVES_ON.replace("rounds: 3", "rounds: 4") + late)
    with pytest.raises(ChainError, match="the optimiser's state of these weights is not on disk any more") as caught:
        go(recipe, whole.folder, amend=True)
    assert "optimiser: fresh" in caught.value.fix


# ---- damage ----


def test_a_damaged_state_is_found_and_no_update_goes_on_with_it(run, tmp_path):
    path = run.folder / train_of(run, 3).states["policy"].path / "moments.json"
    content = path.read_bytes()
    path.write_bytes(content[:-3] + b'7"}')
    assert any(path.relative_to(run.folder).as_posix() in problem for problem in verify(run.folder).problems)
    longer = recipe_in(tmp_path, LIVES_ON.replace("rounds: 3", "rounds: 4"))
    with pytest.raises(ChainError, match=r"moments.json was changed after it was committed"):
        go(longer, run.folder)
    path.write_bytes(content)
    assert len(go(longer, run.folder).sealed()) == 5


def test_a_state_of_other_weights_is_found_and_refused(run, tmp_path):
    path = run.paths.round(3).commit(4, "train")
    record = json.loads(path.read_text())
    record["states"]["policy"]["model"] = "0" * 64
    from selfkd.core import storage

    path.write_bytes(storage.json_text(digest.with_self_digest(record)))
    problems = verify(run.folder).problems
    assert any("belongs to other weights (000000000000) than were committed with it" in problem for problem in problems)
    with pytest.raises(ChainError, match=r"belongs to the weights 000000000000, not to policy@"):
        go(recipe_in(tmp_path, LIVES_ON.replace("rounds: 3", "rounds: 4")), run.folder)


@pytest.mark.parametrize(
    ("optimiser", "states", "said"),
    [
        ("continue", False, "'policy' was trained with `optimiser: continue`, and no state of its optimiser was committed"),
        ("fresh", True, "a state of the optimiser of 'policy' was committed, and its step asked for none"),
    ],
)
def test_a_commit_whose_states_are_not_those_that_its_step_asked_for_is_found(run, optimiser, states, said):
    from selfkd.core import storage

    path = run.paths.round(3).commit(4, "train")
    record = json.loads(path.read_text())
    record["identity"]["optimiser"] = optimiser
    record["states"] = record["states"] if states else {}
    path.write_bytes(storage.json_text(digest.with_self_digest(record)))
    assert any(said in problem for problem in verify(run.folder).problems)


# ---- words ----


def test_the_state_that_an_update_begins_with_names_it_and_where_it_lies_does_not(tmp_path):
    start, rows = Model("policy", "a", "1"), shape("rows", [{"id": "x", "chosen": "y", "weight": 1.0}])
    plain = TrainSpec("sft", 3)
    names = [
        updates.key(start, None, rows, spec, {})
        for spec in (
            plain,
            TrainSpec("sft", 3, keeps_state=True),
            TrainSpec("sft", 3, keeps_state=True, state=OptimiserState(tmp_path, "1")),
            TrainSpec("sft", 3, keeps_state=True, state=OptimiserState(tmp_path / "moved", "1")),
            TrainSpec("sft", 3, keeps_state=True, state=OptimiserState(tmp_path, "2")),
        )
    ]
    assert names[0] == names[1] and names[2] == names[3] and len(set(names)) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("optimiser: continue, from: base", "none made the base: leave out one of the two"),
        ("optimiser: continue, from: policy@base", "none made the base: leave out one of the two"),
        ("optimiser: continue, lora: {r: 2}", "without `continue: true` each update makes a new adapter"),
        ("optimiser: stale", "optimiser"),
    ],
)
def test_what_has_no_optimiser_to_go_on_with_is_refused_at_its_line(tmp_path, words, said):
    with pytest.raises(RecipeError) as caught:
        recipe_in(tmp_path, RECIPE.replace("{loss: sft}", f"{{loss: sft, {words}}}"))
    assert said in str(caught.value) and "sums.yaml:14" in str(caught.value)
