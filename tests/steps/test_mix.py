"""A mix of rows: shares by rows or tokens, drawn by hash, and what was mixed stands in the commit."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from chains import Faults, Killed, end, go
from hypothesis import given
from hypothesis import strategies as st

from selfkd.errors import GuardError, RecipeError
from selfkd.recipe.load import load
from selfkd.steps import mix

HEAD = "name: r\nmodel: fake\nrounds: 2\nprompts: {train: train.jsonl}\nsteps:\n"
TWO = """\
  - gold: {as: chat}
  - sample: {n: 3, max_tokens: 64}
  - build: {of: sample, as: own}
  - build: {of: chat, as: chat}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {k} + {k}?", "answer": str(2 * k)} for k in range(1, 9)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(train: str, steps: str = TWO):
    Path("r.yaml").write_text(f"{HEAD}{steps}  - train: {train}\n")
    return load("r.yaml")


def sizes(**counts: list[int]) -> dict[str, pl.DataFrame]:
    return {
        name: pl.DataFrame(
            {"id": [f"{name}{at}" for at in range(len(some))], "size": some}, schema={"id": str, "size": pl.Int64}
        )
        for name, some in counts.items()
    }


def used(found: mix.Mixed) -> dict[str, int]:
    return {name: one["rows"] for name, one in found.counts.items()}


def test_the_stream_that_runs_out_first_is_used_whole_and_the_other_is_cut():
    """own: 24 rows at 0.8, so 30 rows in all and 6 of chat; where chat has but 3, 15 in all and 12 of own."""
    assert used(mix.mixed(sizes(own=[1] * 24, chat=[1] * 100), {"own": 0.8, "chat": 0.2}, 0)) == {"own": 24, "chat": 6}
    found = mix.mixed(sizes(own=[1] * 24, chat=[1] * 3), {"own": 0.8, "chat": 0.2}, 0)
    assert used(found) == {"own": 12, "chat": 3} and found.short == "chat"
    assert "all its 3 rows go with 12 of 24 rows of 'own'" in found.warning({"own": 0.8, "chat": 0.2})


def test_shares_are_of_each_other_and_need_not_add_up_to_one():
    assert used(mix.mixed(sizes(a=[1] * 10, b=[1] * 10, c=[1] * 10), {"a": 2, "b": 1, "c": 1}, 0)) == {"a": 10, "b": 5, "c": 5}


def test_a_share_of_tokens_counts_tokens():
    """own has 100 tokens at one half, so chat may have 100: ten of its rows of ten tokens."""
    found = mix.mixed(sizes(own=[50, 50], chat=[10] * 40), {"own": 1, "chat": 1}, 0)
    assert used(found) == {"own": 2, "chat": 10} and found.counts["chat"]["size"] == 100


def test_a_row_that_is_larger_than_the_share_is_taken_once():
    assert used(mix.mixed(sizes(own=[5], chat=[90, 90]), {"own": 0.9, "chat": 0.1}, 0)) == {"own": 1, "chat": 1}


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.floats(0.05, 0.95),
)
def test_every_stream_is_within_one_row_of_its_share(own, chat, share):
    shares = {"own": share, "chat": 1 - share}
    found = mix.mixed(sizes(own=own, chat=chat), shares, 1)
    whole = {"own": sum(own), "chat": sum(chat)}[found.short] / shares[found.short]
    for name, some in (("own", own), ("chat", chat)):
        assert found.counts[name]["size"] <= max(whole * shares[name] + 1e-6, max(some))
        assert found.counts[name]["size"] > whole * shares[name] - max(some) - 1e-6
    assert found.counts[found.short]["rows"] == found.counts[found.short]["of"]


@given(st.permutations(range(8)))
def test_the_order_of_the_rows_changes_nothing(places):
    plain = sizes(own=[1, 2, 3, 4, 5, 6, 7, 8], chat=[9])
    moved = {**plain, "own": plain["own"][list(places)]}
    shares = {"own": 1.0, "chat": 1.0}
    assert set(mix.mixed(plain, shares, 5).chosen["own"]) == set(mix.mixed(moved, shares, 5).chosen["own"])


def test_a_chain_learns_from_the_mix_and_its_commit_says_of_what():
    run = go(recipe("{mix: {own: 0.75, chat: 0.25}}"), Path("run"))
    made = run.made(1)["train"]
    assert made.notes["mix"] == {"own": {"rows": 24, "of": 24}, "chat": {"rows": 8, "of": 8}}
    assert made.notes["train"]["rows"] == 32 and "drops" not in made.tables
    run = go(recipe("{mix: {own: 0.99, chat: 0.01}, by: tokens}"), Path("tokens"))
    made = run.made(1)["train"]
    assert made.notes["mix"]["own"]["rows"] == 24 and made.notes["mix"]["chat"]["rows"] < 8
    drops = pl.read_parquet(run.folder / made.tables["drops"].files[0])
    assert drops["reason"].unique().to_list() == [mix.LEFT_OUT] and drops["stream"].unique().to_list() == ["chat"]
    assert made.notes["train"]["rows"] + drops.height == 32


def test_a_mix_survives_a_kill():
    made = recipe("{mix: {own: 0.5, chat: 0.5}}")
    whole = end(go(made, Path("whole")))
    with Faults() as faults:
        go(made, Path("counted"))
    for at in range(faults.count // 3, faults.count, faults.count // 5):
        folder = Path(f"killed-{at}")
        with Faults(at), pytest.raises(Killed):
            go(made, folder)
        assert end(go(made, folder)) == whole


def test_an_empty_stream_is_named():
    steps = TWO.replace("{of: chat, as: chat}", "{of: chat, as: chat, where: tokens > 9}")
    with pytest.raises(GuardError, match="the stream 'chat' has nothing to learn from"):
        go(recipe("{mix: {own: 0.5, chat: 0.5}}", steps), Path("run"))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("{mix: {own: 0.5, chta: 0.5}}", "in stream 'chta' for policy"),
        ("{mix: {own: 1.0}}", "'mix' mixes several: name two streams"),
        ("{mix: {own: 0.5, chat: 0}}", "should be above 0"),
        ("{mix: {own: 0.5, chat: 0.5}, of: own}", "leave out 'of'"),
        ("{by: tokens, of: own}", "'by' is of a mix"),
        ("{mix: {own: 0.5, chat: 0.5}, loss: dpo}", "holds sft rows"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_with_its_line(train, said):
    with pytest.raises(RecipeError) as caught:
        recipe(train)
    assert said in str(caught.value) and "r.yaml:10" in str(caught.value)
