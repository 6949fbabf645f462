"""What is refused or left out when a run is created."""

from __future__ import annotations

import json

import pytest
from chains import RECIPE, recipe_in

from selfkd.backend.machine import Machine
from selfkd.chain.run import Run
from selfkd.errors import GuardError, RecipeError

TEST = RECIPE.replace("prompts:\n", "prompts:\n  test: {file: test.jsonl, prompt: question, answer: answer}\n")


def created(folder, text: str, *overrides: str, sums: tuple[int, ...] = (60, 90)) -> Run:
    """A run whose test split asks 60 + 0 (which is the first of dev's prompts) and 90 + 0, or other such sums."""
    rows = [{"question": f"What is {first} + 0?", "answer": str(first)} for first in sums]
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run.open(recipe_in(folder, text, *overrides), folder / "run", Machine(backend="fake"))


def test_dev_prompts_that_stand_in_test_are_refused(tmp_path):
    with pytest.raises(GuardError, match="1 dev prompts stand in 'test' too"):
        created(tmp_path, TEST)


def test_dev_prompts_that_stand_in_test_are_left_out_where_the_recipe_says_so(tmp_path):
    run = created(tmp_path, TEST, "overlap=drop")
    assert (run.info.prompts["dev"].rows, run.info.prompts["dev"].overlap) == (5, 1)
    assert (run.info.prompts["test"].rows, run.info.prompts["train"].overlap) == (2, 0)


def test_a_dev_split_that_is_all_test_is_refused_even_then(tmp_path):
    with pytest.raises(GuardError, match="every dev prompt stands in 'test' too"):
        created(tmp_path, TEST.replace("test.jsonl", "dev.jsonl"), "overlap=drop")


def test_a_template_that_names_what_no_prompt_has_is_refused_before_the_run_exists(tmp_path):
    text = RECIPE.replace("{n: 3,", "{n: 3, template: '{{ prompt.hint }}',")
    with pytest.raises(RecipeError, match=r"steps\[0\].sample: template:1  no prompt has 'hint'"):
        Run.open(recipe_in(tmp_path, text), tmp_path / "run", Machine(backend="fake"))
    assert not (tmp_path / "run" / "run.json").exists()
