"""The rows of a data file, each with its place: .jsonl, .ndjson, .json, .parquet and .csv. Knows neither recipe nor prompt.

JSON is read strictly: what most readers forgive (NaN, a key given twice, a NUL byte) is how data sets go wrong unseen.
All of a file is checked before the first row is given.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from selfkd.core.pool import SCHEMAS
from selfkd.errors import UsageError

MOST_ERRORS = 5  # lines named of one broken file
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")  # UTF-32 begins with the first one too
BLANK = re.compile(r"[ \t\r\n]*")  # what JSON calls white space
OPENING = re.compile(r'[ \t\r\n]*(\{[ \t\r\n]*"[^"\\]*"[ \t\r\n]*:[ \t\r\n]*)?\[')  # of an array, or of an object around one

Placed = tuple[Any, str]  # a value and its place in a file


class CsvReader(Protocol):
    """What `csv.reader` returns; the standard library has no name for it."""

    line_num: int

    def __iter__(self) -> Iterator[list[str]]: ...


def rows_of_file(path: Path) -> Iterator[Placed]:
    """Yield (row, place) for each row of a file, in order; its suffix says how it is read. UsageError with file and line."""
    read = FILE_READERS.get(path.suffix.lower())
    if read is None:
        fix = f"Rows are read from {', '.join(FILE_READERS)}; for anything else write a function: {{function: my.py:rows}}"
        raise UsageError(f"cannot read prompts from a '{path.suffix}' file", str(path), fix)
    return read(path)


# ----------------------------------------------------------------------------------------------------------------- text


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file without its byte order mark; UTF-16 is refused by name, for every line of it would be wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", str(path)) from None
    if content.startswith(UTF16_MARKS):
        raise UsageError("this is UTF-16 text", f"{path}:1", f"Save it as UTF-8: iconv -f UTF-16 -t UTF-8 {path.name}")
    return content.removeprefix(BYTE_ORDER_MARK)


def read_text(path: Path) -> str:
    """Return the text of a file; UsageError with the line where it is not UTF-8 or holds a NUL byte."""
    content = read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"{path}:{line_of(content, error.start)}"
        raise UsageError(f"not UTF-8: {error.reason}", place, "Save the file as UTF-8.") from None
    if "\0" in text:
        raise UsageError(NUL, f"{path}:{line_of(content, content.index(0))}")
    return text


def line_of(content: bytes, at: int) -> int:
    return content.count(b"\n", 0, at) + 1


# ----------------------------------------------------------------------------------------------------------------- JSON


def read_jsonl(path: Path) -> Iterator[Placed]:
    """Yield one JSON object or text per line. Several bad lines are named at once."""
    content = read_bytes(path)
    refuse_spread_json(content, path)
    rows, wrong = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((parse_line(line), f"{path}:{number}"))
        except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            wrong.append(f"{path}:{number}  {describe(error)}")
    if wrong:
        more = f"\nand {len(wrong) - MOST_ERRORS} more lines" if len(wrong) > MOST_ERRORS else ""
        raise UsageError("\n".join(wrong[:MOST_ERRORS]) + more, fix="Each line must be one JSON object in UTF-8.")
    return iter(rows)


def refuse_spread_json(content: bytes, path: Path) -> None:
    """Raise one UsageError for JSON that is spread over lines, where every line of it would be an error of its own."""
    first = next((line.strip() for line in content.split(b"\n", 2)[:2] if line.strip()), b"")
    if first.startswith(b"["):
        raise UsageError("this is a JSON array", f"{path}:1", "Name it .json, or write one object per line.")
    if first == b"{":
        raise UsageError("an object that is spread over several lines", f"{path}:1", SPREAD_FIX)


def parse_line(line: bytes) -> Any:
    """Return the object or text of a line; ValueError where it is not strictly JSON in UTF-8."""
    if b"\0" in line:
        raise ValueError(NUL)
    return row_value(json.loads(line.decode("utf-8"), object_pairs_hook=without_repeats, parse_constant=refuse_constant))


def row_value(value: Any) -> Any:
    if not isinstance(value, dict | str):
        raise ValueError(f"a {type(value).__name__} where an object was expected")
    return value


def read_json(path: Path) -> Iterator[Placed]:
    """Yield the rows of one JSON array, or of an object whose only member is one: {"data": [...]}."""
    text = read_text(path)
    opening = OPENING.match(text)
    if opening is None:
        raise UsageError("a JSON array of objects was expected", f"{path}:1", ARRAY_FIX)
    rows, end = array_rows(text, opening.end(), path)
    rest = re.compile(r"[ \t\r\n]*\}[ \t\r\n]*" if opening[1] else BLANK)
    if not rest.fullmatch(text, end):
        what = "the object has other members beside the array" if opening[1] else "something follows the JSON array"
        raise UsageError(what, f"{path}:{text.count(NEWLINE, 0, end) + 1}", ARRAY_FIX)
    return iter(rows)


def array_rows(text: str, at: int, path: Path) -> tuple[list[Placed], int]:
    """Return the rows of the array whose elements begin at `at`, and where it ends. One element at a time, for its line."""
    rows: list[Placed] = []
    line, begin = 1 + text.count(NEWLINE, 0, at), at
    try:
        while (at := after_blank(text, at)) < len(text) and text[at] != "]":
            line, begin = line + text.count(NEWLINE, begin, at), at
            value, at = STRICT.raw_decode(text, at)
            rows.append((row_value(value), f"{path}:{line}"))
            at = after_comma(text, at)
        if at >= len(text):
            raise json.JSONDecodeError("the array does not end", text, at)
    except json.JSONDecodeError as error:
        raise UsageError(describe(error), f"{path}:{error.lineno}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(describe(error), f"{path}:{line}") from None
    return rows, at + 1


def after_blank(text: str, at: int) -> int:
    found = BLANK.match(text, at)
    return found.end() if found else at


def after_comma(text: str, at: int) -> int:
    """Return where the next element begins, or where the array's bracket stands."""
    at = after_blank(text, at)
    if not text.startswith(",", at):
        if text.startswith("]", at) or at == len(text):
            return at
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    at = after_blank(text, at + 1)
    if text.startswith("]", at):
        raise json.JSONDecodeError("a comma before ']'", text, at)
    return at


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key '{next(name for name in names if names.count(name) > 1)}' is given twice")
    return found


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def describe(error: ValueError | RecursionError) -> str:
    """Return what is wrong with a piece of JSON, and where in its line."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    if isinstance(error, RecursionError):
        return NESTED
    if str(error).startswith("Exceeds the limit"):  # of Python, which would take minutes for a long one
        return "a whole number of more than 4300 digits; write it as text"
    return str(error)


# --------------------------------------------------------------------------------------------------------------- tables


def read_parquet(path: Path) -> Iterator[Placed]:
    """Yield the rows of a Parquet file."""
    try:
        frame = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UsageError(f"not a Parquet file: {error}", str(path)) from None
    rows = full_floats(frame).iter_rows(named=True)
    placed = map(given_back, rows) if frame.schema == pl.Schema(SCHEMAS["prompts"]) else rows
    return ((row, f"{path} row {number}") for number, row in enumerate(placed, 1))


def full_floats(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the frame with the 32-bit floats as written: 0.1, which as 64 bits would be 0.10000000149011612."""
    changed = [name for name, kind in frame.schema.items() if with_floats(kind, pl.String) != kind]
    texts = frame.with_columns(pl.col(name).cast(with_floats(frame.schema[name], pl.String)) for name in changed)
    return texts.with_columns(pl.col(name).cast(with_floats(frame.schema[name], pl.Float64)) for name in changed)


def with_floats(kind: pl.DataType, wanted: type[pl.DataType]) -> pl.DataType:
    """Return a column's type with `wanted` for each 32-bit float in it."""
    if isinstance(kind, pl.List):
        return pl.List(with_floats(as_type(kind.inner), wanted))
    if isinstance(kind, pl.Array):
        return pl.Array(with_floats(as_type(kind.inner), wanted), kind.size)
    if isinstance(kind, pl.Struct):
        return pl.Struct([pl.Field(field.name, with_floats(as_type(field.dtype), wanted)) for field in kind.fields])
    return wanted() if kind == pl.Float32 else kind


def as_type(kind: Any) -> pl.DataType:
    return kind if isinstance(kind, pl.DataType) else kind()


def given_back(row: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt that a run has frozen as the row that makes it again."""
    return {"messages": row["messages"], "answer": row["answer"], "meta": json.loads(row["meta"] or "{}")}


def read_csv(path: Path) -> Iterator[Placed]:
    """Yield the rows of a CSV file with a header. Values stay text ('007' is not 7); an empty field is null."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UsageError("two columns have the same name", f"{path}:1")
        return iter(csv_rows(reader, header, path))
    except csv.Error as error:
        raise UsageError(f"not CSV: {error}", f"{path}:{reader.line_num}") from None


def csv_rows(reader: CsvReader, header: list[str], path: Path) -> list[Placed]:
    """Return the rows, each with the line on which it begins: a text in quotes may hold line ends."""
    found: list[Placed] = []
    line = reader.line_num + 1
    for fields in reader:
        place, line = f"{path}:{line}", reader.line_num + 1
        if fields and len(fields) != len(header):
            what = f"{len(fields)} fields where the header has {len(header)}"
            raise UsageError(what, place, "A comma in a text needs quotes.")
        if fields:  # else the line is empty
            found.append(({name: value or None for name, value in zip(header, fields, strict=True)}, place))
    return found


NEWLINE = "\n"
NUL = "a NUL byte: the file was cut by a crash, or is UTF-16"
NESTED = "nested too deep to be read"
SPREAD_FIX = "A .jsonl file has one object per line. For an array of objects, over as many lines as you like, name it .json."
ARRAY_FIX = """Write [{"prompt": "6 x 7?", "answer": "42"}, ...] or {"data": [...]} and nothing beside it.
A file of one object per line is read when it is named .jsonl."""
STRICT = json.JSONDecoder(object_pairs_hook=without_repeats, parse_constant=refuse_constant)

FILE_READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
}
