"""Every shipped recipe's chain makes a page: judges, pairs, rankings, several roles, warm-ups, averages, existing data."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import page, seen

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.dry_run import in_small, knowing
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.recipe.load import load

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
QUICK = ("self-rewarding", "v-star")  # a judge and pairs; two roles


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in RECIPES])
def test_the_page_of_a_shipped_recipe_is_whole(tmp_path, name):
    recipe = in_small(load(name))
    run = Run.open(recipe, tmp_path / name, Machine(backend="fake"))
    walk(run, Fake({}, knowing(recipe)), run.begin())
    said = seen(page(run.folder)).words
    assert "Gain over the base" in said and "Lineage of each checkpoint" in said
    assert name in seen(page(run.folder, html=False)).words
