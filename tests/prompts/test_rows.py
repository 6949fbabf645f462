"""Whatever a file holds is read, or refused with its file and line."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from splits import read, user_texts

from selfkd.errors import UsageError
from selfkd.prompts.rows import FILE_READERS, rows_of_file

DEEP = "[" * 20_000 + "]" * 20_000

# name: (file, content, the prompts' texts)
READ: dict[str, tuple[str, bytes, list[str]]] = {
    "an array": ("a.json", b'[{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]', ["1+1?", "2+2?"]),
    "an array over lines": ("a.json", b'\n[\n  {"prompt": "a"},\n\n  {\n    "prompt": "b"\n  }\n]\n', ["a", "b"]),
    "an array of texts": ("a.JSON", b'["a", "b"]', ["a", "b"]),
    "an array in an object": ("a.json", b'{ "data" : [{"prompt": "a"}] }\n', ["a"]),
    "an array with a BOM and CRLF": ("a.json", codecs.BOM_UTF8 + b'[\r\n{"prompt": "a"}\r\n]\r\n', ["a"]),
    "brackets in texts": ("a.json", b'[{"prompt": "]"}, {"prompt": "}, {\\"a\\": ["}]', ["]", '}, {"a": [']),
    "a BOM": ("a.jsonl", codecs.BOM_UTF8 + b'{"prompt": "a"}\n', ["a"]),
    "CRLF and empty lines": ("a.jsonl", b'\r\n{"prompt": "a"}\r\n\r\n  \r\n{"prompt": "b"}', ["a", "b"]),
    "one row": ("a.ndjson", b'{"prompt": "a"}', ["a"]),
    "a line separator in a text": ("a.jsonl", '{"prompt": "a\u2028b\x85c"}'.encode(), ["a\u2028b\x85c"]),
    "a surrogate pair": ("a.jsonl", b'{"prompt": "\\ud83d\\ude00"}', ["\U0001f600"]),
    "csv with a BOM": ("a.csv", codecs.BOM_UTF8 + b"prompt,answer\r\na,1\r\n\r\nb,\r\n", ["a", "b"]),
    "csv with line ends in quotes": ("a.csv", b'prompt,answer\n"a\nb, ""c""",1\nd,2\n', ['a\nb, "c"', "d"]),
    "csv of one row": ("a.csv", b"prompt\na", ["a"]),
}


@pytest.mark.parametrize("name, content, texts", READ.values(), ids=READ.keys())
def test_a_file_is_read(tmp_path: Path, name: str, content: bytes, texts: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert user_texts(read(name, tmp_path)) == texts


# name: (file, content, where in the file, what is said)
REFUSED: dict[str, tuple[str, bytes, str, str]] = {
    "array in .jsonl": ("a.jsonl", b'[{"prompt": "a"}]\n', ":1", "this is a JSON array\n    Name it .json"),
    "array over lines in .jsonl": ("a.jsonl", b'\xef\xbb\xbf[\n  {\n    "prompt": "a"\n  }\n]\n', ":1", "this is a JSON array"),
    "objects over lines in .jsonl": (
        "a.jsonl",
        b'{\n  "prompt": "a"\n}\n',
        ":1",
        "an object that is spread over several lines",
    ),
    "lines in .json": ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', ":1", "is read when it is named .jsonl"),
    "one object in .json": ("a.json", b'{"prompt": "a", "tags": ["b"]}', ":1", "a JSON array of objects was expected"),
    "columns in .json": ("a.json", b'{"prompt": {"0": "a"}}', ":1", "a JSON array of objects was expected"),
    "a number in .json": ("a.json", b"3", ":1", "a JSON array of objects was expected"),
    "nothing in .json": ("a.json", b"", ":1", "a JSON array of objects was expected"),
    "two arrays": ("a.json", b'{"train": [{"prompt": "a"}],\n "dev": []}', ":1", "other members beside the array"),
    "more behind the array": ("a.json", b'[{"prompt": "a"}]\n\n[]', ":1", "something follows the JSON array"),
    "an array cut short": ("a.json", b'[{"prompt": "a"},\n{"prompt": "b"}', ":2", "not JSON: the array does not end"),
    "an array cut in a row": ("a.json", b'[{"prompt": "a"},\n{"prompt": "b', ":2", "not JSON: Unterminated string"),
    "no comma": ("a.json", b'[{"prompt": "a"}\n{"prompt": "b"}]', ":2", "not JSON: Expecting ',' or ']' (column 1)"),
    "a comma too many": ("a.json", b'[{"prompt": "a"},\n]', ":2", "not JSON: a comma before ']'"),
    "a list of lists": ("a.json", b'[{"prompt": "a"},\n\n["b"]]', ":3", "a list where an object was expected"),
    "NaN in an array": ("a.json", b'[{"prompt": "a"},\n{"prompt": "b",\n "x": NaN}]', ":2", "NaN is not JSON"),
    "a key twice in an array": ("a.json", b'[\n{"prompt": "a", "prompt": "b"}]', ":2", "key 'prompt' is given twice"),
    "depth in an array": ("a.json", f'[\n{{"prompt": "a", "x": {DEEP}}}]'.encode(), ":2", "nested too deep"),
    "Latin-1 in an array": ("a.json", '[\n{"prompt": "ä"}]'.encode("latin-1"), ":2", "not UTF-8"),
    "NUL in an array": ("a.json", b'[\n{"prompt": "a"}\0]', ":2", "a NUL byte"),
    "an empty row in an array": ("a.json", b'[{"prompt": "a"},\n{"prompt": ""}]', ":2", "the prompt is empty"),
    "Infinity": ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "x": -Infinity}', ":2", "-Infinity is not JSON"),
    "a number too large": ("a.jsonl", b'{"prompt": "a", "answer": 1e999}', ":1", "a value that JSON cannot hold"),
    "a number too large in meta": ("a.jsonl", b'{"prompt": "a", "x": [1e999]}', ":1", "a value that JSON cannot hold"),
    "a number too long": (
        "a.jsonl",
        b'{"prompt": "a", "answer": ' + b"1" * 5000 + b"}",
        ":1",
        "more than 4300 digits; write it as text",
    ),
    "depth": ("a.jsonl", f'{{"prompt": "a"}}\n{{"prompt": "b", "x": {DEEP}}}'.encode(), ":2", "nested too deep"),
    "depth as a prompt": ("a.jsonl", f'{{"prompt": {DEEP}}}'.encode(), ":1", "nested too deep"),
    "UTF-16": (
        "a.jsonl",
        '{"prompt": "a"}\n{"prompt": "b"}\n'.encode("utf-16"),
        ":1",
        "UTF-16 text\n    Save it as UTF-8: iconv",
    ),
    "UTF-16 in an array": ("a.json", '[{"prompt": "a"}]'.encode("utf-16"), ":1", "this is UTF-16 text"),
    "UTF-16 in csv": ("a.csv", "prompt\na\n".encode("utf-16"), ":1", "this is UTF-16 text"),
    "UTF-16 without a mark": ("a.jsonl", '{"prompt": "a"}'.encode("utf-16-le"), ":1", "a NUL byte"),
    "Latin-1": ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}', ":2", "not UTF-8"),
    "half a surrogate pair": ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}', ":2", "half of a surrogate pair"),
    "half a pair in the answer": ("a.jsonl", b'{"prompt": "a", "answer": "\\ude00"}', ":1", "half of a surrogate pair"),
    "a number as a prompt": ("a.jsonl", b'{"prompt": 3}', ":1", "must be text or a list of messages, not int '3'"),
    "NUL in csv": ("a.csv", b"prompt\na\nb\0", ":3", "a NUL byte"),
    "a row of csv with line ends": (
        "a.csv",
        b'prompt,answer\n"a\nb",1\n"c\nd\ne",2,3\n',
        ":4",
        "3 fields where the header has 2",
    ),
    "an empty row of csv with line ends": ("a.csv", b'prompt,answer\n"a\nb",1\n" \n ",2\n', ":4", "the prompt is empty"),
    "a column twice": ("a.csv", b"prompt,prompt\na,b\n", ":1", "two columns have the same name"),
}


@pytest.mark.parametrize("name, content, where, message", REFUSED.values(), ids=REFUSED.keys())
def test_a_file_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes, where: str, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read(name, tmp_path)
    said = str(caught.value)
    assert message in said and f"{name}{where}  " in said and said.count(f"{name}:") == 1


def test_every_row_of_an_array_knows_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"data": [\n{"prompt": "a"}, {"prompt": "b"},\n\n  {"prompt":\n"c"}\n,"d"]}')
    places = [place.rpartition(":")[2] for _, place in rows_of_file(tmp_path / "a.json")]
    assert places == ["2", "2", "4", "6"]


@pytest.mark.parametrize("depth", range(100, 1100, 50))
@pytest.mark.parametrize(
    "row", ['{"prompt": "a", "x": DEEP}', '{"prompt": DEEP}', '{"prompt": "a", "answer": DEEP}', '{"messages": [DEEP]}']
)
def test_no_depth_is_a_traceback(tmp_path: Path, row: str, depth: int) -> None:
    (tmp_path / "a.jsonl").write_text(row.replace("DEEP", "[" * depth + "]" * depth))
    try:
        assert user_texts(read("a.jsonl", tmp_path)) == ["a"]
    except UsageError as error:
        assert "a.jsonl:1  " in str(error)


def test_a_file_that_may_not_be_read_and_a_strange_name(tmp_path: Path) -> None:
    pl.DataFrame({"prompt": ["a"], "x": [float("nan")]}).write_parquet(tmp_path / "a[1]*.parquet")
    with pytest.raises(UsageError, match=r"a\[1\]\*\.parquet row 1  a value that JSON cannot hold"):
        read("a[1]*.parquet", tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"folder\.jsonl  cannot be read"):
        list(rows_of_file(tmp_path / "folder.jsonl"))


def test_parquet_rows_keep_lists_and_structs(tmp_path: Path) -> None:
    row = {
        "prompt": "a",
        "answer": 7,
        "tests": [{"input": "1", "output": "2"}],
        "info": {"level": 3, "tags": ["x"]},
        "day": None,
    }
    pl.DataFrame([row]).write_parquet(tmp_path / "a.parquet")
    frame = read("a.parquet", tmp_path)
    assert frame["answer"][0] == "7"
    assert json.loads(frame["meta"][0]) == {name: row[name] for name in ("tests", "info", "day")}


PIECES = st.lists(
    st.sampled_from(
        [
            b"[",
            b"]",
            b"{",
            b"}",
            b'"prompt"',
            b'"messages"',
            b":",
            b",",
            b"\n",
            b"\r",
            b'"',
            b"a",
            b"1e999",
            b"NaN",
            b"\0",
            b"\xff",
            b"\\u",
        ]
    )
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.sampled_from([*FILE_READERS]), st.one_of(PIECES.map(b"".join), st.binary()))
@example(".parquet", b"PAR1" + b"\0" * 20 + b"PAR1")
@example(".csv", b'"')
def test_no_bytes_are_a_traceback(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    try:
        assert read(f"a{suffix}", tmp_path).height > 0
    except UsageError as error:
        assert error.where or "a." in error.what


NAMES = st.sampled_from(
    ["prompt", "answer", "messages", "conversations", "instruction", "input", "output", "problem", "meta", "x", "history"]
)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["user", "assistant", "human", "gpt"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(NAMES, st.sampled_from(["role", "content", "from", "value"])), inner, max_size=4),
    ),
    max_leaves=8,
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=3)})


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(NAMES, st.one_of(VALUES, st.lists(TURN, max_size=4)), max_size=5),
    st.dictionaries(st.sampled_from(["prompt", "answer"]), NAMES),
)
def test_no_row_is_a_traceback(row: dict[str, Any], named: dict[str, str]) -> None:
    try:
        frame = read({"rows": [row], **named}, Path())
    except UsageError as error:
        assert "prompts.train row 1  " in str(error)
    else:
        assert frame["messages"][0].to_list()[-1]["role"] != "assistant"
