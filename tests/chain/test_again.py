"""A sealed round walked again over its tables: it gives what was committed, finds what was not made by its code, and tries other scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in

from selfkd.chain.again import Walk
from selfkd.chain.run import Run
from selfkd.cli import rescoring
from selfkd.core.pool import Addition, Pool, shape
from selfkd.errors import UsageError
from selfkd.report.rescore import rescore
from selfkd.report.verify import verify
from selfkd.rewards.find import find_function
from selfkd.steps.build import BuildStep
from selfkd.steps.context import Context

BUILT = RECIPE.replace(
    "  - train: {loss: sft}\n",
    '  - build: {kind: pair, chosen: "last_number = max(last_number)", rejected: "last_number = min(last_number)"}\n  - train: {loss: dpo}\n',
).replace('  - select: {where: "last_number = 1", per_prompt: 2}\n', "")
VALUED = RECIPE.replace(
    "  - select:",
    '  - score: {value: "last_number * 2 + chars / 1000.0", as: worth}\n  - select: {where: "worth > 0.5"}\n  - select:',
)
REPLAYED = RECIPE.replace("steps:\n", "steps:\n  - replay: {rounds: 1}\n")
TAKEN = RECIPE.replace("prompts:\n", "prompts:\n  take: 5\n")


@pytest.mark.parametrize("text", [RECIPE, BUILT, VALUED, REPLAYED, TAKEN], ids=["sft", "pairs", "value", "replay", "take"])
def test_every_selection_and_row_of_every_round_is_made_again(tmp_path: Path, text: str) -> None:
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    walked = [one for index in (0, 1, 2) for one in Walk(run, index)]
    assert {one.made.step: one.differing() for one in walked if one.differing()} == {}
    assert not [one.why for one in walked if one.why]
    again = {one.made.verb for one in walked if one.added is not None}
    assert again >= ({"build"} if text is BUILT else {"select", "train"})
    assert sum(one.added.whole("rows").height for one in walked if one.added and "rows" in one.added.tables) > 0


def test_a_round_that_was_made_before_an_amendment_is_walked_by_the_recipe_it_was_made_by(tmp_path: Path) -> None:
    go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    run = go(recipe_in(tmp_path, RECIPE, "rounds=2", "select.per_prompt=1"), tmp_path / "run", amend=True)
    walked = [one for index in (1, 2) for one in Walk(run, index)]
    assert not [said for one in walked for said in one.differing()]
    limits = [one.made.identity["per_prompt"] for one in walked if one.made.verb == "select"]
    assert limits == [2, 1]


def test_a_selection_that_its_code_does_not_make_is_named_with_its_table(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    walked = {one.made.step: one for one in Walk(run, 1)}
    select = walked["select"]
    assert select.added
    first = select.added.whole("drops").head(1)
    select.added.tables["drops"] = [shape("drops", select.added.whole("drops").tail(-1))]  # type: ignore[index]
    assert first.height == 1
    [said] = select.differing()
    assert said.startswith("drops: ") and "its own code makes" in said


def test_a_round_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    with pytest.raises(UsageError, match="round 5 is not sealed"):
        list(Walk(run, 5))


# ---- other scores ----


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "mine.py").write_text(text)
    return tmp_path


def test_the_same_function_changes_nothing(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    found = rescore(run, find_function("reward/number.py:last_number", recipe_in(tmp_path).folders), "last_number", 1)
    assert found.rows.height == 36 and found.changed.height == 0 and found.moved.height == 0
    assert found.rows["kept_was"].sum() == run.rows(1).height


def test_a_function_that_likes_nothing_keeps_nothing_and_one_that_turns_it_round_keeps_the_others(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    turned = "def turned(completion, answer):\n    return float(answer not in completion)\n\n\ndef nothing(completion):\n    return 0.0\n"
    folder = written(tmp_path, turned)
    none = rescore(run, find_function("mine.py:nothing", [folder]), "last_number", 1)
    assert none.rows["kept_now"].sum() == 0 and none.mean("now") == 0.0
    other = rescore(run, find_function("mine.py:turned", [folder]), "last_number", 1)
    wrong = other.rows.filter(pl.col("now") == 1.0)
    by_hand = sum(min(2, count) for count in wrong.group_by("prompt").len()["len"])  # at most two of each prompt
    assert other.rows["kept_now"].sum() == by_hand > 0
    assert set(other.rows.filter(pl.col("kept_now"))["was"]) == {0.0}


def test_samples_that_cannot_be_scored_would_be_dropped_and_say_why(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    folder = written(tmp_path, 'def broken(completion):\n    raise ValueError("no luck")\n')
    found = rescore(run, find_function("mine.py:broken", [folder]), "last_number", 1)
    assert found.rows["now"].null_count() == 36 and found.rows["kept_now"].sum() == 0
    assert "no luck" in found.rows["why"][0]


def test_a_score_of_another_name_is_asked_for(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    folder = written(tmp_path, "def mine(completion):\n    return 1.0\n")
    with pytest.raises(UsageError, match="no sample of round 1 has a score 'mine'"):
        rescore(Run.at(run.folder), find_function("mine.py:mine", [folder]), "mine", 1)


# ---- verify --data ----


def test_verify_makes_every_selection_and_row_again_where_it_is_asked_to(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path, BUILT), tmp_path / "run")
    assert verify(run.folder).again == 0
    found = verify(run.folder, data=True)
    assert found.problems == [] and found.again == 2  # the pairs of two rounds


def test_a_whole_run_whose_pairs_were_chosen_by_hand_is_found_out(tmp_path: Path, monkeypatch) -> None:
    """Forged before it was committed: every digest holds, and only the code says that these pairs are not its own."""
    real = BuildStep.run

    def turned(self: BuildStep, pool: Pool, context: Context) -> Addition:
        made = real(self, pool, context)
        rows = made.whole("rows").with_columns(chosen=pl.col("rejected"), rejected=pl.col("chosen"))
        return replace(made, tables={**made.tables, "rows": [rows]})

    monkeypatch.setattr(BuildStep, "run", turned)
    run = go(recipe_in(tmp_path, BUILT), tmp_path / "run")
    monkeypatch.undo()
    assert verify(run.folder).problems == []
    problems = verify(run.folder, data=True).problems
    assert len(problems) == 2 and all("build: rows: " in one for one in problems)


def test_pairs_that_would_not_be_made_and_scores_that_would_be_dealt_out_otherwise_are_counted(tmp_path: Path) -> None:
    dealt = RECIPE.replace("  - select:", "  - score: {shuffled: last_number, as: mark}\n  - select:").replace(
        "last_number = 1", "mark = 1"
    )
    none = find_function("mine.py:nothing", [written(tmp_path, "def nothing(completion):\n    return None\n")])
    for name, text in (("pairs", BUILT), ("dealt", dealt)):
        run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / name)
        found = rescore(run, none, "last_number", 1)
        assert found.rows["kept_was"].sum() > 0 == found.rows["kept_now"].sum(), name
        assert found.as_it_was == ()


def test_a_function_over_tables_is_not_run_again_and_that_is_said(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    drops = "pl.DataFrame({'id': scores.filter(pl.col('value') < 1)['sample'], 'reason': 'wrong'})"
    body = f"import polars as pl\n\n\ndef right(scores):\n    return {{'drops': {drops}}}\n"
    (tmp_path / "tables.py").write_text(body)
    text = RECIPE.replace('select: {where: "last_number = 1", per_prompt: 2}', "apply: tables.py:right")
    run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    none = find_function("mine.py:nothing", [written(tmp_path, "def nothing(completion):\n    return 0.0\n")])
    assert rescore(run, none, "last_number", 1).as_it_was == ("apply",)
    assert rescoring.score(run.folder, "mine.py:nothing", "last_number", None, 1) == 0
    assert "not run again: apply;" in capsys.readouterr().out
