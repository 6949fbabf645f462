"""Scores dealt out anew, and answers told to the wrong prompt: permutations, of which nothing can be guessed."""

from __future__ import annotations

import json
from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.steps.shuffled import dealt
from selfkd.steps.told import deranged


def samples(rows: list[tuple[int, bool]], seed: int = 0) -> pl.DataFrame:
    """Return samples, each of (prompt, ended)."""
    made = [
        {"id": f"{index:03}", "prompt": str(prompt), "finish_reason": "stop" if ended else "length", "tiebreak": (index * 0.37 + seed) % 1}
        for index, (prompt, ended) in enumerate(rows)
    ]  # fmt: skip
    return pl.DataFrame(made, schema={"id": pl.String, "prompt": pl.String, "finish_reason": pl.String, "tiebreak": pl.Float64})


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_scores_go_to_samples_that_ended_alike_and_each_prompt_gets_those_of_one_other(rows: list[tuple[int, bool]]) -> None:
    frame = samples(rows)
    whose = dealt(frame)
    assert sorted(whose) == sorted(whose.values()) == frame["id"].to_list()
    prompt, ended = (dict(zip(frame["id"], frame[name], strict=True)) for name in ("prompt", "finish_reason"))
    assert all(ended[taker] == ended[giver] for taker, giver in whose.items())
    givers: dict[tuple[str, str], set[str]] = {}
    for taker, giver in whose.items():
        givers.setdefault((prompt[taker], ended[taker]), set()).add(prompt[giver])
    assert all(len(found) == 1 for found in givers.values())  # so a prompt has as many right ones as some prompt had


def test_who_gets_a_score_is_not_told_by_who_had_it() -> None:
    landed: Counter[str] = Counter()
    for seed in range(400):
        landed[dealt(samples([(prompt, True) for prompt in range(4)], seed / 400))["000"]] += 1
    assert all(60 < landed[f"{number:03}"] < 140 for number in range(4))  # 100 each, four standard errors


def test_scores_of_one_prompt_alone_are_dealt_out_within_it() -> None:
    found = {tuple(dealt(samples([(0, True)] * 4, seed / 50)).values()) for seed in range(50)}
    assert len(found) > 10


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.integers(0, 99))
def test_nobody_is_told_an_answer_like_its_own_where_that_can_be(answers: list[int], seed: int) -> None:
    given_ = {f"p{at}": str(answer) for at, answer in enumerate(answers)}
    whose = deranged(given_, seed)
    assert sorted(whose.values()) == sorted(given_)
    if max(Counter(answers).values()) * 2 <= len(answers):
        assert all(given_[name] != given_[other] for name, other in whose.items())


def test_answers_that_are_mostly_the_same_are_refused(tmp_path: pytest.TempPathFactory) -> None:
    from chains import RECIPE, go, recipe_in

    from selfkd.errors import GuardError

    text = RECIPE.replace("max_tokens: 64}", "max_tokens: 64, told: other, template: '{{ prompt.answer }}'}", 1)
    recipe = recipe_in(tmp_path, text)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(line.rsplit('"answer"', 1)[0] + '"answer": "1"}' for line in lines))
    with pytest.raises(GuardError, match="12 of 12 prompts cannot be told another answer"):
        go(recipe, tmp_path / "run")


def test_where_most_answers_are_the_same_each_prompt_is_told_another_one_all_the_same(tmp_path):
    from chains import RECIPE, go, recipe_in

    text = RECIPE.replace("max_tokens: 64}", "max_tokens: 64, told: other, template: 'It is {{ prompt.answer }}.'}", 1)
    recipe = recipe_in(tmp_path, text[: text.index("  - score")] + "  - train: sft\n")
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text(
        "\n".join(json.dumps({**row, "answer": "2" if at == 3 else "1"}) for at, row in enumerate(rows))
    )
    run = go(recipe, tmp_path / "run")
    asked = run.split("train").scan("prompts").select("id", "answer").collect()
    own, told = dict(asked.iter_rows()), run.samples(1).select("prompt", "teacher_messages").unique("prompt").iter_rows()
    assert {(own[name], messages[-1]["content"]) for name, messages in told} == {("1", "It is 2."), ("2", "It is 1.")}
