"""The forms in which data sets write a row: read where there is one way to read them, else refused with the words to write."""

from __future__ import annotations

import json
import pickle
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from splits import lines, read

from selfkd.errors import UsageError
from selfkd.prompts.read import gold_hint

TALK = [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": "42"}]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello."},
    {"from": "human", "value": "6 x 7?"},
    {"from": "gpt", "value": "42"},
]
BEFORE = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "6 x 7?")]
ASKED = [("user", "6 x 7?")]

# name: (words beside the rows, row, messages, answer, meta)
READ: dict[str, tuple[dict[str, str], dict[str, Any], list[tuple[str, str]], str | None, dict[str, Any]]] = {
    "sharegpt": ({}, {"id": "x", "conversations": SHAREGPT}, BEFORE, "42", {"id": "x"}),
    "sharegpt asks": ({}, {"conversations": SHAREGPT[:4]}, BEFORE, None, {}),
    "sharegpt named": ({"messages": "chat"}, {"chat": SHAREGPT}, BEFORE, "42", {}),
    "sharegpt without tools": (
        {},
        {"conversations": SHAREGPT, "tools": "[]", "system": ""},
        BEFORE,
        "42",
        {"tools": "[]", "system": ""},
    ),
    "conversation": ({}, {"conversation": TALK}, ASKED, "42", {}),
    "messages": ({}, {"messages": TALK, "split": "train"}, ASKED, "42", {"split": "train"}),
    "messages and an answer, named": ({"answer": "answer"}, {"messages": TALK, "answer": "43"}, ASKED, "43", {}),
    "messages and an answer, the message": (
        {"answer": "messages"},
        {"messages": TALK, "answer": "43"},
        ASKED,
        "42",
        {"answer": "43"},
    ),
    "messages and a prompt, named": ({"messages": "messages"}, {"messages": TALK, "prompt": "6"}, ASKED, "42", {"prompt": "6"}),
    "messages that ask, and a prompt that says the same": (
        {},
        {"messages": TALK[:1], "prompt": "6 x 7?"},
        ASKED,
        None,
        {"prompt": "6 x 7?"},
    ),
    "messages as JSON text": ({}, {"messages": json.dumps(TALK), "id": "x"}, ASKED, "42", {"id": "x"}),
    "sharegpt as JSON text": ({}, {"conversations": json.dumps(SHAREGPT)}, BEFORE, "42", {}),
    "JSON text, named": ({"messages": "chat"}, {"chat": json.dumps(TALK)}, ASKED, "42", {}),
    "a list as a text": ({}, {"prompt": "[1, 2]: the sum?"}, [("user", "[1, 2]: the sum?")], None, {}),
    "a system column, named": ({"prompt": "question"}, {"system": "Hm", "question": "6 x 7?"}, ASKED, None, {"system": "Hm"}),
    "an input, named": ({"prompt": "prompt"}, {"prompt": "6 x 7?", "input": "8"}, ASKED, None, {"input": "8"}),
    "an input that a template writes": (
        {"template": "{{ input }}?"},
        {"prompt": "Multiply.", "input": "6 x 7"},
        ASKED,
        None,
        {"input": "6 x 7"},
    ),
    "a blank gold": ({}, {"prompt": "6 x 7?", "answer": " \n"}, ASKED, None, {}),
    "alpaca": (
        {},
        {"instruction": "Multiply.", "input": "6 and 7", "output": "42", "level": 1},
        [("user", "Multiply.\n\n6 and 7")],
        "42",
        {"level": 1},
    ),
    "alpaca without input": ({}, {"instruction": "6 x 7?", "input": "", "output": "42"}, ASKED, "42", {}),
    "alpaca, no input column": ({}, {"instruction": "6 x 7?", "output": "42"}, ASKED, "42", {}),
    "alpaca named": ({"prompt": "instruction"}, {"instruction": "6 x 7?", "output": "42"}, ASKED, None, {"output": "42"}),
    "problem and solution": ({}, {"problem": "6 x 7?", "solution": "42", "level": 5}, ASKED, "42", {"level": 5}),
    "problem, solution and answer": (
        {},
        {"problem": "6 x 7?", "solution": "So 42.", "answer": "42"},
        ASKED,
        "42",
        {"solution": "So 42."},
    ),
    "problem named": ({"prompt": "problem"}, {"problem": "6 x 7?", "solution": "42"}, ASKED, None, {"solution": "42"}),
    "prompt and completion": ({}, {"prompt": "6 x 7?", "completion": "42"}, ASKED, None, {"completion": "42"}),
    "prompt and completion, named": ({"answer": "completion"}, {"prompt": "6 x 7?", "completion": "42"}, ASKED, "42", {}),
    "a completion of messages": ({"answer": "completion"}, {"prompt": TALK[:1], "completion": TALK[1:]}, ASKED, "42", {}),
    "question beside a prompt, the same": (
        {},
        {"prompt": "6 x 7?", "question": "6 x 7?"},
        ASKED,
        None,
        {"question": "6 x 7?"},
    ),
    "question beside a prompt, named": (
        {"prompt": "question"},
        {"prompt": "6", "question": "6 x 7?"},
        ASKED,
        None,
        {"prompt": "6"},
    ),
    "question beside an empty prompt": (
        {"prompt": "question"},
        {"prompt": "", "question": "6 x 7?"},
        ASKED,
        None,
        {"prompt": ""},
    ),
    "other case, named": ({"prompt": "Question", "answer": "Answer"}, {"Question": "6 x 7?", "Answer": "42"}, ASKED, "42", {}),
    "a column without a name": ({}, {"": "0", "prompt": "6 x 7?"}, ASKED, None, {"": "0"}),
    "a part of a column": (
        {"answer": "answer.value"},
        {"prompt": "6 x 7?", "answer": {"value": 42}},
        ASKED,
        "42",
        {"answer": {"value": 42}},
    ),
    "squad": (
        {"answer": "answers.text.0"},
        {"question": "6 x 7?", "answers": {"text": ["42", "forty-two"], "answer_start": [3]}},
        ASKED,
        "42",
        {"answers": {"text": ["42", "forty-two"], "answer_start": [3]}},
    ),
    "a prompt inside a column": ({"prompt": "data.q"}, {"data": {"q": "6 x 7?"}}, ASKED, None, {"data": {"q": "6 x 7?"}}),
    "a column with a dot": ({"prompt": "a.b"}, {"a.b": "6 x 7?", "a": {"b": "no"}}, ASKED, None, {"a": {"b": "no"}}),
}


@pytest.mark.parametrize("words, row, messages, answer, meta", READ.values(), ids=READ.keys())
def test_a_row_is_read_in_the_one_way_there_is(
    tmp_path: Path, words: dict[str, str], row: dict[str, Any], messages: list[tuple[str, str]], answer: str | None, meta: Any
) -> None:
    frame = read({"rows": [row], **words}, tmp_path)
    assert [(message["role"], message["content"]) for message in frame["messages"][0].to_list()] == messages
    assert frame["answer"][0] == answer and json.loads(frame["meta"][0]) == meta


# name: (words beside the rows, row, what the error says)
REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "other case": ({}, {"Question": "a", "Answer": "b"}, "Write `prompt: Question, answer: Answer` if that is meant."),
    "other names": ({}, {"Query": "a", "Expected answer": "b"}, "Write `prompt: Query, answer: Expected answer`"),
    "names with blanks": (
        {},
        {" Question": "a", "Answer": "b"},
        'Write `prompt: " Question", answer: Answer` if that is meant.',
    ),
    "no names": ({}, {"x": "a", "y": "b"}, "Say which column it is: `prompt: COLUMN, answer: COLUMN`."),
    "two answers": (
        {},
        {"messages": TALK, "answer": "42"},
        "two gold answers: the assistant's last message in 'messages', and column 'answer'\n"
        "    Write `answer: messages` for the message or `answer: answer` for the column.",
    ),
    "two prompts": (
        {},
        {"messages": TALK, "problem": "6 x 7?"},
        "the prompt may be in any of these columns: messages, problem\n    Write `messages: messages` or `prompt: problem`.",
    ),
    "a question beside another prompt": (
        {},
        {"prompt": "You are a helper", "question": "6 x 7?"},
        "the prompt may be in any of these columns: prompt, question\n    Write `prompt: prompt` or `prompt: question`.",
    ),
    "a question beside an empty prompt": ({}, {"prompt": "", "question": "a"}, "in any of these columns: prompt, question"),
    "messages that ask, and another prompt": (
        {},
        {"messages": TALK[:1], "prompt": "6"},
        "Write `messages: messages` or `prompt: prompt`.",
    ),
    "a system prompt beside a question": (
        {},
        {"system_prompt": "Be brief.", "question": "6 x 7?", "response": "42"},
        "column 'system_prompt' belongs to the conversation and is not read\n    Write `prompt: question`",
    ),
    "tools beside messages": ({}, {"messages": TALK, "tools": ["f"]}, "Write `messages: messages` to read that column alone."),
    "an input below a question": ({}, {"question": "Multiply.", "input": "6, 7"}, "column 'input' belongs to the conversation"),
    "an input below a prompt": (
        {},
        {"prompt": "Multiply.", "input": "6, 7"},
        "Write `prompt: prompt` to read that column alone",
    ),
    "messages as the text of a prompt": ({}, {"prompt": json.dumps(TALK)}, "Write `messages: prompt`."),
    "messages as Python prints them": (
        {},
        {"messages": str(TALK)},
        "column 'messages' holds messages as text that is not JSON",
    ),
    "JSON text that asks, as the answer": (
        {"answer": "messages"},
        {"messages": json.dumps(TALK[:1])},
        "does not end with the assistant's answer",
    ),
    "a gold answer with blanks around its name": (
        {},
        {"question": "a", " answer": "b"},
        'so it is not read as the gold answer\n    Take the blanks out of the name, or write `answer: " answer"`.',
    ),
    "two other forms": (
        {},
        {"conversations": SHAREGPT, "instruction": "a"},
        "Write `messages: conversations` or `prompt: instruction`.",
    ),
    "dolly": ({}, {"instruction": "a", "context": "b", "response": "c"}, "Write `prompt: instruction, answer: response`"),
    "a system column": (
        {},
        {"conversations": SHAREGPT[1:], "system": "Be brief."},
        "column 'system' belongs to the conversation",
    ),
    "a history": (
        {},
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        "Write `prompt: instruction` to read that column alone.",
    ),
    "an input of numbers": ({}, {"instruction": "a", "input": 3, "output": "b"}, "column 'input' must be text, not int '3'"),
    "nothing asked": ({}, {"conversations": SHAREGPT[4:]}, "there is no user message"),
    "only an answer": ({}, {"messages": TALK[1:]}, "there is no user message"),
    "only a system message": ({}, {"messages": [{"role": "system", "content": "a"}, TALK[1]]}, "there is no user message"),
    "an empty conversation": ({}, {"conversations": []}, "must be text or a list of messages"),
    "a tool's call": (
        {},
        {"messages": [TALK[0], {"role": "assistant", "content": None}]},
        "the assistant message must be text, not null",
    ),
    "another speaker": (
        {},
        {"conversations": [{"from": "function_call", "value": "a"}, *SHAREGPT[1:]]},
        "role 'function_call'",
    ),
    "half a message": ({}, {"conversations": [{"from": "human", "text": "a"}]}, "a message needs `role` and `content`"),
    "the message by name": ({"answer": "messages"}, {"messages": TALK[:1]}, "does not end with the assistant's answer"),
    "an object": ({}, {"prompt": "a", "answer": {"value": 42}}, "Name the part that is the answer: `answer: answer.value`."),
    "several golds": ({}, {"prompt": "a", "answer": ["4", "four"]}, "Name the part that is the answer: `answer: answer.0`."),
    "an empty list": ({}, {"prompt": "a", "answer": []}, "the answer must be text or a number, not list '[]'"),
    "squad": (
        {"answer": "answers"},
        {"question": "a", "answers": {"text": ["b"], "answer_start": [3]}},
        "`answer: answers.text.0` or `answer: answers.answer_start.0`",
    ),
    "no such part": (
        {"answer": "answer.valu"},
        {"prompt": "a", "answer": {"value": 1}},
        "'answer.valu'. Did you mean 'answer.value'?",
    ),
    "no such place": (
        {"answer": "answer.3"},
        {"prompt": "a", "answer": ["b"]},
        "no column 'answer.3'. Did you mean 'answer.0'?",
    ),
}


@pytest.mark.parametrize("words, row, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_row_that_could_be_read_in_two_ways_is_refused_with_the_words_to_write(
    tmp_path: Path, words: dict[str, str], row: dict[str, Any], message: str
) -> None:
    lines(tmp_path, row)
    with pytest.raises(UsageError) as caught:
        read({"file": "data.jsonl", **words}, tmp_path)
    assert message in str(caught.value) and "data.jsonl:1" in str(caught.value)


OFFERS = {name: case for name, case in REFUSED.items() if "`answer: " in case[2] or "Write `" in case[2]}


@pytest.mark.parametrize("words, row, message", OFFERS.values(), ids=OFFERS.keys())
def test_the_words_that_an_error_offers_work(tmp_path: Path, words: dict[str, str], row: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read({"rows": [row], **words}, tmp_path)
    offers = [text for text in str(caught.value).split("`")[1::2] if ": " in text]
    assert offers
    for offer in offers:
        named = yaml.safe_load(f"{{{offer}}}")
        assert read({"rows": [row], **words, **named}, tmp_path).height == 1


def test_a_template_sees_a_conversation_without_its_answer(tmp_path: Path) -> None:
    source = {"rows": [{"messages": TALK}], "template": "{{ prompt.text }} ({{ prompt.answer }})", "system": "Be brief."}
    frame = read(source, tmp_path)
    assert [message["content"] for message in frame["messages"][0].to_list()] == ["Be brief.", "6 x 7? (42)"]


def test_a_template_makes_no_prompt_of_an_answer_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no user message"):
        read({"rows": [{"messages": TALK[1:]}], "template": "Q: {{ prompt.text }}", "system": "Be brief."}, tmp_path)


def test_prompts_without_gold_say_which_column_looks_like_it(tmp_path: Path) -> None:
    assert (
        gold_hint(read([{"prompt": "a", "response": "b"}], tmp_path))
        == "no prompt has a gold answer; if it is in a column, write `answer: response`"
    )
    assert "`answer: Answer`" in gold_hint(read([{"question": "a", "Answer": "b"}], tmp_path))
    assert gold_hint(read([{"prompt": "a", "level": 3}], tmp_path)) == ""
    assert gold_hint(read([{"prompt": "a", "response": "b", "answer": "c"}], tmp_path)) == ""


def test_a_parquet_file_of_conversations_and_decimals_is_read(tmp_path: Path) -> None:
    talks = [[{"from": "human", "value": "6 x 7?"}, {"from": "gpt", "value": "42"}], [{"from": "human", "value": "1 + 1?"}]]
    pl.DataFrame({"conversations": talks}).write_parquet(tmp_path / "talks.parquet")
    assert read("talks.parquet", tmp_path)["answer"].to_list() == ["42", None]
    sums = pl.DataFrame(
        {"prompt": ["a"], "answer": pl.Series([Decimal("1.50")], dtype=pl.Decimal(10, 2)), "tags": [["x", "y"]]}
    )
    sums.write_parquet(tmp_path / "sums.parquet")
    frame = read("sums.parquet", tmp_path)
    assert frame["answer"][0] == "1.50" and json.loads(frame["meta"][0]) == {"tags": ["x", "y"]}


def test_a_float_of_32_bits_is_read_as_it_was_written(tmp_path: Path) -> None:
    floats = {"prompt": ["a", "b"], "answer": pl.Series([0.1, None], dtype=pl.Float32)}
    nested = {"tags": pl.Series([[0.2], []], dtype=pl.List(pl.Float32)), "one": pl.Series([{"k": 1e-7}, None])}
    frame = pl.DataFrame({**floats, **nested}).cast({"one": pl.Struct({"k": pl.Float32})})
    frame.write_parquet(tmp_path / "floats.parquet")
    found = read("floats.parquet", tmp_path)
    assert found["answer"].to_list() == ["0.1", None]
    assert json.loads(found["meta"][0]) == {"tags": [0.2], "one": {"k": 1e-7}}


def test_a_csv_header_with_a_blank_after_the_comma_is_not_read_without_its_answer(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question, answer\n6 x 7?, 42\n")
    with pytest.raises(UsageError, match=r"a\.csv:2  column ' answer' has blanks around its name"):
        read("a.csv", tmp_path)


def test_a_map_function_decides_what_the_prompt_is(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def row(row):\n    return {**row, 'prompt': row['system'] + row['question']}\n")
    frame = read({"rows": [{"system": "6 x ", "question": "7?"}], "map": "my.py:row"}, tmp_path)
    assert frame["messages"][0].to_list() == [{"role": "user", "content": "6 x 7?"}]


# One line of a file: (prompt, answer, meta), or what is said.
ROWS: dict[str, tuple[str, str | None, dict[str, Any]] | str] = {
    '\ufeff{"prompt": "a", "answer": "4"}': ("a", "4", {}),
    '{"prompt": "a", "answer": "4", "meta": {"k": 1}}': ("a", "4", {"k": 1}),
    '{"prompt": "a", "answer": "4", "meta": "{\\"k\\": 1}"}': ("a", "4", {"meta": '{"k": 1}'}),
    '{"prompt": "a", "answer": "4", "meta": null}': ("a", "4", {"meta": None}),
    '{"prompt": "a", "answer": "4", "meta": {"k": 1}, "k": 2}': ("a", "4", {"k": 2}),
    '{"prompt": "a", "answer": true}': ("a", "true", {}),
    '{"prompt": "a", "answer": ""}': ("a", None, {}),
    '{"prompt": "a", "answer": null}': ("a", None, {}),
    '{"prompt": "a"}': ("a", None, {}),
    '"a"': ("a", None, {}),
    '{"prompt": [{"role": "user", "content": "a"}], "answer": "4"}': ("a", "4", {}),
    '{"prompt": "a", "answer": [{"role": "assistant", "content": "4"}]}': ("a", "4", {}),
    '{"prompt": "a", "answer": ["4", "four"]}': "the answer must be text or a number, not list",
    '{"prompt": "a", "answer": [{"role": "user", "content": "4"}]}': "the answer must be text or a number, not list",
    '{"prompt": [{"role": "assistant", "content": "a"}]}': "there is no user message",
    '["a"]': "this is a JSON array",
}


@pytest.mark.parametrize("line, expected", ROWS.items())
def test_one_row_has_one_reading(tmp_path: Path, line: str, expected: tuple[str, str | None, dict[str, Any]] | str) -> None:
    (tmp_path / "a.jsonl").write_text(line, "utf-8")
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=rf"a\.jsonl:1  {re.escape(expected)}"):
            read("a.jsonl", tmp_path)
        return
    text, answer, meta = expected
    frame = read("a.jsonl", tmp_path)
    assert frame["messages"][0].to_list() == [{"role": "user", "content": text}]
    assert frame["answer"][0] == answer and json.loads(frame["meta"][0]) == meta


def test_an_error_can_be_printed_whatever_the_data_hold(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read([{"\ud83d": "a", "m": "b"}], tmp_path)
    assert "Columns: \\ud83d, m" in str(caught.value).encode().decode()
    with pytest.raises(UsageError) as caught:
        read([{"messages": [{"role": "\ud83d", "content": "a"}]}], tmp_path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
