"""What `selfkd recipes` says of each: by hand for three recipes, and of every shipped one something."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from selfkd.chain.results import Result, lines_of
from selfkd.cli.main import main
from selfkd.core.files import builtin_folder
from selfkd.recipe.cards import card
from selfkd.recipe.load import read
from selfkd.recipe.method import method
from selfkd.recipe.sweep import read_sweep
from selfkd.report.standing import kept, standing

SHIPPED = builtin_folder() / "recipes"
SAID = {
    "star": "needs a reward, the hub; sft from base on rows of this round; as in the code; compared",
    "spin": "needs gold answers, the hub; dpo from start against start on rows of this round and 1 before; as in the released code [C]; only walked",
    "easy-to-hard": "needs a reward; sft from start on rows of all rounds; as in the authors' code, in small; only walked",
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


def test_what_is_said_of_how_far_recipes_were_tried_follows_from_results_and_tests() -> None:
    """Where it fails: make reproduced, or the last line of it, writes recipes/standing.json anew."""
    home = builtin_folder()
    found = standing(*kept(home / "benchmarks/reproduce"), SHIPPED, home / "tests")
    assert json.loads((SHIPPED / "standing.json").read_text()) == found
    assert (
        "rest-em" in found["compared"] and "context-distillation" not in found["compared"]
    )  # its arm learns by SFT: another method
    assert set(found["walked"]) == {path.stem for path in SHIPPED.glob("*.yaml")}


def test_a_recipe_counts_as_compared_by_its_method_and_the_very_arm_that_ran_and_not_by_its_name() -> None:
    home = builtin_folder()
    sweep = read_sweep(home / "benchmarks/reproduce/sums.yaml")
    results = [one for one in lines_of(home / "benchmarks/reproduce/results.jsonl")[0] if one.arm.startswith("rest-em")]

    def compared(results: list[Result], shipped: Path = SHIPPED) -> dict:
        return standing(results, [sweep], shipped, home / "tests")["compared"]

    assert set(compared(results)) == {"rest-em"} and "gold-sft" in compared(results)["rest-em"]["controls"]
    assert compared([replace(one, recipe="another") for one in results]) == {}  # the arm's file changed since
    assert compared([replace(one, failed="no headroom") for one in results]) == {}


def test_another_method_of_the_same_name_is_another_method(tmp_path: Path) -> None:
    text = (SHIPPED / "rest-em.yaml").read_text()
    (tmp_path / "rest-em.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text(text.replace("from: base", "from: start"))
    assert method(read(str(tmp_path / "rest-em.yaml"))) == method(read("rest-em"))
    assert method(read(str(tmp_path / "other.yaml"))) != method(read("rest-em"))
    assert card("rest-em", SHIPPED / "rest-em.yaml").tried == "compared"
    assert card("rest-em", tmp_path / "rest-em.yaml").tried == ""  # of a copy nobody knows
