"""Raw rows from files, the hub and reasoning-gym, each with the place it came from.

JSON is read strictly: what most readers forgive (NaN, a key given twice, a NUL byte) is how data sets go wrong unseen.
`datasets` and `reasoning_gym` are imported only where a recipe asks for them.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import polars as pl

from selfkd.core import digest
from selfkd.core.wording import did_you_mean, first_line
from selfkd.errors import UsageError

KINDS = (".jsonl", ".ndjson", ".parquet", ".csv")

MOST_ERRORS = 5  # lines told of one broken file
REACH_SECONDS = 5.0  # the hub client alone retries for 23 s where there is no network
GYM_SIZE = 500


class Raw(NamedTuple):
    """A row as found; `source` is what the recipe calls its origin, `where` is told in an error."""

    value: Any
    source: str
    where: str


# ---------------------------------------------------------------------------------------------------------------- files


def from_file(path: Path, label: str) -> Iterator[Raw]:
    """Rows of a .jsonl, .parquet or .csv file, in order. `label` is the path as the recipe has it."""
    read = {".jsonl": jsonl, ".ndjson": jsonl, ".parquet": parquet, ".csv": table}.get(path.suffix.lower())
    if read is None:
        fix = f"Prompts are read from {', '.join(KINDS)}; for anything else write a function: {{function: my.py:rows}}"
        raise UsageError(f"cannot read prompts from a '{path.suffix}' file", str(path), fix)
    return (Raw(value, label, place) for value, place in read(path))


def jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    """One JSON object or text per line. All of the file is checked before the first row is given."""
    rows, wrong = [], []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((strict(line), f"{path}:{number}"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            wrong.append(f"{path}:{number}  {told(error)}")
    if wrong:
        more = f"\nand {len(wrong) - MOST_ERRORS} more lines" if len(wrong) > MOST_ERRORS else ""
        raise UsageError("\n".join(wrong[:MOST_ERRORS]) + more, fix="Each line must be one JSON object in UTF-8.")
    return iter(rows)


def strict(line: bytes) -> Any:
    if b"\0" in line:
        raise ValueError("a NUL byte: the file was cut by a crash, or is UTF-16")
    value = json.loads(line.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(value, dict | str):
        raise ValueError(f"a {type(value).__name__} where an object was expected")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key '{next(name for name in names if names.count(name) > 1)}' stands there twice")
    return found


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def told(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start} of the line"
    return str(error)


def parquet(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UsageError(f"not a Parquet file: {error}", str(path)) from None
    return ((row, f"{path} row {number}") for number, row in enumerate(frame.iter_rows(named=True), 1))


def table(path: Path) -> Iterator[tuple[Any, str]]:
    """A CSV file with a header. Values stay text ('007' is not 7); an empty field is null."""
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise UsageError(
                "a NUL byte: the file was cut by a crash, or is UTF-16",
                f"{path}:{text[: text.index(chr(0))].count(chr(10)) + 1}",
            )
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UsageError("two columns have the same name", f"{path}:1")
        return iter([(record(header, fields, place), place) for fields, place in fields_of(reader, path)])
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UsageError(f"not UTF-8: {error.reason}", f"{path}:{line}", "Save the file as UTF-8.") from None
    except csv.Error as error:
        raise UsageError(f"not CSV: {error}", f"{path}:{reader.line_num}") from None


def fields_of(reader: Any, path: Path) -> Iterator[tuple[list[str], str]]:
    return ((fields, f"{path}:{reader.line_num}") for fields in reader if fields)


def record(header: list[str], fields: list[str], place: str) -> dict[str, str | None]:
    if len(fields) != len(header):
        raise UsageError(f"{len(fields)} fields where the header has {len(header)}", place, "A comma in a text needs quotes.")
    return {name: value or None for name, value in zip(header, fields, strict=True)}


# ------------------------------------------------------------------------------------------------------------------ hub


def from_hub(spec: Mapping[str, Any], split_name: str) -> Iterator[Raw]:
    """Rows of a data set on the hub, from the local cache where it is there; the split is the recipe's own name by default."""
    name, split = spec["hub"], spec.get("split", split_name)
    where = f"prompts.{split_name} (hub: {name})"
    online = reachable()
    datasets = library("datasets", "cpu", offline=not online)
    try:
        found = datasets.load_dataset(name, spec.get("subset"), split=split, revision=spec.get("revision"))
    except (ConnectionError, OSError) as error:
        raise UsageError(f"the hub cannot be reached: {first_line(error)}", where, OFFLINE if not online else ONLINE) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(first_line(error), where, ONLINE if online else OFFLINE) from None
    label = " ".join(str(part) for part in (name, spec.get("subset"), split, spec.get("revision")) if part)
    return (Raw(row, label, f"{where} row {number}") for number, row in enumerate(found, 1))


OFFLINE = """There is no network here, and the local cache does not have this data set.
Fetch it where there is one and copy the folder: HF_HOME=/path selfkd lint RECIPE, then set HF_HOME here.
Or use a local file: {file: my.jsonl, prompt: question, answer: answer}"""

ONLINE = """Check the name, `subset`, `split` and `revision`; a private or gated data set needs HF_TOKEN in the environment.
Or use a local file: {file: my.jsonl, prompt: question, answer: answer}"""


def reachable() -> bool:
    """True where the hub answers within a few seconds, or a proxy stands between and we cannot know."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), REACH_SECONDS).close()
    except OSError:
        return False
    return True


def library(name: str, extra: str, offline: bool = False) -> Any:
    """Import an optional package. `offline` reaches the hub client only where it was not imported before."""
    before = os.environ.get("HF_HUB_OFFLINE")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"this recipe needs the package '{name}': {error}", fix=f"pip install 'selfkd[{extra}]'") from None
    finally:
        if offline:
            os.environ.pop("HF_HUB_OFFLINE")
            os.environ.update({"HF_HUB_OFFLINE": before} if before is not None else {})


# ------------------------------------------------------------------------------------------------------------------ gym


def from_gym(options: Mapping[str, Any], split_name: str) -> Iterator[Raw]:
    """Problems of a reasoning-gym task: 500 of them, and a seed of its own for each split, unless the recipe says otherwise.

    Meta gets the question and all that the task's scorer needs (reward/gym.py).
    """
    if not isinstance(options, Mapping) or not isinstance(options.get("task"), str):
        raise UsageError("reasoning_gym needs a task", f"prompts.{split_name}", "reasoning_gym: {task: chain_sum, size: 500}")
    chosen = {"size": GYM_SIZE, "seed": gym_seed(split_name), **options}
    task, where = chosen.pop("task"), f"prompts.{split_name} (reasoning_gym: {options['task']})"
    factory = library("reasoning_gym.factory", "rewards")
    library("reasoning_gym", "rewards")
    if task not in factory.DATASETS:
        raise UsageError(f"no task '{task}'.{did_you_mean(task, factory.DATASETS)}", where)
    known = [field.name for field in dataclasses.fields(factory.DATASETS[task][1])]
    unknown = [f"no option '{name}'.{did_you_mean(name, known)}" for name in chosen if name not in known]
    if unknown:
        raise UsageError(" ".join(unknown), where, f"Options of this task: {', '.join(known)}")
    try:
        entries = factory.create_dataset(task, **chosen)
        return iter([Raw(gym_row(entry), f"reasoning_gym {task}", f"{where} row {n}") for n, entry in enumerate(entries, 1)])
    except (AssertionError, ValueError, TypeError) as error:
        raise UsageError(f"reasoning-gym refuses these options: {first_line(error)}", where) from None


def gym_seed(split_name: str) -> int:
    """Different for each split, so that train, dev and test differ unasked; small tasks repeat themselves all the same."""
    return digest.seed("reasoning_gym", split_name) % (1 << 31)


def gym_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": entry["question"], "answer": entry["answer"], "question": entry["question"], "meta": entry["metadata"]}
