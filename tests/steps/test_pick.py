"""measure: {logprobs: …, pick: …}: what picking one of n answers gets, by another model's log-probability or any other expression."""

from __future__ import annotations

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.chain.run import Run
from selfkd.core.pool import Model
from selfkd.errors import RecipeError
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load

HEAD = RECIPE[: RECIPE.index("steps:")]
TAUGHT = (
    "  - sample: {n: 4, temperature: 0.8, max_tokens: 64}\n  - train: sft\n"
    "  - build: {kind: pair, chosen: 'number = 0', rejected: 'number > 0', as: pairs, role: other}\n"
    "  - train: {name: other, loss: dpo, of: pairs, role: other, from: policy@base, reference: policy@base}\n"
)
EVEN = "def even(completion):\n    return float(int(completion[-1]) % 2 == 0)\n"
MEASURE = "  - measure: {reward: size.py:even, n: 5, temperature: 1, %s}\n"
BY_OTHER = MEASURE % "logprobs: {other: other, first: policy@base}, pick: other - first"


def recipe_of(folder, measure: str, *overrides: str):
    (folder / "size.py").write_text(EVEN)
    return recipe_in(folder, HEAD + "steps:\n" + TAUGHT + measure, "rounds=2", *overrides)


def run_of(folder, measure: str, *overrides: str, **more) -> Run:
    return go(recipe_of(folder, measure, *overrides), folder / "run", **more)


def scores(run: Run, index: int) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(index)["measure"].tables["scores"].files])


def by_hand(run: Run, index: int, value) -> float:
    """The mean score of each prompt's answer with the highest value."""
    won = []
    for _, group in run.samples(index, step="measure").sort("id").group_by("prompt", maintain_order=True):
        rows = group.to_dicts()
        most = max(map(value, rows))
        picked = [float(int(row["text"][-1]) % 2 == 0) for row in rows if value(row) == most]
        won.append(sum(picked) / len(picked))
    return sum(won) / len(won)


def test_the_answer_with_the_highest_value_counts(tmp_path):
    run = run_of(tmp_path, MEASURE % "pick: '-chars'")
    for index in (0, 1, 2):
        found = run.sealed()[index].metrics["dev/even_best_5"]
        assert found == pytest.approx(by_hand(run, index, lambda row: -len(row["text"])))
    noted = run.sealed()[1].notes["measured"]["dev/even_best_5"]
    assert noted["value"] == run.sealed()[1].metrics["dev/even_best_5"] and noted["scored"] == noted["change"]["prompts"] == 6


def test_log_probabilities_are_those_of_the_models_at_that_point_and_null_before_one_is_made(tmp_path):
    run = run_of(tmp_path, BY_OTHER, "best.metric=dev/even_best_5")
    assert run.sealed()[0].metrics["dev/even_best_5"] is None
    assert set(scores(run, 0)["name"]) == {"even"}
    for index in (1, 2):
        models = {"other": run.sealed()[index].models["other"], "first": run.loaded()["policy"]}
        rows = run.samples(index, step="measure").sort("id")
        asked = rows.select(
            "id", "text", "finish_reason", messages="teacher_messages", token_ids=pl.lit(None, pl.List(pl.Int32))
        )
        said = {
            name: {one: value for one, value, _ in Fake({}).logprobs(Model(name, "", model.digest), asked)}
            for name, model in models.items()
        }
        value = lambda row, said=said: said["other"][row["id"]] - said["first"][row["id"]]  # noqa: E731 - named for what it is
        assert run.sealed()[index].metrics["dev/even_best_5"] == pytest.approx(by_hand(run, index, value))
        kept = scores(run, index)
        assert set(kept["name"]) == {"even", "other", "first", "pick"}
        assert dict(kept.filter(pl.col("name") == "other").select("sample", "value").iter_rows()) == pytest.approx(
            said["other"]
        )


def test_a_pick_changes_no_other_figure_of_its_step_and_asks_for_nothing_again(tmp_path):
    run_of(tmp_path, MEASURE % "max_tokens: 64")
    run = go(recipe_of(tmp_path, MEASURE % "max_tokens: 64, pick: '-chars'", "rounds=3"), tmp_path / "run", amend=True)
    assert not run.sealed()[3].notes["measured"]["dev"]["differently"]
    assert run.sealed()[3].metrics["dev/even_best_5"] is not None


def test_another_pick_is_another_way_to_measure_what_it_gets(tmp_path):
    run_of(tmp_path, MEASURE % "pick: '-chars'")
    run = go(recipe_of(tmp_path, MEASURE % "pick: chars", "rounds=3"), tmp_path / "run", amend=True)
    noted = run.sealed()[3].notes["measured"]
    assert noted["dev/even_best_5"]["differently"] and not noted["dev"]["differently"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("n: 1, pick: chars", "there is one to pick only of several answers that may differ"),
        ("temperature: 0, pick: chars", "there is one to pick only of several answers that may differ"),
        ("logprobs: {other: other}", "nothing reads them without `pick`"),
        ("logprobs: {even: other}, pick: even", "'even' is a column that `pick` has"),
        ("logprobs: {chars: other}, pick: chars", "that is a column of samples"),
        ("logprobs: {other: othr}, pick: other", "no model 'othr'"),
        ("pick: chras", "Did you mean 'chars'?"),
    ],
)
def test_lint_refuses_what_cannot_be_picked_by(tmp_path, words, problem):
    (tmp_path / "size.py").write_text(EVEN)
    given = {"n": "n: 5", "temperature": "temperature: 1"}
    given = [text for name, text in given.items() if not words.startswith(f"{name}:")]
    measure = f"  - measure: {{reward: size.py:even, {', '.join([*given, words])}}}\n"
    try:
        recipe_in(tmp_path, HEAD + "steps:\n" + TAUGHT + measure, "rounds=2")
        found = "\n".join(lint(load(str(tmp_path / "sums.yaml"))).problems)
    except RecipeError as error:
        found = str(error)
    assert problem in found


def test_a_model_that_is_made_behind_the_measure_cannot_be_asked_in_the_first_round(tmp_path):
    (tmp_path / "size.py").write_text(EVEN)
    steps = TAUGHT.splitlines(keepends=True)
    with pytest.raises(RecipeError, match="'other' cannot be there in round 1"):
        recipe_in(tmp_path, HEAD + "steps:\n" + "".join([*steps[:2], BY_OTHER, *steps[2:]]), "rounds=2")


def test_a_step_without_it_keeps_its_key(tmp_path):
    step = recipe_of(tmp_path, MEASURE % "max_tokens: 64").steps_of(1)[-1]
    assert not {"pick", "logprobs"} & set(step.identity())
