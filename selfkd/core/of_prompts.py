"""What an expression may say beside the columns of its table: `prompt.level`, and `mean(correct)` over all samples of the prompt.

Both are rewritten into columns of those very names, which the views fill before the expression is computed. Nothing here knows a step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import polars as pl

from selfkd.core.pool import Pool

PREFIX = "prompt."
FIXED: dict[str, pl.DataType] = {"text": pl.String(), "answer": pl.String()}  # these win over columns of the same name
NUMBER = pl.Float64()
WHOLE = 1 << 63
DISTINCT = "distinct"  # count(distinct …), which is written no other way

# One value per prompt. Values are sorted first: left to itself, the last digit of a sum depends on the number of threads.
FUNCTIONS: dict[str, Callable[[pl.Expr], pl.Expr]] = {
    "mean": lambda values: values.cast(pl.Float64).sort().mean(),
    "std": lambda values: values.cast(pl.Float64).sort().std(),  # of a sample: divided by n - 1, null of a single one
    "sum": lambda values: values.cast(pl.Float64).sort().sum(),
    "max": lambda values: values.max(),
    "min": lambda values: values.min(),
    "count": lambda values: values.count(),
    DISTINCT: lambda values: values.drop_nulls().n_unique(),
}
SAME = {"avg": "mean", "stddev": "std"}  # SQL's own words
_TOKEN = re.compile(
    r"(?P<text>'(?:[^']|'')*')"
    r"|(?<![\w.])prompt\s*\.\s*(?P<column>[A-Za-z_]\w*|\"(?:[^\"]|\"\")+\")"
    r"|(?P<quoted>\"(?:[^\"]|\"\")*\")"
    rf"|(?<![\w.])(?P<function>{'|'.join(name for name in [*FUNCTIONS, *SAME] if name != DISTINCT)})\s*\((?P<distinct>\s*distinct\b)?"
    r"|(?P<bracket>[()])",
    re.IGNORECASE,
)
_WINDOW = re.compile(r"\s*over\s*\(", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """One function over the samples of a prompt; `inside` is an expression over a sample, and `*` each sample itself."""

    function: str
    inside: str

    @property
    def column(self) -> str:
        return f"count(distinct {self.inside})" if self.function == DISTINCT else f"{self.function}({self.inside})"


@dataclass(frozen=True)
class Words:
    """An expression as SQL over plain columns, and which of these are to be made first."""

    sql: str
    columns: frozenset[str] = frozenset()  # of the prompt, by their own names
    calls: frozenset[Call] = field(default=frozenset())


@cache
def words(text: str) -> Words:
    """Return an expression with `prompt.level` and `mean(correct)` as quoted columns of these names; texts in quotes stay as they are."""
    parts: list[str] = []
    columns: set[str] = set()
    calls: set[Call] = set()
    at = 0
    while found := _TOKEN.search(text, at):
        parts.append(text[at : found.start()])
        at = found.end()
        if found["column"] and found[0].startswith("prompt"):
            name = found["column"].strip('"').replace('""', '"')
            columns.add(name)
            parts.append(_quoted(PREFIX + name))
        elif found["function"] and (end := _end_of_call(text, at)) and not _WINDOW.match(text, end):
            call = _call(found, text[at : end - 1])
            calls.add(call)
            parts.append(_quoted(call.column))
            at = end
        else:
            parts.append(found[0])
    return Words("".join([*parts, text[at:]]), frozenset(columns), frozenset(calls))


def _call(found: re.Match[str], inside: str) -> Call:
    name = found["function"].lower()
    function = SAME.get(name, name)
    distinct = bool(found["distinct"]) and function == "count"
    return Call(DISTINCT if distinct else function, inside.strip())


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _end_of_call(text: str, at: int) -> int:
    """Return where a call ends whose bracket was opened just before; 0 where it does not."""
    depth = 1
    for found in _TOKEN.finditer(text, at):
        opened = found["bracket"] == "(" or bool(found["function"])
        depth += 1 if opened else -1 if found["bracket"] else 0
        if not depth:
            return found.end()
    return 0


# ---- the columns of prompts ----


def kinds(metas: Iterable[str | None]) -> dict[str, pl.DataType]:
    """Return the type of each column of these prompts, as expressions see it.

    Whole numbers, numbers, truth values and texts are what they are. A column that mixes them, or holds lists, is text.

    >>> kinds(['{"level": 3, "by": "a"}', '{"level": 2.5, "by": 7}', None])
    {'level': Float64, 'by': String}
    """
    found: dict[str, set[str]] = {}
    for text in metas:
        for name, value in json.loads(text or "{}").items():
            found.setdefault(name, set()).update({_kind(value)} - {""})
    return {name: _joined(some) for name, some in found.items()}


def _kind(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int):
        return "whole" if -WHOLE <= value < WHOLE else "number"
    return "number" if isinstance(value, float) else "text"


def _joined(found: set[str]) -> pl.DataType:
    if found == {"truth"}:
        return pl.Boolean()
    if found == {"whole"}:
        return pl.Int64()
    return NUMBER if found and found <= {"whole", "number"} else pl.String()


def known_kinds(pool: Pool) -> Mapping[str, pl.DataType] | None:
    """Return the types of the prompts' columns; None where nobody has read the prompts, as when a recipe is looked at without its files."""
    if pool.prompt_columns is not None:
        return pool.prompt_columns
    if not pool.files.get("prompts"):
        return None
    return kinds(pool.scan("prompts").select("meta").collect()["meta"])


def with_columns(table: pl.DataFrame, pool: Pool, names: Iterable[str], key: str) -> pl.DataFrame:
    """Return `table` with the columns of its prompts, whose ids stand in `key`; a name that no prompt has gets none."""
    wanted = sorted(set(names))
    if not wanted:
        return table
    known = known_kinds(pool)
    kept = {name: FIXED.get(name) or (NUMBER if known is None else known[name]) for name in wanted if _is_there(name, known)}
    source = pool.scan("prompts").filter(pl.col("id").is_in(table[key].unique().implode())).collect()
    rows = [[row["id"], *(_value(row, name, kind) for name, kind in kept.items())] for row in source.iter_rows(named=True)]
    schema: dict[str, Any] = {key: pl.String, **{PREFIX + name: kind for name, kind in kept.items()}}
    return table.join(pl.DataFrame(rows, schema=schema, orient="row"), on=key, how="left", maintain_order="left")


def _is_there(name: str, known: Mapping[str, pl.DataType] | None) -> bool:
    return name in FIXED or known is None or name in known


def _value(row: Mapping[str, Any], name: str, kind: pl.DataType) -> Any:
    if name == "answer":
        return row["answer"]
    if name == "text":
        said = (message["content"] for message in reversed(row["messages"]) if message["role"] == "user")
        return next(said, "")
    value = json.loads(row["meta"] or "{}").get(name)
    if value is None or kind != pl.String:
        return float(value) if value is not None and kind == pl.Float64 else value
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


# ---- numbers over the samples of a prompt ----


def needed(*texts: str | None) -> Iterator[Words]:
    """Yield the words of expressions, and of what their calls are given."""
    for text in texts:
        if text:
            found = words(text)
            yield found
            yield from needed(*(call.inside for call in found.calls if call.inside != "*"))


def columns_in(*texts: str | None) -> set[str]:
    """Return the columns of prompts that these expressions name."""
    return {name for one in needed(*texts) for name in one.columns}


def calls_in(*texts: str | None) -> list[Call]:
    """Return the calls of these expressions, in one order whatever theirs is."""
    found = {call for text in texts if text for call in words(text).calls}
    return sorted(found, key=lambda call: call.column)
