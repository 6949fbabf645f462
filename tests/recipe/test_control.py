"""Controls: each is the method's own recipe with one thing taken away, and a recipe as any other."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, Faults, Killed, end, go, recipe_in

from selfkd.chain.trained import steps_taken
from selfkd.core import yamlfile
from selfkd.errors import UsageError
from selfkd.recipe.control import CONTROLS, controlled, decodings
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load
from selfkd.recipe.schema import Recipe
from selfkd.report import status
from selfkd.report.verify import verify

HINTED = RECIPE.replace(
    "max_tokens: 64}", "max_tokens: 64, told: own, template: 'It is {{ prompt.answer }}. {{ prompt.text }}'}", 1
)


def written(recipe: Recipe, name: str) -> dict:
    """Return the words of a step as the resolved recipe holds them."""
    return next(words for step in recipe.resolved()["steps"] for words in step.values() if words["name"] == name)


def test_random_reward_keeps_as_many_samples_of_as_many_prompts_and_knows_nothing_of_them(tmp_path: Path) -> None:
    method = go(recipe_in(tmp_path / "a", RECIPE, "sample.n=6"), tmp_path / "method")
    control = go(controlled(recipe_in(tmp_path / "a", RECIPE, "sample.n=6"), "random-reward"), tmp_path / "control")
    was, dealt = method.samples(1), control.samples(1)
    assert was["id"].to_list() == dealt["id"].to_list()
    assert was["last_number"].to_list() == dealt["true_last_number"].to_list()
    assert was["kept"].sum() == dealt["kept"].sum() and was["last_number"].sum() == dealt["last_number"].sum()
    assert was["last_number"].to_list() != dealt["last_number"].to_list()
    kept = [sorted(frame.group_by("prompt").agg(pl.col("kept").sum())["kept"]) for frame in (was, dealt)]
    assert kept[0] == kept[1]


def test_a_control_is_killed_and_continued_as_any_run_verifies_and_its_recipe_can_be_read_and_run(tmp_path: Path) -> None:
    recipe = controlled(recipe_in(tmp_path), "random-reward")
    with Faults() as counted:
        whole = go(recipe, tmp_path / "whole")
    for part in range(1, 6):
        with Faults(counted.count * part // 6), pytest.raises(Killed):
            go(recipe, tmp_path / str(part))
        assert end(go(recipe, tmp_path / str(part))) == end(whole)
    assert not verify(whole.folder).problems
    assert status.read(whole.folder).control == whole.info.recipe["control"] == "random-reward"
    again = load(str(whole.folder / "recipe.resolved.yaml"))
    figures = [
        run.samples(2).select("text", "true_last_number", "last_number") for run in (whole, go(again, tmp_path / "again"))
    ]
    assert again.control == "random-reward" and figures[0].equals(figures[1])
    with pytest.raises(UsageError, match="is the control random-reward itself"):
        controlled(again, "one-round")


def test_a_method_says_nothing_of_controls(tmp_path: Path) -> None:
    assert "control" not in recipe_in(tmp_path).resolved()


def test_gold_sft_learns_gold_answers_for_the_steps_that_the_method_took(tmp_path: Path) -> None:
    method = go(recipe_in(tmp_path), tmp_path / "method")
    taken = steps_taken(method.folder)
    assert taken == [
        commit.notes["train"]["steps"] for seal in method.sealed()[1:] for commit in method.commits(seal) if commit.models
    ]
    recipe = load(str(tmp_path / "sums.yaml"), ["gold.text=Answer: {{ prompt.answer }}"], control="gold-sft", steps=taken)
    assert [line.verb for line in recipe.steps] == ["gold", "train", "measure"]
    assert recipe.rounds == 2 and written(recipe, "train")["trl"]["max_steps"] == taken
    rows = go(recipe, tmp_path / "control").rows(1)
    assert set(rows["chosen"]) == {f"Answer: {10 + 2 * number}" for number in range(12)}


def test_gold_sft_keeps_the_start_and_the_options_that_sft_has(tmp_path: Path) -> None:
    text = RECIPE.replace("  - train: {loss: sft}\n", "  - build: {kind: pair, chosen: 'last_number = 1', rejected: 'last_number = 0'}\n"
        "  - train: {loss: dpo, from: base, beta: 0.3, trl: {max_steps: [5, 7], learning_rate: 1e-6, label_smoothing: 0.1}}\n")  # fmt: skip
    train = written(controlled(recipe_in(tmp_path, text), "gold-sft"), "train")
    assert (train["loss"], train["from"], train["beta"]) == ("sft", "base", 0.1)
    assert train["trl"] == {"learning_rate": 1e-6, "max_steps": [5, 7]}


def test_gold_sft_of_a_method_whose_steps_nobody_knows_says_how_to_tell_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"how many steps sums makes is known when it has run(.|\n)*--steps-of RUN"):
        controlled(recipe_in(tmp_path), "gold-sft")


def test_one_round_makes_all_answers_at_once_and_as_many_steps(tmp_path: Path) -> None:
    recipe = controlled(
        recipe_in(tmp_path, RECIPE, "rounds=3", "sample.n=[2,3]", "train.trl.num_train_epochs=[2,1]"), "one-round"
    )
    assert recipe.rounds == 1
    assert written(recipe, "sample")["n"] == 2 + 3 + 3
    assert written(recipe, "select")["per_prompt"] == 2 * 3
    assert written(recipe, "train")["trl"]["num_train_epochs"] == pytest.approx((2 + 1 + 1) / 3)
    counted = recipe_in(tmp_path, RECIPE, "rounds=3", "train.trl.max_steps=[5,7]")
    assert written(controlled(counted, "one-round"), "train")["trl"]["max_steps"] == 5 + 7 + 7
    assert written(controlled(counted, "one-round", [4, 4, 1]), "train")["trl"]["max_steps"] == 9


def test_one_round_of_new_prompts_each_round_takes_all_of_them(tmp_path: Path) -> None:
    recipe = controlled(recipe_in(tmp_path, RECIPE, "prompts.take=4", "sample.n=2"), "one-round")
    assert (recipe.take, written(recipe, "sample")["n"], written(recipe, "select")["per_prompt"]) == (8, 2, 2)
    assert go(recipe, tmp_path / "run").samples(1).height == 8 * 2


def test_wrong_context_tells_the_teacher_another_answer_and_the_student_its_own_prompt(tmp_path: Path) -> None:
    run = go(controlled(recipe_in(tmp_path, HINTED), "wrong-context"), tmp_path / "run")
    for row in run.samples(1).iter_rows(named=True):
        own = row["prompt"]
        told = row["teacher_messages"][-1]["content"]
        first, second = (int(word.strip("?")) for word in told.split("What is ")[1].split(" + "))
        assert f"It is {first + second}." not in told and own
    prompts = run.split("train").prompts
    told_to = {
        row["prompt"]: row["teacher_messages"][-1]["content"].split(".")[0] for row in run.samples(1).iter_rows(named=True)
    }
    assert sorted(told_to.values()) == sorted(f"It is {answer}" for answer in prompts["answer"])


def test_best_decoding_measures_the_base_alone_under_each_decoding(tmp_path: Path) -> None:
    run = go(controlled(recipe_in(tmp_path, HINTED.replace("{{ prompt.answer }}", "brief")), "best-decoding"), tmp_path / "run")
    assert [seal.round for seal in run.sealed()] == [0]
    found = decodings("dev/last_number", list(run.sealed()[0].metrics))
    assert found == [f"dev/last_number{end}" for end in ("", "_at_03", "_at_07", "_at_07_maj_6", "_told")]
    answers = run.samples(0, step="measure-at-07")
    assert answers.group_by("prompt").len()["len"].unique().to_list() == [6]  # 2 rounds of 3


def test_no_model_that_was_never_trained_picks_among_the_answers(tmp_path: Path) -> None:
    picked = "measure: {reward: reward/number.py:last_number, n: 3, temperature: 0.7, logprobs: {judged: policy@start}, pick: judged}"
    text = RECIPE.replace("measure: reward/number.py:last_number", picked) + "best: {metric: dev/last_number_best_3}\n"
    recipe = controlled(recipe_in(tmp_path, text), "best-decoding")
    run = go(recipe, tmp_path / "run")
    assert not [name for name in run.sealed()[0].metrics if "best" in name]


def test_a_teacher_that_is_told_gold_is_no_decoding(tmp_path: Path) -> None:
    recipe = controlled(recipe_in(tmp_path, HINTED), "best-decoding")
    assert not [line.name for line in recipe.steps if "told" in line.name]


@pytest.mark.parametrize(
    ("control", "text", "said"),
    [
        ("random-reward", RECIPE.replace("  - score: reward/number.py:last_number\n", "").replace("last_number = 1", "tokens > 0"), "no step gives a score"),
        ("gold-sft", RECIPE.replace("  - train: {loss: sft}\n", ""), "no step trains"),
        ("one-round", RECIPE.replace("rounds: 2", "rounds: 1"), "it has one round as it is"),
        ("wrong-context", RECIPE, "no template tells a teacher the answer of the prompt"),
        ("best-decoding", RECIPE.replace("  - measure: reward/number.py:last_number\n", ""), "no step measures"),
        ("placebo", RECIPE, "no control 'placebo'"),
    ],
)  # fmt: skip
def test_a_recipe_that_has_nothing_to_control_is_refused_in_words(tmp_path: Path, control: str, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        controlled(recipe_in(tmp_path, text), control)


@pytest.mark.parametrize("control", CONTROLS)
def test_every_control_of_a_shipped_recipe_is_sound(tmp_path: Path, control: str) -> None:
    recipe = load("star", ["prompts.test=null"], control=control)
    assert lint(recipe).problems == []
    text = yamlfile.dump(recipe.resolved())
    (tmp_path / "again.yaml").write_text(text.replace("template: hint.j2", "template: hint.j2"))
    assert load(str(tmp_path / "again.yaml")).resolved()["steps"] == recipe.resolved()["steps"]


def test_wrong_context_tells_a_teacher_whose_distribution_is_learned_another_answer(tmp_path: Path) -> None:
    text = RECIPE[: RECIPE.index("  - score")] + (
        "  - build: {kind: kd, told: own, teacher: 'It is {{ prompt.answer }}. {{ prompt.text }}'}\n"
        "  - train: {loss: kd, teacher: base}\n  - measure: reward/number.py:last_number\n"
    )
    run = go(controlled(recipe_in(tmp_path, text), "wrong-context"), tmp_path / "run")
    rows = run.rows(1)
    assert rows.height
    for teacher, student in rows.select("teacher_messages", "messages").iter_rows():
        first, second = (int(word.strip("?")) for word in student[-1]["content"].split("What is ")[1].split(" + "))
        assert teacher[-1]["content"].startswith("It is ") and f"It is {first + second}." not in teacher[-1]["content"]
