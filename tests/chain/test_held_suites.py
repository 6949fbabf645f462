"""Suites that are held out beside dev: measured every round, never copied to the test split, and what they lost may decide."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from chains import RECIPE, go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.chain import records
from selfkd.chain.records import Seal
from selfkd.core.stats import change
from selfkd.errors import GuardError, RecipeError
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load
from selfkd.report.verify import verify

SUITE = [{"prompt": f"Say {at} again.", "answer": str(at)} for at in range(200, 220)]
HELD = RECIPE.replace("steps:\n", f"  held: {{facts: {json.dumps(SUITE)}}}\nsteps:\n", 1) + (
    "  - measure: {name: kept, reward: reward/number.py:last_number, split: facts}\n"
)


class Forgetful(Fake):
    """It learns sums, and with each update forgets more of the suite: of 20 answers it knows 20, then 10."""

    def __init__(self, numerics):
        super().__init__(numerics, self.said)

    def said(self, messages, seed, skill):
        text = messages[-1]["content"]
        if not text.startswith("Say"):
            first, second = (int(word) for word in text.removesuffix("?").split() if word.isdigit())
            return f"Answer: {first + second}"
        number = int(text.split()[1])
        return f"Answer: {number if skill < 0.4 or number % 2 else number + 1}"


def test_a_suite_is_measured_every_round_beside_dev_and_not_once_more_as_a_test(tmp_path):
    text = HELD.replace("steps:\n", '  test: [{prompt: "What is 9 + 9?", answer: "18"}]\nsteps:\n', 1)
    run = go(recipe_in(tmp_path, text), tmp_path / "run", Forgetful({}))
    metrics = [seal.metrics for seal in run.sealed()]
    assert [one["facts/last_number"] for one in metrics] == [1.0, 0.5, 0.5]
    assert [one["facts/prompts"] for one in metrics] == [20, 20, 20] and "test/last_number" in metrics[2]
    assert [name for name in run.made(2) if name.endswith("-test")] == ["measure-test"]
    assert not verify(run.folder).problems


def test_keep_if_sees_the_change_against_the_base_with_its_interval_paired_by_prompt(tmp_path):
    """Twenty prompts, all right in round 0, ten in round 1: the change is -0.5."""
    recipe = recipe_in(tmp_path, HELD + "keep_if: facts_last_number_change_low > -0.6 AND dev_last_number_change >= 0\n")
    run = go(recipe, tmp_path / "run", Forgetful({}))
    first = run.sealed()[1]
    before, after = ({str(at): value for at, value in enumerate(values)} for values in ([1.0] * 20, [1.0, 0.0] * 10))
    expected = change(before, after)
    assert first.metrics["facts/last_number_change"] == expected.value == -0.5
    assert first.metrics["facts/last_number_change_low"] == round(expected.interval.low, 6)
    assert first.accepted == (expected.interval.low > -0.6)
    assert "dev/last_number_change_high" in first.metrics and "facts/last_number_change" not in run.sealed()[0].metrics
    assert not verify(run.folder).problems and not verify(run.folder, quick=True).problems


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("facts/last_number_change", 0.5, "facts/last_number_change is 0.5, and the answers come to -0.5"),
        ("facts/other_change", 0.5, "facts/other_change is a change of what no step of it measured"),
        ("facts/other", 0.5, "its metrics are not those of its steps"),
        ("facts/last_number", 0.75, "its metrics are not those of its steps"),
    ],
)
def test_verify_works_the_changes_out_again_that_decided_whether_a_round_was_kept(tmp_path, name, value, said):
    run = go(recipe_in(tmp_path, HELD + "keep_if: facts_last_number_change > -2\n"), tmp_path / "run", Forgetful({}))
    path = run.paths.round(2).seal
    seal = records.read(path, Seal)
    path.unlink()
    records.write(path, replace(seal, metrics={**seal.metrics, name: value}), run.paths.tmp)
    assert verify(run.folder).problems == [f"round-002/sealed.json: {said}"]


def test_a_round_that_forgot_too_much_is_rolled_back(tmp_path):
    run = go(recipe_in(tmp_path, HELD + "keep_if: facts_last_number_change >= -0.1\n"), tmp_path / "run", Forgetful({}))
    assert [seal.accepted for seal in run.sealed()] == [True, False, False]
    assert run.head()["policy"].digest == run.sealed()[0].models["policy"].digest


def test_without_a_word_on_change_a_seal_holds_none(tmp_path):
    run = go(recipe_in(tmp_path, HELD + "keep_if: facts_last_number > 0.1\n"), tmp_path / "run", Forgetful({}))
    assert not [name for seal in run.sealed() for name in seal.metrics if "change" in name]


def test_prompts_of_a_suite_that_stand_in_train_are_refused(tmp_path):
    text = HELD.replace(json.dumps(SUITE), '[{prompt: "What is 10 + 0?", answer: "10"}]')
    assert "stand in 'facts' too" in lint(recipe_in(tmp_path, text)).text()
    with pytest.raises(GuardError, match="stand in 'facts' too"):
        go(recipe_in(tmp_path, text), tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{facts:", "{dev:", "a suite cannot be called 'dev'"),
        ("{facts:", "{Facts:", "a suite cannot be called 'Facts'"),
        ("split: facts", "split: fact", "Did you mean 'facts'?"),
        ("reward/number.py:last_number, split", "reward/number.py:last_nmber, split", "last_nmber"),
    ],
)
def test_lint_names_what_is_wrong_with_a_suite(tmp_path, old, new, said):
    try:
        text = lint(recipe_in(tmp_path, HELD.replace(old, new))).text()
    except RecipeError as error:
        text = str(error)
    assert said in text and "sums.yaml:" in text


def test_a_change_of_what_is_no_score_is_no_metric(tmp_path):
    with pytest.raises(RecipeError, match="no column 'facts_tokens_change'"):
        recipe_in(tmp_path, HELD + "keep_if: facts_tokens_change < 0\n")


def test_a_resolved_recipe_holds_its_suites_where_the_run_lies(tmp_path):
    run = go(recipe_in(tmp_path, HELD), tmp_path / "run")
    again = load(str(run.folder / "recipe.resolved.yaml"))
    assert again.splits()["facts"] == {"file": run.info.prompts["facts"].file}
    assert go(again, tmp_path / "again").info.prompts["facts"].rows == 20
