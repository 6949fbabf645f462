"""Rows that teach something else than the answer as it was written: the text of a template that sees prompt and answer."""

from __future__ import annotations

import re

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.chain.run import Run
from selfkd.errors import RecipeError
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load

HEAD = RECIPE[: RECIPE.index("steps:")]
STEPS = (
    "  - sample: {n: 2, max_tokens: 64}\n  - score: reward/number.py:last_number\n"
    "  - build: {view: ['{{ prompt.text }}', 'Briefly: {{ prompt.text }}'], completion: \"%s\"}\n"
    "  - build: {name: whole}\n  - train: sft\n"
)


def steady(messages: list[dict[str, str]], seed: int, skill: float) -> str:
    """Steps and a result behind ####; every third answer has no result."""
    first, second = (int(number) for number in re.findall(r"\d+", messages[-1]["content"])[-2:])
    return f"{first} and {second}.\n####" + (f" {first + second}" if seed % 3 else "")


def run_of(folder, completion: str) -> Run:
    return go(recipe_in(folder, HEAD + "steps:\n" + STEPS % completion, "rounds=1"), folder / "run", Fake({}, steady))


def table(run: Run, step: str, name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(1)[step].tables[name].files])


def test_rows_teach_what_the_template_makes_of_prompt_and_answer_under_each_view(tmp_path):
    run = run_of(tmp_path, "The result is {{ of.text.rpartition('####')[2].strip() }}, said of {{ of.last_number }}.")
    rows, samples = table(run, "build", "rows"), table(run, "sample", "samples")
    texts = dict(samples.select("id", "text").iter_rows())
    assert rows.height == 2 * samples.height
    for [sample], text, ids, ended in rows.select("samples", "chosen", "chosen_ids", "chosen_ended").iter_rows():
        result = texts[sample].rpartition("####")[2].strip()
        assert text.startswith(f"The result is {result}, said of ") and ids is None and ended
    shown = {messages[-1]["content"].partition(": ")[0] for messages in rows["messages"]}
    assert "Briefly" in shown and len(shown) > 1


def test_a_text_of_which_nothing_is_left_makes_no_row_and_the_answer_stays_for_other_rows(tmp_path):
    run = run_of(tmp_path, "{{ of.text.rpartition('####')[2] }}")
    rows, drops = table(run, "build", "rows"), table(run, "build", "drops")
    without = table(run, "sample", "samples").filter(pl.col("text").str.ends_with("####"))
    assert 0 < without.height < 24
    assert set(drops["reason"]) == {"nothing is left of it as a completion"} and drops.height == 2 * without.height
    assert rows.height == 2 * (24 - without.height) and rows["chosen"].str.contains(r"^\d+$").all()
    assert table(run, "whole", "rows").height == 24


@pytest.mark.parametrize("kind", ["kind: pair, chosen: 'tokens > 1', rejected: 'tokens > 2'", "kind: rank, by: tokens"])
def test_a_row_of_several_answers_keeps_them_as_they_are(tmp_path, kind):
    steps = f"steps:\n  - sample: 2\n  - build: {{{kind}, completion: x}}\n  - train: sft\n"
    with pytest.raises(RecipeError, match="'completion' is for kind: sft and kind: label"):
        recipe_in(tmp_path, HEAD + steps)


def test_lint_finds_what_the_template_cannot_show(tmp_path):
    recipe_in(tmp_path, HEAD + "steps:\n" + STEPS % "{{ of.last_nmber }}")
    [problem] = lint(load(str(tmp_path / "sums.yaml"))).problems
    assert "steps[2].build" in problem and "Did you mean 'last_number'?" in problem


def test_a_recipe_without_it_keeps_its_keys(tmp_path):
    step = recipe_in(tmp_path, HEAD + "steps:\n  - sample: 2\n  - build\n  - train: sft\n").steps_of(1)[1]
    assert "completion" not in step.identity()
