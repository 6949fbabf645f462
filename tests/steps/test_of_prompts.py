"""Steps whose words speak of prompts: `prompt.NAME`, numbers over a prompt's samples, and `gold: {where: …}`."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from chains import go

from selfkd.errors import RecipeError
from selfkd.recipe.lint import look
from selfkd.recipe.load import load, read

HEAD = "name: r\nmodel: fake\nrounds: 1\nprompts: {train: train.jsonl}\nsteps:\n"
SAMPLE = "  - sample: {n: 4, max_tokens: 64}\n  - score: reward/number.py:last_number\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {k} + {k}?", "answer": str(2 * k), "level": k} for k in range(1, 9)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made(steps: str, step: str, table: str) -> pl.DataFrame:
    Path("r.yaml").write_text(HEAD + steps)
    run = go(load("r.yaml"), Path("run"))
    paths = run.made(1)[step].tables[table].files
    return pl.concat([pl.read_parquet(run.folder / path) for path in paths])


def levels(frame: pl.DataFrame) -> list[int]:
    prompts = pl.read_parquet(next(Path("run/prompts").glob("train-*")))
    known = {row["id"]: json.loads(row["meta"])["level"] for row in prompts.iter_rows(named=True)}
    return sorted(known[name] for name in frame["prompt"].unique())


def refused(steps: str) -> list[str]:
    Path("r.yaml").write_text(HEAD + steps)
    return look(read("r.yaml"))[0].problems


def test_rows_are_built_of_the_samples_of_chosen_prompts(tmp_path):
    rows = made(SAMPLE + "  - build: {where: prompt.level > 3, weight: prompt.level}\n  - train: sft\n", "build", "rows")
    assert rows.height == 5 * 4 and sorted(rows["weight"].unique()) == [4.0, 5.0, 6.0, 7.0, 8.0]


def test_gold_answers_are_taken_of_the_prompts_for_which_where_holds():
    assert levels(made("  - gold: {where: prompt.level < 3}\n  - train: sft\n", "gold", "samples")) == [1, 2]


def test_gold_answers_stand_in_where_nothing_was_right():
    gold = made(SAMPLE + "  - gold: {where: max(last_number) < 1}\n  - train: sft\n", "gold", "samples")
    samples, scores = (
        pl.concat([pl.read_parquet(path) for path in Path("run").rglob("*.parquet") if f"-{step}" in str(path.parent)])
        for step in ("sample", "score")
    )
    best = samples.join(scores, left_on="id", right_on="sample").group_by("prompt").agg(pl.col("value").max())
    assert 0 < gold.height < 8 and set(gold["prompt"]) == set(best.filter(pl.col("value") < 1)["prompt"])


def test_prompts_that_are_always_or_never_solved_are_dropped_by_their_mean():
    said = "mean(last_number) > 0 and mean(last_number) < 1"
    drops = made(SAMPLE + f"  - select: {{where: '{said}'}}\n  - train: sft\n", "select", "drops")
    assert set(drops["reason"]) == {f"not {said}"}
    assert drops.height % 4 == 0 and 0 < drops.height < 32  # whole prompts, four samples each


def test_the_first_prompts_of_a_select_are_those_of_the_greatest_mean():
    steps = SAMPLE + "  - select: {of: prompts, limit: 2, by: mean(last_number) + prompt.level / 1000}\n  - train: sft\n"
    assert made(steps, "select", "drops").height == 6


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("build: {where: level > 3}", "it is one of the prompts. Did you mean 'prompt.level'?"),
        ("build: {where: prompt.levl > 3}", "Did you mean 'prompt.level'?"),
        ("build: {where: prompt.level = 'hard'}", "cannot be computed"),
        ("gold: {where: prompt.level}", "gives a number, where true or false is wanted"),
        ("select: {where: mean(nothing) > 0}", "no column 'nothing'"),
        ("select: {where: nothing > 0}", "those of the prompts are written prompt.NAME"),
    ],
)
def test_lint_names_the_line_and_the_word_to_write(step, said):
    [found] = refused(f"{SAMPLE}  - {step}\n  - train: sft\n")
    assert found.startswith("r.yaml:8") and said in found


def test_lint_prints_how_the_columns_of_prompts_are_written():
    Path("r.yaml").write_text(HEAD + SAMPLE + "  - train: sft\n")
    report = look(read("r.yaml"))[0]
    assert report.columns[0][1]["of each prompt"] == ["prompt.text", "prompt.answer", "prompt.level"]


def test_a_recipe_loads_whose_prompts_nobody_has_read_yet():
    Path("r.yaml").write_text(HEAD + SAMPLE + "  - build: {where: prompt.grade = 'hard'}\n  - train: sft\n")
    assert load("r.yaml").name == "r"
    Path("r.yaml").write_text(HEAD + SAMPLE + "  - build: {where: prompt.grade + 1}\n  - train: sft\n")
    with pytest.raises(RecipeError, match="gives a number"):
        load("r.yaml")


# ---- what is probably not meant ----


@pytest.mark.parametrize(
    ("replay", "start", "noted"), [("replay", "start", True), ("replay: 1", "start", False), ("replay", "base", False)]
)
def test_rows_of_all_rounds_and_the_newest_model_are_a_doubt(replay, start, noted):
    Path("r.yaml").write_text(HEAD + SAMPLE + f"  - {replay}\n  - train: {{from: {start}}}\n")
    notes = look(read("r.yaml"))[0].notes
    assert any("brings all rounds back while training goes on from the newest model" in note for note in notes) == noted


def said(steps: str, answer) -> list[str]:
    from selfkd.backend.fake import Fake

    Path("r.yaml").write_text(HEAD + steps)
    run = go(load("r.yaml"), Path("run"), Fake({}, answer))
    events = [json.loads(line) for path in run.folder.rglob("events.jsonl") for line in path.read_text().splitlines()]
    return [event["text"] for event in events if "text" in event]


def test_pairs_whose_one_side_is_always_cut_are_told():
    steps = "  - sample: {n: 4, max_tokens: 12}\n  - build: {kind: pair, chosen: finish_reason = 'stop', rejected: finish_reason = 'length'}\n  - train: dpo\n"
    turns = {"count": 0}

    def answer(messages, seed, skill):
        turns["count"] += 1
        return "so it is." if turns["count"] % 2 else "so it goes on and on and on."

    assert any("all 8 pairs have a rejected answer that was cut at max_tokens" in text for text in said(steps, answer))


def test_pairs_that_were_cut_on_both_sides_or_neither_are_not_told():
    steps = "  - sample: {n: 4, max_tokens: 64}\n  - build: {kind: pair, chosen: number = 0, rejected: number = 1}\n  - train: dpo\n"
    assert not any(
        "was cut at max_tokens" in text for text in said(steps, lambda messages, seed, skill: f"so it is {seed % 97}")
    )
