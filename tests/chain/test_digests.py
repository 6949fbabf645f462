"""The digests of every shipped recipe's chain on the fake backend, as written down: no move and no tidying may change them.

Where a change is meant (a new format, a step that says something else), write them anew and say so in the commit:
`python tests/chain/test_digests.py`, or with the names of some recipes behind it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.dry_run import in_small, knowing
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.recipe.load import load

RECORDED = Path(__file__).with_name("digests")  # a file of each recipe
RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def chain(name: str, folder: Path) -> list[str]:
    """The digest of each round of a shipped recipe, in small, on a model that knows some answers."""
    recipe = in_small(load(name))
    run = Run.open(recipe, folder / name, Machine(backend="fake"))
    walk(run, Fake({}, knowing(recipe)), run.begin())
    return [sealed.digest for sealed in run.sealed()]


@pytest.mark.parametrize("name", RECIPES)
def test_the_chain_of_a_shipped_recipe_has_the_digests_that_were_written_down(tmp_path, name):
    assert chain(name, tmp_path) == json.loads((RECORDED / f"{name}.json").read_text())


if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        with TemporaryDirectory() as place:
            (RECORDED / f"{name}.json").write_text(json.dumps(chain(name, Path(place)), indent=1) + "\n")
