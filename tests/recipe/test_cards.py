"""What `selfkd recipes` says of each: by hand for three recipes, and of every shipped one something."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.cli.main import main
from selfkd.core.files import builtin_folder
from selfkd.recipe.cards import card

SHIPPED = builtin_folder() / "recipes"
SAID = {
    "star": "needs a reward, the hub; sft from base on rows of this round; as in the code",
    "spin": "needs gold answers, the hub; dpo from start against start on rows of this round and 1 before; as in the released code [C]",
    "easy-to-hard": "needs a reward; sft from start on rows of all rounds; as in the authors' code, in small",
}


@pytest.mark.parametrize("name", SAID)
def test_a_card_says_what_is_needed_and_what_is_trained_from_what_on_which_rows(name: str) -> None:
    assert card(name, SHIPPED / f"{name}.yaml").sentence() == SAID[name]


def test_every_shipped_recipe_is_listed_with_its_title_its_loss_and_how_close_it_is_to_its_paper(capsys) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    for path in SHIPPED.glob("*.yaml"):
        one = card(path.stem, path)
        assert one.title in shown and one.sentence() in shown and one.loss and one.fidelity and one.needs, path.stem


def test_a_recipe_that_cannot_be_read_is_listed_with_the_reason(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("# Mine\nmodel: fake\nsteps: [{smaple: {}}]\n")
    assert main(["recipes"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recipes/mine.yaml ")]
    assert "cannot be read: " in line and "'prompts' is missing" in line
