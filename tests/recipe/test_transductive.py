"""Learning from the prompts that are measured: only where the recipe says so, and never with their answers in sight."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, go, write_prompts

from selfkd.errors import GuardError, RecipeError
from selfkd.recipe.lint import lint
from selfkd.recipe.load import frozen, load

SAME = RECIPE.replace("train: {file: train.jsonl", "train: {file: dev.jsonl")
VOTED = SAME.replace("- score: reward/number.py", "- score: {reward: reward/vote.py:majority, as: agrees}  #").replace(
    "last_number = 1", "agrees = 1"
)
STEPS = VOTED.replace("dev.jsonl, prompt: question, answer: answer}\n  dev", "dev.jsonl, prompt: question}\n  dev")


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)


def written(text: str) -> str:
    Path("sums.yaml").write_text(text)
    return "sums.yaml"


def test_prompts_that_are_measured_are_learned_from_only_where_the_recipe_says_so():
    with pytest.raises(GuardError, match="stand in 'dev' too"):
        go(load(written(VOTED)), Path("run"))
    [problem] = lint(load("sums.yaml")).problems
    assert "every prompt stands in 'dev' too" in problem
    report = lint(load(written("transductive: true\n" + VOTED)))
    assert report.problems == []
    said = "prompts.train: 6 prompts are those of 'dev' (transductive): dev tells how well these very prompts are answered, not others"
    assert said in report.notes


@pytest.mark.parametrize("text", [VOTED, STEPS])
def test_their_answers_and_columns_are_not_there_for_any_step_and_are_there_to_measure(text):
    run = go(load(written("transductive: true\n" + text)), Path("run"))
    prompts = pl.concat([run.split("train").scan("prompts").collect()])
    assert prompts.height == 6 and prompts["answer"].null_count() == 6 and set(prompts["meta"]) == {"{}"}
    assert run.split("dev").prompts["answer"].null_count() == 0
    assert run.sealed()[1].metrics["dev/last_number_scored"] == 6
    again = frozen(run.recipe.resolved(), Path.cwd())
    assert again.transductive and "transductive" not in load(written(RECIPE)).resolved()


def test_what_needs_a_gold_answer_is_refused_beforehand():
    [problem] = lint(load(written("transductive: true\n" + SAME))).problems
    assert "steps[1].score: reward/number.py:last_number asks for the gold answer" in problem
    with pytest.raises(RecipeError, match=r"steps\[0\]\.gold: the train prompts of a transductive recipe have no gold answers"):
        load(written("transductive: true\n" + VOTED.replace("steps:\n", "steps:\n  - gold\n")))


def test_a_source_may_leave_its_answers_out_by_itself():
    voted = VOTED.replace(
        "dev.jsonl, prompt: question, answer: answer}\n  dev", "train.jsonl, prompt: question, gold: false}\n  dev"
    )
    run = go(load(written(voted)), Path("run"))
    assert run.split("train").prompts["answer"].null_count() == 12
    with pytest.raises(RecipeError, match="'gold' should be false, or left out, not true"):
        load(written(voted.replace("gold: false", "gold: true")))


def test_a_template_of_the_source_is_not_shown_what_is_left_out():
    with_template = STEPS.replace(
        "prompt: question}\n  dev", "prompt: question, template: '{{ prompt.text }} {{ answer }}'}\n  dev"
    )
    problems = lint(load(written("transductive: true\n" + with_template))).problems
    assert problems and all("answer" in one and "prompts.train" in one for one in problems)
