"""Which prompts a round asks: `take` on through the set, or by what earlier rounds' answers say."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from chains import Faults, Killed, end, go

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.dry_run import lint_and_walk
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.errors import RecipeError
from selfkd.recipe.load import load, read
from selfkd.recipe.plan import plan

RECIPE = """\
name: r
model: fake
rounds: 4
prompts:
  train: train.jsonl
  take: {n: 4, by: "1 - abs(2 * mean(last_number) - 1)"}
steps:
  - sample: {n: 4, max_tokens: 64}
  - score: reward/number.py:last_number
  - train: sft
"""
SOLVED = {1: 4, 2: 0, 3: 2, 4: 1, 5: 3, 6: 4, 7: 0, 8: 4}  # of four answers to the k-th prompt, by hand


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {k} + {k}?", "answer": str(2 * k)} for k in SOLVED]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(text: str = RECIPE):
    Path("r.yaml").write_text(text)
    return load("r.yaml")


def solving(run: Run) -> Fake:
    """A model that solves the k-th prompt SOLVED[k] times of four, in every round."""
    asked: dict[int, int] = {}

    def answer(messages, seed, skill):
        k = int(messages[-1]["content"].split()[2])
        asked[k] = asked.get(k, 0) + 1
        return f"Answer: {2 * k + (0 if (asked[k] - 1) % 4 < SOLVED[k] else 1)}"

    return Fake(run.numerics, answer)


def asked(run: Run, index: int) -> list[int]:
    [path] = run.made(index)["sample"].tables["samples"].files
    messages = pl.read_parquet(run.folder / path)["teacher_messages"]
    return sorted({int(one[0]["content"].split()[2]) for one in messages})


def walked(text: str = RECIPE) -> Run:
    made = recipe(text)
    run = Run.open(made, Path("run"), Machine(backend="fake"))
    walk(run, solving(run), run.begin())
    return run


def test_prompts_nobody_asked_come_first_then_those_that_are_solved_half_of_the_time():
    """1 - |2m - 1| of SOLVED / 4: 3 has 1; 4 and 5 have 0.5; all others 0. A tie at the end is broken by hash."""
    run = walked()
    assert asked(run, 1) == [1, 2, 3, 4] and asked(run, 2) == [5, 6, 7, 8]
    for index in (3, 4):
        found = asked(run, index)
        assert {3, 4, 5} < set(found) and len(found) == 4


def test_a_number_in_place_of_null_lets_unasked_prompts_wait():
    text = RECIPE.replace("1 - abs(2 * mean(last_number) - 1)", "coalesce(mean(last_number), 0.3)")
    run = walked(text)
    first = set(asked(run, 1))  # all are at 0.3: by hash
    second = asked(run, 2)
    better = {k for k in first if SOLVED[k] / 4 > 0.3}
    assert better <= set(second) and not {k for k in first if SOLVED[k] / 4 < 0.3} & set(second)


def test_weighted_draws_leave_out_what_has_no_weight():
    text = RECIPE.replace('- 1)"}', '- 1)", pick: weighted}')
    run = walked(text)
    assert asked(run, 3) == [3, 4, 5] == asked(run, 4)  # three have a chance, and four were wanted
    said = [line for path in run.folder.rglob("events.jsonl") for line in path.read_text().splitlines()]
    assert any("round 3 asks 3 prompts, not 4" in line for line in said)


def test_a_window_forgets_what_was_before_it():
    text = RECIPE.replace('- 1)"}', '- 1)", rounds: 1}')
    assert asked(walked(text), 3) == [1, 2, 3, 4]  # round 2 alone knows of 5 to 8, so these are unasked again


def test_a_killed_chain_draws_the_same_prompts():
    made = recipe()
    whole = go(made, Path("whole"))
    with Faults() as faults:
        go(made, Path("counted"))
    for at in range(faults.count // 2, faults.count, faults.count // 9):
        folder = Path(f"killed-{at}")
        with Faults(at), pytest.raises(Killed):
            go(made, folder)
        assert end(go(made, folder)) == end(whole)


def test_a_choice_without_by_goes_on_through_the_set():
    assert asked(walked(RECIPE.replace(', by: "1 - abs(2 * mean(last_number) - 1)"', "")), 3) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("take", "said"),
    [
        ("{n: 4, by: mean(correct)}", "'by': no column 'correct'"),
        ("{n: 4, by: 'n > 2 and'}", "'by': 'n > 2 and' is not an expression that SQL can read"),
        ("{n: 4, by: answer}", "gives a text, where a number is wanted"),
        ("{n: 4, pick: weighted}", "'pick' and 'rounds' say how `by` chooses"),
        ("{n: 0}", "'n' should be at least 1, not 0"),
        ("{by: n}", "'n' is missing"),
        ("half", "should be a whole number"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_with_its_line(take, said):
    with pytest.raises(RecipeError) as caught:
        recipe(RECIPE.replace('{n: 4, by: "1 - abs(2 * mean(last_number) - 1)"}', take))
    assert said in str(caught.value) and "r.yaml:6" in str(caught.value)


def test_a_choice_is_planned_and_walked_dry():
    recipe()
    assert lint_and_walk(read("r.yaml")).ok
    assert "64 answers" not in str(plan(read("r.yaml"))) and "16 answers" in str(plan(read("r.yaml")))


def test_select_draws_prompts_with_chances_by_this_rounds_scores():
    text = RECIPE.replace('{n: 4, by: "1 - abs(2 * mean(last_number) - 1)"}', "8").replace("rounds: 4", "rounds: 1")
    text = text.replace(
        "  - train",
        "  - select: {of: prompts, limit: 2, by: 'sum(last_number) * (4 - sum(last_number))', pick: weighted}\n  - train",
    )
    run = walked(text)
    [path] = run.made(1)["select"].tables["drops"].files
    reasons = pl.read_parquet(run.folder / path)["reason"].to_list()
    assert sorted(reasons) == [
        *["no chance: sum(last_number) * (4 - sum(last_number)) is not above 0"] * 5,
        "over the limit of 2",
    ]
