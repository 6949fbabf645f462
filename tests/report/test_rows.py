"""Rows of a round: which are found, with which columns, and how they are printed."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in
from rich.console import Console

from selfkd.errors import UsageError
from selfkd.report.panels import SHOWN_CHARACTERS, print_rows
from selfkd.report.rows import Found, samples, training_rows


def printed(found: Found) -> str:
    to = Console(width=120, record=True, file=io.StringIO(), highlight=False)
    print_rows(found, to)
    return to.export_text()


def test_samples_are_a_frame_with_texts_scores_fate_and_the_prompt(done):
    found = samples(done, 1, n=3)
    assert (found.total, found.matched, found.first.height) == (36, 36, 3)
    assert found.scores == ["last_number"]
    assert {"text", "teacher_messages", "messages", "answer", "last_number", "kept", "why"} <= set(found.first.columns)
    assert found.first["messages"].null_count() == 0 and found.first["answer"].null_count() == 0


def test_the_newest_round_is_taken_where_none_is_named(done):
    assert samples(done).title == "round 2 · samples"
    assert training_rows(done).title == "round 2 · training rows"


def test_held_out_answers_are_shown_only_where_a_round_has_no_others_or_by_their_step(done):
    assert samples(done, 2).total == 36
    assert samples(done, 0).first["kept"].to_list() == [None] * 5
    assert samples(done, 2, step="measure").total == 6


def test_training_rows_name_the_samples_they_were_made_of(done):
    row = training_rows(done, 1, n=1).first.row(0, named=True)
    [made_of] = row["samples"]
    assert samples(done, 1, where=f"id = '{made_of}'").first["text"].to_list() == [row["chosen"]]


def test_a_round_without_such_rows_says_which_steps_have_some(done):
    with pytest.raises(UsageError, match="no rows in round 0"):
        training_rows(done, 0)
    with pytest.raises(UsageError, match="Steps with rows: train"):
        training_rows(done, 1, step="sample")


def test_a_long_text_is_cut_and_says_how_much_is_left_out(done):
    found = samples(done, 1, n=1)
    longer = found.first.with_columns(text=pl.lit("x" * (SHOWN_CHARACTERS + 7)))
    text = printed(Found(found.table, found.title, found.total, found.matched, longer, found.scores))
    assert "… (7 more characters)" in text


def test_a_pair_is_printed_with_both_sides(tmp_path: Path):
    pairs = '- build: {kind: pair, chosen: "last_number = 1", rejected: "last_number = 0"}'
    recipe = RECIPE.replace('- select: {where: "last_number = 1", per_prompt: 2}', pairs).replace("loss: sft", "loss: dpo")
    run = go(recipe_in(tmp_path, recipe), tmp_path / "run")
    text = printed(training_rows(run.folder, n=1))
    assert "chosen: " in text and "rejected: " in text and "completion: " not in text
