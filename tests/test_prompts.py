"""Every source becomes the same table, and a row that cannot be a prompt is an error with its place."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import selfkd
from selfkd.core.files import locate
from selfkd.core.pool import SCHEMAS
from selfkd.errors import UsageError
from selfkd.prompts import sources
from selfkd.prompts.overlap import duplicates, overlap, shared_passages
from selfkd.prompts.read import meta_columns, read_prompts, source_kind, source_problems
from selfkd.recipe import reference
from selfkd.rewards.check import check_gold, score_batch
from selfkd.rewards.find import find_function


def read(source: Any, folder: Path, split: str = "train") -> pl.DataFrame:
    return read_prompts(source, [folder], split)


def lines(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    (folder / name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return name


def user_texts(frame: pl.DataFrame) -> list[str]:
    return [talk[-1]["content"] for talk in frame["messages"].to_list()]


# -------------------------------------------------------------------------------------------------------------- sources


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


def test_parquet_csv_and_inline_rows_give_the_same_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "one,\n\u2028two", "answer": "007", "level": "1"}, {"prompt": "x", "answer": "y", "level": "2"}]
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame(rows).write_csv(tmp_path / "a.csv")
    lines(tmp_path, *rows)
    frames = [read(source, tmp_path).drop("source") for source in ("a.parquet", "a.csv", "data.jsonl", rows)]
    assert all(frame.equals(frames[0]) for frame in frames[1:]) and frames[0]["answer"][0] == "007"
    assert user_texts(read(["Hi", "Ho"], tmp_path)) == ["Hi", "Ho"]


def test_a_function_is_a_source_and_a_map_changes_or_skips_rows(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text(
        "def rows(n): return ({'q': str(i), 'k': i} for i in range(n))\n"
        "def row(raw): return {'prompt': 'say ' + raw['q'], 'answer': raw['q'], 'k': raw['k']} if raw['k'] % 2 else None\n"
    )
    frame = read({"function": "my.py:rows", "params": {"n": 6}, "map": "my.py:row", "limit": 2}, tmp_path)
    assert user_texts(frame) == ["say 1", "say 3"] and meta_columns(frame) == ["k"]


def test_gsm8k_rows_are_mapped_by_the_shipped_function(tmp_path: Path) -> None:
    lines(tmp_path, {"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42\n#### 42"})
    frame = read({"file": "data.jsonl", "map": "reward/gsm8k.py:row"}, tmp_path)
    assert frame["answer"].to_list() == ["42"] and json.loads(frame["meta"][0]) == {"solution": "6 x 7 = 42"}


def test_template_and_system_make_the_messages(tmp_path: Path) -> None:
    lines(tmp_path, {"prompt": "6 x 7?", "unit": "kg"})
    source = {"file": "data.jsonl", "template": "{{ prompt.text }} In {{ unit }}.", "system": "Be brief."}
    assert read(source, tmp_path)["messages"][0].to_list() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "6 x 7? In kg."},
    ]


def test_a_gym_task_carries_what_its_scorer_needs(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    gym = {"task": "chain_sum", "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "size": 20}
    source = {"reasoning_gym": gym, "template": "templates/answer.j2"}
    frame = read(source, tmp_path)
    assert frame.height == 20 and all("Answer: <n>" in text and " =" in text for text in user_texts(frame))
    assert frame.equals(read(source, tmp_path)) and not frame["id"].equals(read(source, tmp_path, "test")["id"])
    meta = json.loads(frame["meta"][0])
    assert meta["source_dataset"] == "chain_sum" and meta["question"] in user_texts(frame)[0]
    rows = [
        dict(completion=f"Answer: {answer}", answer=answer, meta=text) for answer, text in zip(frame["answer"], frame["meta"])
    ]
    solved = find_function("reward/gym.py:solved", [])
    assert score_batch(solved, rows) == [(1.0, "")] * 20
    gold = [dict(id=row["id"], prompt="", answer=row["answer"], meta=row["meta"]) for row in frame.to_dicts()]
    assert check_gold(solved, gold, 60.0) == (20, 20, "")


def test_a_gym_scorer_that_compares_tuples_gets_them_back(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    frame = read({"reasoning_gym": {"task": "arc_agi", "size": 2}}, tmp_path)
    rows = [dict(completion=f"Answer: {row['answer']}", answer=row["answer"], meta=row["meta"]) for row in frame.to_dicts()]
    assert score_batch(find_function("reward/gym.py:solved", []), rows) == [(1.0, "")] * 2


def test_a_gym_task_or_option_that_does_not_exist_is_named(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UsageError, match="no task 'chain_sun'. Did you mean 'chain_sum'"):  # noqa: RUF043
        read({"reasoning_gym": {"task": "chain_sun"}}, tmp_path)
    with pytest.raises(UsageError, match="no option 'min_term'. Did you mean 'min_terms'"):  # noqa: RUF043
        read({"reasoning_gym": {"task": "chain_sum", "min_term": 2}}, tmp_path)
    with pytest.raises(UsageError, match="refuses these options"):
        read({"reasoning_gym": {"task": "chain_sum", "min_terms": 5, "max_terms": 2}}, tmp_path)


def test_a_hub_set_without_network_says_so_quickly(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = (
        "from selfkd.prompts.read import read_prompts; from selfkd.errors import UsageError\n"
        "try: read_prompts({'hub': 'openai/gsm8k', 'subset': 'main'}, [], 'train')\n"
        "except UsageError as error: print(error)"
    )
    home = str(Path(selfkd.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": home, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "prompts.train (hub: openai/gsm8k)" in done.stdout and "HF_HOME" in done.stdout, done.stdout + done.stderr
    assert "Retrying" not in done.stderr


def test_a_new_kind_of_source_is_one_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_sqlite(words: Mapping[str, Any], folders: Sequence[Path], split_name: str) -> Iterator[sources.Raw]:
        place = sources.place_of("sqlite", words, split_name)
        with closing(sqlite3.connect(locate(words["sqlite"], folders))) as base:
            found = base.execute(words.get("query", "select prompt, answer from prompts")).fetchall()
        for number, (prompt, answer) in enumerate(found, 1):
            yield sources.Raw({"prompt": prompt, "answer": answer}, words["sqlite"], f"{place} row {number}")

    meaning = "A table `prompts` of an SQLite file, or what `query` selects."
    monkeypatch.setitem(sources.SOURCES, "sqlite", sources.Source(read_sqlite, meaning, ("query",)))
    with closing(sqlite3.connect(tmp_path / "my.db")) as base, base:
        base.execute("create table prompts (prompt text, answer text)")
        base.executemany("insert into prompts values (?, ?)", [("6 x 7?", "42"), ("", "0")])
    frame = read({"sqlite": "my.db", "limit": 1}, tmp_path)
    assert user_texts(frame) == ["6 x 7?"] and frame["answer"].to_list() == ["42"]
    with pytest.raises(UsageError, match=r"prompts\.dev \(sqlite: my\.db\) row 2  the prompt is empty"):
        read({"sqlite": "my.db"}, tmp_path, "dev")
    with pytest.raises(UsageError, match=r"prompts\.dev \(sqlite: my\.db\)  no prompts"):
        read({"sqlite": "my.db", "query": "select 1, 2 where 0"}, tmp_path, "dev")
    assert "Did you mean 'query'?" in source_problems({"sqlite": "my.db", "qurey": ""}, "train")[0]
    assert source_kind({"sqlite": "my.db"}) == "sqlite" and f"| `sqlite` | {meaning} | `query` |" in reference.text()


def test_the_reference_names_the_files_that_are_read() -> None:
    assert "A .jsonl, .ndjson, .parquet or .csv file." in reference.text()
    assert [*sources.FILE_READERS] == [".jsonl", ".ndjson", ".parquet", ".csv"]


# --------------------------------------------------------------------------------------------- ids, order and repetition


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


def test_train_prompts_found_in_a_held_out_split_are_listed(tmp_path: Path) -> None:
    train = read(["What is  ONE plus one?", "Something else", "x"], tmp_path)
    test = read({"rows": ["what is one\nplus one?"], "system": "Be brief."}, tmp_path, "test")
    assert overlap(train, test) == [train["id"][0]]
    assert overlap(train, read(["nothing"], tmp_path)) == []


def test_thirteen_words_in_a_row_are_a_shared_passage(tmp_path: Path) -> None:
    passage = " ".join(f"w{n}" for n in range(13))
    train = read([f"a b {passage} c", "short text", passage[3:], "x " + passage.replace("w5", "v5")], tmp_path)
    test = read([f"q {passage.upper()}", "short text"], tmp_path)
    assert shared_passages(train, test) == [train["id"][0]]
    wording = read([f"{passage} {n}" for n in range(11)], tmp_path)
    assert shared_passages(train, wording) == []


# ----------------------------------------------------------------------------------------------------------- what is bad

BAD_LINES = {
    "torn": ('{"prompt": "a"}\n{"prompt": "b', r"data\.jsonl:2  not JSON"),
    "nan": ('{"prompt": "a", "x": NaN}', r"data\.jsonl:1  NaN is not JSON"),
    "twice": ('{"prompt": "a", "prompt": "b"}', r"data\.jsonl:1  key 'prompt' is given twice"),
    "nul": ('{"prompt": "a"}\n\n{"prompt": "b"}\0', r"data\.jsonl:3  a NUL byte"),
    "list": ('["a"]', r"data\.jsonl:1  a list where an object was expected"),
    "column": ('{"promt": "a"}', r"(?s)data\.jsonl:1  no column 'prompt'\. Did you mean 'promt'.*Columns: promt"),
    "empty": ('{"prompt": "a"}\n{"prompt": "  "}', r"data\.jsonl:2  the prompt is empty"),
    "number": ('{"prompt": 3}', r"data\.jsonl:1  column 'prompt' must be text or a list of messages, not int '3'"),
    "null": ('{"prompt": null}', r"must be text or a list of messages, not null"),
    "role": ('{"messages": [{"role": "usr", "content": "a"}]}', r"role 'usr'\. Did you mean 'user'"),
    "content": ('{"messages": [{"role": "user", "content": null}]}', r"the user message must be text, not null"),
    "message": ('{"messages": ["a"]}', r"a message needs `role` and `content`"),
    "assistant": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
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


def test_a_byte_order_mark_is_tolerated_and_other_encodings_are_not(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes('\ufeff{"prompt": "ä"}\r\n'.encode())
    assert user_texts(read("data.jsonl", tmp_path)) == ["ä"]
    (tmp_path / "data.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "ä"}'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"data\.jsonl:2  not UTF-8"):
        read("data.jsonl", tmp_path)
    (tmp_path / "data.csv").write_bytes("prompt\nok\nä".encode("latin-1"))
    with pytest.raises(UsageError, match=r"data\.csv:3  not UTF-8"):
        read("data.csv", tmp_path)


def test_several_bad_lines_are_told_at_once(tmp_path: Path) -> None:
    lines(tmp_path, *["{"] * 7)
    with pytest.raises(UsageError) as caught:
        read("data.jsonl", tmp_path)
    assert str(caught.value).count("data.jsonl:") == 5 and "and 2 more lines" in str(caught.value)


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR0")
    with pytest.raises(UsageError, match="not a Parquet file"):
        read("a.parquet", tmp_path)
    (tmp_path / "a.csv").write_text("prompt,answer\na,b\nc,d,e\n")
    with pytest.raises(UsageError, match=r"a\.csv:3  3 fields where the header has 2"):
        read("a.csv", tmp_path)
    (tmp_path / "b.csv").write_text('prompt,answer\na,"b\n')
    with pytest.raises(UsageError, match=r"b\.csv:2  not CSV"):
        read("b.csv", tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match=r"cannot read prompts from a '\.txt' file"):
        read("a.txt", tmp_path)
    with pytest.raises(UsageError, match=r"no file 'a\.jsonl'"):
        read("a.jsonl", tmp_path)


def test_a_source_with_wrong_words_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for source, message in {
        "limt": ({"file": "x", "limt": 3}, "no field 'limt' for a source of kind file. Did you mean 'limit'?"),
        "two": ({"file": "x", "hub": "y"}, "it has both hub and file"),
        "none": ({"split": "train"}, "needs one of hub, file, function, reasoning_gym, rows"),
        "type": ({"file": "x", "limit": "3"}, "limit must be a whole number, not '3'"),
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


def test_the_seed_of_a_gym_split_comes_from_its_name() -> None:
    assert sources.gym_seed("train") != sources.gym_seed("dev") and sources.gym_seed("train") < 1 << 31
