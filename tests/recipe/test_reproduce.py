"""The sweep files of benchmarks/reproduce: every shipped recipe is an arm of one, and each of them can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from selfkd.chain.results import lines_of
from selfkd.core.files import builtin_folder
from selfkd.recipe.sweep import is_sweep, read_sweep

HOME = builtin_folder()
SWEEPS = {
    str(path.relative_to(HOME / "benchmarks/reproduce")): path
    for path in sorted((HOME / "benchmarks/reproduce").rglob("*.yaml"))
    if is_sweep(path)
}


def test_every_shipped_recipe_is_an_arm_of_a_sweep_with_several_seeds() -> None:
    words = [yaml.safe_load(path.read_text("utf-8")) for path in SWEEPS.values()]
    arms = [arm if isinstance(arm, str) else arm["recipe"] for one in words for arm in one["arms"]]
    beside = {Path(arm).stem for arm in arms}
    assert {path.stem for path in (HOME / "recipes").glob("*.yaml")} <= beside
    assert all(one["seeds"] >= 3 and one["results"] for one in words)
    assert len({one["name"] for one in words}) == len(words)


@pytest.mark.parametrize(
    "name", ["sums.yaml", "quartz.yaml", *(pytest.param(name, marks=pytest.mark.nightly) for name in SWEEPS if "/" in name)]
)
def test_a_sweep_of_the_reproductions_can_be_read_and_has_its_page(name: str) -> None:
    sweep = read_sweep(SWEEPS[name])
    page = (HOME / "docs/reproduce.md").read_text("utf-8")
    assert all(f"| {arm} | " in page for arm in sweep.arms)
    made = SWEEPS[name].parent / str(sweep.results)
    assert not made.is_file() or {one.sweep for one in lines_of(made)[0]} <= {sweep.name}
