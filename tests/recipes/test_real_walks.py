"""Every recipe walked for real: vLLM, TRL and Ray, the 135M model of the quickstart, its small form where it has one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from real_chain import begins, finish, kill_group, start, until

from selfkd.core.files import builtin_folder
from selfkd.recipe.load import load
from selfkd.report.verify import verify

pytestmark = [pytest.mark.real, pytest.mark.nightly]
NAMES = sorted(path.stem for path in (builtin_folder() / "recipes").glob("*.yaml"))
LONG = 3600.0  # seconds, on a machine that has other work too


def small(name: str) -> tuple[str, ...]:
    """What is typed to run a recipe small: those on the quickstart's model are small as they are."""
    return (name, "--small") if load(name).small else (name, "rounds=1")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_walks_for_real_and_every_swap_of_weights_is_proved(name: str, tmp_path: Path) -> None:
    run = finish(tmp_path, name, recipe=small(name), on=None, wait=LONG)
    sealed = run.sealed()
    assert len(sealed) == run.recipe.rounds + 1
    assert verify(run.folder).problems == []
    for index, (before, now) in enumerate(pairwise(sealed), start=1):
        changed = before.models["policy"].digest != now.models["policy"].digest
        swaps = [made.notes["swap"] for made in run.made(index).values() if "swap" in made.notes]
        assert not changed or any(swap["proved"] is True for swap in swaps)


@pytest.mark.parametrize("name", ["star", "iterative-dpo", "context-distillation"])  # SFT, pairs, kd
def test_a_recipe_that_is_killed_twice_ends_on_the_digest_of_one_that_was_not(name: str, tmp_path: Path) -> None:
    words = small(name)
    whole = finish(tmp_path, "whole", recipe=words, on=None, wait=LONG)
    run = tmp_path / "runs" / "killed"
    for step in ("sample", "train"):
        process = start(tmp_path, "killed", recipe=words, on=None)
        until(run, begins(1, step), process, wait=LONG)
        kill_group(process)
        process.wait()
    killed = finish(tmp_path, "killed", recipe=words, on=None, wait=LONG)
    assert killed.sealed()[-1].digest == whole.sealed()[-1].digest
    assert verify(run).problems == []
