"""Answers that did not end: cut at their token limit, they teach a model never to stop."""

from __future__ import annotations

import re

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.chain.run import Run
from selfkd.errors import GuardError

HEAD = RECIPE[: RECIPE.index("steps:")]
SAMPLE = "  - sample: {n: 6, max_tokens: 64}\n  - score: reward/number.py:last_number\n"
LONG = " and so on" * 9


def rambling(messages: list[dict[str, str]], seed: int, skill: float) -> str:
    """Right two times of three; every second answer goes on to beyond 64 tokens without another number."""
    first, second = (int(number) for number in re.findall(r"\d+", messages[-1]["content"])[-2:])
    return f"Answer: {first + second + (seed % 3 == 0)}" + LONG * (seed // 3 % 2)


def run_of(folder, steps: str) -> Run:
    return go(recipe_in(folder, HEAD + "steps:\n" + SAMPLE + steps, "rounds=1"), folder / "run", Fake({}, rambling))


def table(run: Run, step: str, name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(1)[step].tables[name].files])


def made(run: Run) -> pl.DataFrame:
    """The answers with `right` and `ended`."""
    scores = table(run, "score", "scores").select("value", id="sample")
    answers = table(run, "sample", "samples").join(scores, on="id")
    return answers.with_columns(right=pl.col("value") == 1, ended=pl.col("finish_reason") == "stop")


def ids(frame: pl.DataFrame, of: str = "id") -> set[str]:
    return set(frame[of])


def test_cut_answers_are_not_learned_and_their_number_is_shown(tmp_path):
    run = run_of(tmp_path, "  - select: last_number = 1\n  - train: sft\n")
    answers = made(run).filter("right")
    rows, drops = table(run, "train", "rows"), table(run, "train", "drops")
    ended, cut = answers.filter("ended"), answers.filter(~pl.col("ended"))
    assert ended.height > 5 < cut.height
    assert {sample for samples in rows["samples"] for sample in samples} == ids(ended) and rows["chosen_ended"].all()
    assert ids(drops) == ids(cut) and set(drops["reason"]) == {"cut at max_tokens"}
    funnel = [tuple(stage) for stage in run.sealed()[1].notes["funnel"]]
    assert ("dropped by train: cut at max_tokens", cut.height) in funnel and ("kept", ended.height) in funnel


def test_a_recipe_that_says_so_learns_cut_answers_without_an_end(tmp_path):
    run = run_of(tmp_path, "  - build: {cut: keep}\n  - train: sft\n")
    rows = table(run, "build", "rows")
    assert rows.height == 72 and rows["chosen_ended"].sum() == made(run)["ended"].sum() < 72
    assert "drops" not in run.made(1)["build"].tables


def test_a_cut_answer_may_be_rejected_but_not_chosen(tmp_path):
    build = "  - build: {kind: pair, chosen: last_number = 1, rejected: last_number = 0, match: product, per_prompt: 36}\n"
    run = run_of(tmp_path, build + "  - train: dpo\n")
    answers, rows = made(run), table(run, "build", "rows")
    right, wrong = answers.filter("right"), answers.filter(~pl.col("right"))
    chosen, rejected = ({pair[side] for pair in rows["samples"]} for side in (0, 1))
    assert chosen <= ids(right.filter("ended")) and rejected <= ids(wrong) and rejected & ids(wrong.filter(~pl.col("ended")))
    assert ids(table(run, "build", "drops")) == ids(right.filter(~pl.col("ended")))


def test_a_cut_answer_that_is_a_rejected_one_too_is_not_dropped(tmp_path):
    run = run_of(tmp_path, "  - build: {kind: pair, chosen: 'chars > 0', rejected: 'chars > 60'}\n  - train: dpo\n")
    rejected = {pair[1] for pair in table(run, "build", "rows")["samples"]}
    cut = ids(made(run).filter(~pl.col("ended")))
    assert rejected <= cut and ids(table(run, "build", "drops")) == cut - rejected


def test_a_gold_answer_is_never_cut(tmp_path):
    gold = f"  - gold: '{{{{ prompt.answer }}}}{LONG}'\n  - build: {{of: gold}}\n  - train: sft\n"
    rows = table(run_of(tmp_path, gold), "build", "rows")
    assert rows.height == 12 and rows["chosen"].str.ends_with(LONG.strip()).all() and rows["chosen_ended"].all()


def test_a_round_of_nothing_but_cut_answers_says_so(tmp_path):
    with pytest.raises(GuardError, match=r"0 training rows[\s\S]*dropped by train: cut at max_tokens +72"):
        recipe = recipe_in(tmp_path, HEAD + "steps:\n" + SAMPLE + "  - train: sft\n", "rounds=1")
        go(recipe, tmp_path / "run", Fake({}, lambda messages, seed, skill: "12" + LONG))


def test_what_was_not_learned_is_not_replayed(tmp_path):
    steps = SAMPLE + "  - replay: 1\n  - train: sft\n"
    run = go(recipe_in(tmp_path, HEAD + "steps:\n" + steps), tmp_path / "run", Fake({}, rambling))
    replayed = [pl.read_parquet(run.folder / path) for path in run.made(2)["replay"].tables["samples"].files]
    assert set(pl.concat(replayed)["finish_reason"]) == {"stop"}


def test_the_fake_ends_an_answer_at_a_stop_string_without_an_end_token(tmp_path):
    steps = "  - sample: {max_tokens: 64, stop: [' and', 'o on']}\n"
    answers = table(
        go(recipe_in(tmp_path, HEAD + "steps:\n" + steps, "rounds=1"), tmp_path / "run", Fake({}, rambling)),
        "sample",
        "samples",
    )
    assert set(answers["finish_reason"]) == {"stop"} and answers["text"].str.contains(r"^Answer: \d+$").all()
    for text, found in answers.select("text", "token_ids").iter_rows():
        assert bytes(found).rstrip(b"\0").decode() == text
