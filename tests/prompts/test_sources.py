"""Each kind of source yields its rows, and what cannot be read is an error with its place."""

from __future__ import annotations

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
from splits import lines, read, user_texts

import selfkd
from selfkd.core.files import locate
from selfkd.errors import UsageError
from selfkd.prompts import rows, sources
from selfkd.prompts.read import source_kind, source_problems
from selfkd.recipe import reference


def test_parquet_csv_and_inline_rows_give_the_same_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "one,\n\u2028two", "answer": "007", "level": "1"}, {"prompt": "x", "answer": "y", "level": "2"}]
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame(rows).write_csv(tmp_path / "a.csv")
    lines(tmp_path, *rows)
    frames = [read(source, tmp_path).drop("source") for source in ("a.parquet", "a.csv", "data.jsonl", rows)]
    assert all(frame.equals(frames[0]) for frame in frames[1:]) and frames[0]["answer"][0] == "007"
    assert user_texts(read(["Hi", "Ho"], tmp_path)) == ["Hi", "Ho"]


def test_a_gym_task_or_option_that_does_not_exist_is_named(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UsageError, match="no task 'chain_sun'. Did you mean 'chain_sum'"):  # noqa: RUF043
        read({"reasoning_gym": {"task": "chain_sun"}}, tmp_path)
    with pytest.raises(UsageError, match="no option 'min_term'. Did you mean 'min_terms'"):  # noqa: RUF043
        read({"reasoning_gym": {"task": "chain_sum", "min_term": 2}}, tmp_path)
    with pytest.raises(UsageError, match="refuses these options"):
        read({"reasoning_gym": {"task": "chain_sum", "min_terms": 5, "max_terms": 2}}, tmp_path)


def test_the_seed_of_a_gym_split_comes_from_its_name() -> None:
    assert sources.gym_seed("train") != sources.gym_seed("dev") and sources.gym_seed("train") < 1 << 31


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
    assert "A .jsonl, .ndjson, .json, .parquet or .csv file." in reference.text()
    assert [*rows.FILE_READERS] == [".jsonl", ".ndjson", ".json", ".parquet", ".csv"]


def test_a_byte_order_mark_is_tolerated_and_other_encodings_are_not(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes('\ufeff{"prompt": "ä"}\r\n'.encode())
    assert user_texts(read("data.jsonl", tmp_path)) == ["ä"]
    (tmp_path / "data.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "ä"}'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"data\.jsonl:2  not UTF-8"):
        read("data.jsonl", tmp_path)
    (tmp_path / "data.csv").write_bytes("prompt\nok\nä".encode("latin-1"))
    with pytest.raises(UsageError, match=r"data\.csv:3  not UTF-8"):
        read("data.csv", tmp_path)


def test_several_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    lines(tmp_path, *["{,"] * 7)
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


def test_a_float_of_32_bits_on_the_hub_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"prompt": datasets.Value("string"), "answer": datasets.Value("float32")})
    rows = {"prompt": ["a", "b", "c", "d"], "answer": [0.1, None, 3.14159, 2.5e-5]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows, features=features))
    monkeypatch.setattr("selfkd.prompts.sources.hub_answers", lambda: True)
    frame = read({"hub": "some/floats"}, tmp_path)
    assert frame["answer"].to_list() == ["0.1", None, "3.14159", "0.000025"]
