"""A run in which nothing was committed is no chain yet: another recipe begins it anew, and a kill on the way loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from chains import RECIPE, Faults, Killed, go
from chains import recipe_in as whole_recipe_in

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.core.lease import Lease
from selfkd.errors import BusyError, ChainError
from selfkd.recipe.schema import Recipe
from selfkd.report.verify import verify

FAKE = Machine(backend="fake")
BARE = RECIPE[: RECIPE.index("  - score")] + "  - train: {loss: sft}\n"  # without rewards, whose processes take time to start
OTHER = ("model=other", "seed=3", "prompts.train.limit=5")


def recipe_in(folder: Path, *overrides: str) -> Recipe:
    return whole_recipe_in(folder, BARE, *overrides)


def fails(call: str):
    """A hook of the fake backend that fails at the first call of that name."""

    def hook(name: str) -> None:
        if name == call:
            raise Killed

    return hook


def attempted(folder: Path, call: str = "load") -> Path:
    """A run whose first attempt ended at a call."""
    recipe = recipe_in(folder)
    with pytest.raises(Killed):
        go(recipe, folder / "run", Fake({}, hook=fails(call)))
    return folder / "run"


def test_a_run_that_never_loaded_its_model_begins_anew_with_another_recipe_and_says_so_in_one_line(tmp_path):
    run = attempted(tmp_path)
    opened = Run.open(recipe_in(tmp_path, *OTHER), run, FAKE)
    [said] = opened.remarks()
    assert (
        said.startswith("Nothing was committed in this run yet, so it begins anew: ")
        and "'fake' was changed to 'other'" in said
    )
    walk(opened, Fake(opened.numerics), opened.begin())
    assert len(opened.sealed()) == 3 and opened.info.seed == 3 and opened.info.prompts["train"].rows == 5
    assert verify(run).problems == []
    assert opened.paths.attempts() == [1, 2]  # the log of the first one stays


def test_it_ends_where_a_run_ends_that_was_never_attempted(tmp_path):
    anew = go(recipe_in(tmp_path, *OTHER), attempted(tmp_path))
    fresh = go(recipe_in(tmp_path, *OTHER), tmp_path / "fresh")
    assert [seal.digest for seal in anew.sealed()] == [seal.digest for seal in fresh.sealed()]


def test_the_same_recipe_goes_on_and_begins_nothing_anew(tmp_path):
    run = attempted(tmp_path)
    created = (run / "run.json").read_bytes()
    opened = Run.open(recipe_in(tmp_path), run, FAKE)
    assert opened.remarks() == [] and (run / "run.json").read_bytes() == created


def test_what_is_committed_is_a_chain_that_no_other_recipe_begins_anew(tmp_path):
    run = attempted(tmp_path, "generate")  # the model is committed
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ChainError, match="was made by a different recipe"):
        Run.open(recipe_in(tmp_path, *OTHER), run, FAKE)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_numerics_that_an_engine_came_up_with_are_no_empty_attempt_though_the_rounds_are_gone(tmp_path):
    run = attempted(tmp_path)
    (run / "numerics.json").write_text("{}")
    with pytest.raises(ChainError):
        Run.open(recipe_in(tmp_path, *OTHER), run, FAKE)
    assert (run / "run.json").is_file()


def test_a_run_that_somebody_drives_is_not_begun_anew(tmp_path):
    run = attempted(tmp_path)
    created = (run / "run.json").read_bytes()
    with Lease(run / "leases", run / "tmp"), pytest.raises(BusyError):
        Run.open(recipe_in(tmp_path, *OTHER), run, FAKE)
    assert (run / "run.json").read_bytes() == created


def test_a_driver_that_opened_the_run_before_it_was_begun_anew_commits_nothing_into_it(tmp_path):
    run = attempted(tmp_path)
    early = Run.open(recipe_in(tmp_path), run, FAKE)
    anew = Run.open(recipe_in(tmp_path, *OTHER), run, FAKE)
    with pytest.raises(ChainError, match="began this run anew"):
        walk(early, Fake(early.numerics), early.begin())
    assert anew.made(0) == {} and go(recipe_in(tmp_path, *OTHER), run).info.seed == 3


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.nightly)])
def test_killed_at_file_operations_of_beginning_anew_the_same_command_makes_the_same_run(tmp_path, step):
    whole = attempted(tmp_path / "whole")
    with Faults() as counted:
        Run.open(recipe_in(tmp_path / "whole", *OTHER), whole, FAKE)
    expected = Run.at(whole).info.root
    for at in range(0, counted.count, step):
        run = attempted(tmp_path / str(at))
        recipe = recipe_in(tmp_path / str(at), *OTHER)
        with Faults(at), pytest.raises(Killed):
            Run.open(recipe, run, FAKE)
        for done in (run / "leases").glob("*.done"):
            done.unlink()  # a process that is gone leaves no such mark
        opened = Run.open(recipe, run, FAKE)
        assert (opened.info.root, verify(run).problems) == (expected, []), f"operation {at}"
