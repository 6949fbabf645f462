"""Answers that exist already: which forms of a row are read, whose prompt is ours, and what may not be learned from."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.errors import UsageError
from selfkd.prompts import brought
from selfkd.prompts.brought import read_answers
from selfkd.prompts.read import read_prompts

TRAIN = [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "Name a colour.", "system": None}]
DEV = [{"prompt": "Held out?"}]


@pytest.fixture
def splits() -> dict[str, pl.DataFrame]:
    return {"train": read_prompts(TRAIN, [], "train"), "dev": read_prompts(DEV, [], "dev")}


def read(rows, splits, *scores: str, by_id: str | None = None) -> list[dict]:
    return read_answers(rows, [Path()], scores, splits, by_id).to_dicts()


def texts(found: list[dict]) -> list[tuple[str, str]]:
    return [(one["messages"][-1]["content"], one["completion"]) for one in found]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "completion": "four"},
        {"question": "2 + 2?", "answer": "four"},
        {"instruction": "2 + 2?", "output": "four"},
        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "four"}]},
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "four"}]},
        {"prompt": "2 + 2?", "response": "four"},
    ],
)
def test_the_forms_of_prompts_are_those_of_answers(row, splits):
    [one] = read([row], splits)
    assert texts([one]) == [("2 + 2?", "four")] and one["ours"] and one["prompt"] == splits["train"]["id"][0]


def test_several_answers_of_a_row_have_their_scores_in_a_list(splits):
    found = read(
        {
            "rows": [{"prompt": "2 + 2?", "answers": ["4", "5", "four"], "ok": [True, 0, None], "length": 9}],
            "answer": "answers",
        },
        splits,
        "ok",
        "length",
    )
    assert [(one["completion"], one["ok"], one["length"]) for one in found] == [
        ("4", 1.0, 9.0),
        ("5", 0.0, 9.0),
        ("four", None, 9.0),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."},
        {
            "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
            "rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}],
        },
        {
            "prompt": "Hi",
            "chosen": [{"role": "assistant", "content": "Hello!"}],
            "rejected": [{"role": "assistant", "content": "No."}],
        },
    ],
)
def test_a_pair_is_two_answers_of_one_prompt_and_says_which_is_preferred(row, splits):
    found = read([row], splits, "preferred")
    assert [(*said, one["preferred"]) for said, one in zip(texts(found), found, strict=True)] == [
        ("Hi", "Hello!", 1.0),
        ("Hi", "No.", 0.0),
    ]
    assert found[0]["prompt"] == found[1]["prompt"] and not found[0]["ours"]


def test_only_the_last_answer_of_a_conversation_is_one(splits):
    turns = [("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")]
    [one] = read([{"messages": [{"role": role, "content": content} for role, content in turns]}], splits)
    assert one["completion"] == "d" and [message["content"] for message in one["messages"]] == ["a?", "b", "c?"]


def test_our_prompts_are_known_by_text_whatever_its_case_or_by_id(splits):
    [one] = read([{"prompt": " name  a COLOUR. ", "completion": "blue"}], splits)
    assert one["ours"] and one["prompt"] == splits["train"]["id"][1]
    ours = splits["train"]["id"][0]
    found = read([{"which": ours, "completion": "4"}, {"which": "nobody", "completion": "5"}], splits, by_id="which")
    assert found[0]["ours"] and found[0]["messages"][0]["content"] == "2 + 2?" and found[0]["drop"] is None
    assert found[1]["drop"] == "its id is that of no train prompt"


def test_an_answer_to_a_held_out_prompt_may_not_be_used(splits):
    found = read([{"prompt": "HELD out?", "completion": "yes"}, {"prompt": "Else?", "completion": "no"}], splits)
    assert [one["drop"] for one in found] == ["its prompt stands in dev", None]


def test_equal_answers_have_names_of_their_own_that_do_not_depend_on_order(splits):
    rows = [{"prompt": "a", "completion": "x"}, {"prompt": "a", "completion": "x"}, {"prompt": "b", "completion": "x"}]
    first, second = ({one["id"] for one in read(some, splits)} for some in (rows, rows[::-1]))
    assert first == second and len(first) == 3


@pytest.mark.parametrize(
    ("row", "scores", "said"),
    [
        ({"prompt": "a"}, (), "there is no answer in this row"),
        ({"prompt": "a", "completion": " "}, (), "there is no answer in this row"),
        ({"prompt": "a", "completion": "b"}, ("ok",), "no column 'ok'"),
        ({"prompt": "a", "completion": "b", "ok": "yes"}, ("ok",), "is to be a score, and is no number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, (), "Write `scores: [preferred]`"),
        ({"prompt": "a", "completion": "b", "system": "Be kind."}, (), "column 'system' belongs to the conversation"),
        ({"messages": [{"role": "user", "content": "a"}]}, (), "there is no answer in this row"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row, scores, said, splits):
    with pytest.raises(UsageError) as caught:
        read([row], splits, *scores)
    assert said in str(caught.value) and "row 1" in str(caught.value)


def test_parquet_and_jsonl_say_the_same(tmp_path, splits):
    rows = [{"prompt": f"q{at}", "completion": f"a{at}", "ok": at % 2} for at in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    one, other = (read_answers({"file": f"a.{kind}"}, [tmp_path], ["ok"], splits) for kind in ("jsonl", "parquet"))
    assert one.equals(other) and one.height == 5


@given(st.lists(st.tuples(st.text("abc?", min_size=1), st.text("xyz", min_size=1)), min_size=1, max_size=8))
def test_every_answer_comes_back_as_it_was_written(rows):
    splits = {"train": read_prompts(TRAIN, [], "train")}
    given_rows = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    assert texts(read(given_rows, splits)) == rows


def test_a_whole_number_that_no_float_holds_is_no_score():
    assert brought._one_of(10**400, None, "row 1", "quality") is None


# ---- turns that are held out ----


def talk(*said: str) -> list[dict[str, str]]:
    """A conversation of a user and an assistant, by turns; the last message is the answer."""
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (("held  OUT?", "yes"), "its prompt stands in dev"),
        (("Held out?", "yes", "Why?", "so"), "a turn of it stands in dev"),
        (("Hi", "Hello", "Held out?", "yes", "Why?", "so"), "a turn of it stands in dev"),
        (("Hi", "Hello", "Held out?", "yes"), "a turn of it stands in dev"),
        (("Hi", "Held out?", "Why?", "so"), None),  # the assistant says it
        (("Is this held out?", "no"), None),
        (("First.", "One.", "Second?", "2", "Third?", "3"), "a turn of it stands in test"),
        (("First.", "Other.", "Second?", "2"), None),
        (("First.", "1"), None),  # only the beginning of what is held out
        (("Hi", "Hello", "First.", "One.", "Second?", "2"), "a turn of it stands in test"),
    ],
)
def test_a_conversation_in_which_a_held_out_prompt_is_asked_may_not_be_used(said, reason, splits):
    splits["test"] = read_prompts([{"messages": talk("First.", "One.", "Second?")}], [], "test")
    [one] = read([{"messages": talk(*said)}], splits)
    assert one["drop"] == reason


def test_a_system_message_hides_no_turn(splits):
    rows = [{"messages": [{"role": "system", "content": "Be brief."}, *talk("Held out?", "yes", "Why?", "so")]}]
    assert read(rows, splits)[0]["drop"] == "a turn of it stands in dev"


def test_passages_are_sought_in_conversations_and_answers(splits):
    words = " ".join(f"word{k}" for k in range(13))
    splits["dev"] = read_prompts([{"prompt": f"Tell me: {words}?"}, {"prompt": "Short."}], [], "dev")
    rows = [
        {"prompt": "Say", "completion": f"As {words.replace('word12', 'word12?')} goes."},
        {"prompt": f"Now {words}? Well.", "completion": "x"},
        {"prompt": "Now " + " ".join(words.split()[:-1]), "completion": "x"},
    ]
    found = read_answers(rows, [Path()], (), splits)
    assert brought.passages_shared(found, splits["dev"]) == 2
