"""Every source becomes the same table, and a row that cannot be a prompt is an error with its place."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from splits import lines, read, user_texts

from selfkd.core.pool import SCHEMAS
from selfkd.errors import UsageError
from selfkd.prompts.overlap import duplicates
from selfkd.prompts.read import meta_columns, source_problems


def test_a_jsonl_file_becomes_prompts_with_everything_else_in_meta(tmp_path: Path) -> None:
    lines(tmp_path, {"q": "6 x 7?", "a": 42, "level": 3, "tags": ["x"]}, {"q": "1 + 1?", "a": "2"})
    frame = read({"file": "data.jsonl", "prompt": "q", "answer": "a"}, tmp_path)
    assert dict(frame.schema) == {name: pl.Schema({name: kind})[name] for name, kind in SCHEMAS["prompts"].items()}
    assert frame["messages"][0].to_list() == [{"role": "user", "content": "6 x 7?"}]
    assert frame["answer"].to_list() == ["42", "2"] and frame["source"].to_list() == ["data.jsonl"] * 2
    assert [json.loads(text) for text in frame["meta"]] == [{"level": 3, "tags": ["x"]}, {}]
    assert meta_columns(frame) == ["level", "tags"]


def test_a_path_alone_uses_the_usual_column_names(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": "x"}]
    lines(tmp_path, {"messages": talk}, {"prompt": "a", "answer": None}, {"question": "b", "answer": ""}, {"prompt": talk})
    frame = read("data.jsonl", tmp_path)
    assert user_texts(frame) == ["Hi", "a", "b", "Hi"] and frame["answer"].to_list() == [None] * 4
    assert frame["messages"][0].to_list()[1] == {"role": "user", "content": "Hi"}


def test_a_function_is_a_source_and_a_map_changes_or_skips_rows(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(
        "def rows(n): return ({'q': str(i), 'k': i} for i in range(n))\n"
        "def row(raw): return {'prompt': 'say ' + raw['q'], 'answer': raw['q'], 'k': raw['k']} if raw['k'] % 2 else None\n"
    )
    frame = read({"function": "my.py:rows", "params": {"n": 6}, "map": "my.py:row", "limit": 2}, tmp_path)
    assert user_texts(frame) == ["say 1", "say 3"] and meta_columns(frame) == ["k"]


def test_template_and_system_make_the_messages(tmp_path: Path) -> None:
    lines(tmp_path, {"prompt": "6 x 7?", "unit": "kg"})
    source = {"file": "data.jsonl", "template": "{{ prompt.text }} In {{ unit }}.", "system": "Be brief."}
    assert read(source, tmp_path)["messages"][0].to_list() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "6 x 7? In kg."},
    ]


def test_ids_are_content_and_repeats_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b"}, {"prompt": "a", "answer": "1"}, {"prompt": "a", "answer": "2"}]
    frame = read(rows, tmp_path)
    first = frame["id"][0]
    assert len(first) == 16 and frame["id"].to_list().count(f"{first}-2") == 1 and frame["id"].n_unique() == 4
    assert duplicates(frame) == 1
    assert set(read(rows[::-1], tmp_path)["id"]) == set(frame["id"])


def test_limit_takes_the_first_and_shuffle_mixes_by_seed(tmp_path: Path) -> None:
    words = [f"prompt {n}" for n in range(50)] * 2
    assert user_texts(read({"rows": words, "limit": 3}, tmp_path)) == words[:3]
    once = user_texts(read({"rows": words, "shuffle": 1}, tmp_path))
    assert once == user_texts(read({"rows": words, "shuffle": 1}, tmp_path)) != words
    assert once != user_texts(read({"rows": words, "shuffle": 2}, tmp_path)) and sorted(once) == sorted(words)
    assert user_texts(read({"rows": words, "shuffle": 1, "limit": 5}, tmp_path)) == once[:5]


BAD_LINES = {
    "torn": ('{"prompt": "a"}\n{"prompt": "b', r"data\.jsonl:2  not JSON"),
    "nan": ('{"prompt": "a", "x": NaN}', r"data\.jsonl:1  NaN is not JSON"),
    "twice": ('{"prompt": "a", "prompt": "b"}', r"data\.jsonl:1  key 'prompt' is given twice"),
    "nul": ('{"prompt": "a"}\n\n{"prompt": "b"}\0', r"data\.jsonl:3  a NUL byte"),
    "list": ('{"prompt": "a"}\n["a"]', r"data\.jsonl:2  a list where an object was expected"),
    "column": ('{"promt": "a"}', r"(?s)data\.jsonl:1  no column 'prompt'\. Did you mean 'promt'.*Columns: promt"),
    "empty": ('{"prompt": "a"}\n{"prompt": "  "}', r"data\.jsonl:2  the prompt is empty"),
    "number": ('{"prompt": 3}', r"data\.jsonl:1  column 'prompt' must be text or a list of messages, not int '3'"),
    "null": ('{"prompt": null}', r"must be text or a list of messages, not null"),
    "role": ('{"messages": [{"role": "usr", "content": "a"}]}', r"role 'usr'\. Did you mean 'user'"),
    "content": ('{"messages": [{"role": "user", "content": null}]}', r"the user message must be text, not null"),
    "message": ('{"messages": ["a"]}', r"a message needs `role` and `content`"),
    "assistant": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        r"the last message is the assistant's",
    ),
    "no user": ('{"messages": [{"role": "system", "content": "a"}]}', r"there is no user message"),
    "answer": ('{"prompt": "a", "answer": ["1"]}', r"the answer must be text or a number, not list"),
    "surrogate": ('{"prompt": "\\ud800"}', r"half of a surrogate pair"),
    "nothing": ("\n", r"prompts\.train \(file: data\.jsonl\)  no prompts"),
}


@pytest.mark.parametrize("text, message", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_an_error_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(UsageError, match=message):
        read("data.jsonl", tmp_path)


def test_a_source_with_wrong_words_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for source, message in {
        "limt": ({"file": "x", "limt": 3}, "no field 'limt' for a source of kind file. Did you mean 'limit'?"),
        "two": ({"file": "x", "hub": "y"}, "it has both hub and file"),
        "none": ({"split": "train"}, "needs one of hub, file, function, reasoning_gym, evals, rows"),
        "type": ({"file": "x", "limit": "3"}, "'limit' should be a whole number of at least 1, not '3'"),
        "both": ({"file": "x", "prompt": "a", "messages": "b"}, "not both"),
        "map": ({"file": "x", "map": "a.py:b", "prompt": "a"}, "with `map`, the function names the columns"),
    }.values():
        assert message in source_problems(source, "train")[0]
        with pytest.raises(UsageError):
            read(source, tmp_path)
    assert source_problems("data.jsonl", "train") == [] == source_problems(["a"], "train")


def test_an_error_in_a_users_function_names_its_line_and_the_row(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def row(raw):\n    return {'prompt': raw['nope']}\n\ndef bad(raw): return 3\n")
    lines(tmp_path, {"q": "a"})
    with pytest.raises(UsageError, match=r"my\.py:2  KeyError: 'nope' \(mapping .*data\.jsonl:1\)"):
        read({"file": "data.jsonl", "map": "my.py:row"}, tmp_path)
    with pytest.raises(UsageError, match=r"data\.jsonl:1  a row must be a JSON object or a text, not int"):
        read({"file": "data.jsonl", "map": "my.py:bad"}, tmp_path)
    with pytest.raises(UsageError, match=r"template:1  'nope' is undefined"):
        read({"file": "data.jsonl", "prompt": "q", "template": "{{ nope }}"}, tmp_path)
    with pytest.raises(UsageError, match="has a system message of its own"):
        read(
            {"rows": [{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}], "system": "x"},
            tmp_path,
        )


def test_numbers_as_answers_are_written_in_full(tmp_path: Path) -> None:
    answers = (0.00001, 1e22, 42.0, -0.0, 1e16, 1.5e-7, 12, 0.1, True)
    lines(tmp_path, *({"prompt": str(place), "answer": answer} for place, answer in enumerate(answers)))
    told = ["0.00001", "1" + "0" * 22, "42", "0", "1" + "0" * 16, "0.00000015", "12", "0.1", "true"]
    assert read({"file": "data.jsonl"}, tmp_path)["answer"].to_list() == told
