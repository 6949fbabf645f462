"""A reward tried on the rows of a file, without a model and without a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from selfkd.core.hardware import usable_cores
from selfkd.core.pool import Function
from selfkd.errors import UsageError
from selfkd.rewards.contract import Result
from selfkd.rewards.pool import cut, spread

BATCH_ROWS = 32  # small, so that slow rows at the end do not leave a core idle
OWN_COLUMNS = ("prompt", "completion", "answer", "meta")  # a reward finds every other column in `meta`, or by its name
ROW_FORM = 'A row looks like {"prompt": "2 + 2 = ?", "completion": "It is 4.", "answer": "4"}; other columns are the reward\'s by name.'


def read_rows(path: Path, n: int | None = None) -> list[dict[str, Any]]:
    """Return the first `n` rows (None: all) of a JSONL file in the form rewards take; UsageError names file and line of a bad one.

    Rows with the same prompt form a group, as the samples of one prompt do.
    """
    if not path.is_file():
        raise UsageError("no such file", str(path), ROW_FORM)
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if n is not None and len(rows) >= n:
                break
            if line.strip():
                rows.append({**_row(line, f"{path}:{number}"), "line": number})
    if not rows:
        raise UsageError("no rows in this file", str(path), ROW_FORM)
    return sorted(rows, key=lambda row: str(row["group"]))  # sorted() is stable: a group's samples become neighbours


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UsageError(f"is not JSON: {error}", where, ROW_FORM) from None
    if not isinstance(given, dict) or not isinstance(given.get("completion"), str):
        raise UsageError("a row needs a text column 'completion'", where, ROW_FORM)
    others = {name: value for name, value in given.items() if name not in OWN_COLUMNS}
    prompt, answer = str(given.get("prompt", "")), given.get("answer")
    return {
        "group": prompt,
        "prompt": prompt,
        "messages": [{"role": "user", "content": prompt}],
        "completion": given["completion"],
        "answer": None if answer is None else str(answer),
        "meta": {**(given.get("meta") or {}), **others},
        "sample": {},
        "token_ids": [],
    }


def print_scored(rows: Sequence[dict[str, Any]], results: Sequence[Result], name: str, to: Console) -> None:
    """Print one panel per row: prompt, answer, completion, and the score with its reason; a row without a score is no zero."""
    for row, (value, why) in zip(rows, results, strict=True):
        body = Text("prompt: ", "dim").append(row["prompt"], "default")
        if row["answer"] is not None:
            body.append("\nanswer: ", "dim").append(row["answer"], "default")
        body.append("\n\n" + row["completion"] + "\n\n", "default")
        if value is None:
            body.append(f"{name} unscored", "bold red")
        else:
            body.append(f"{name} {value:g}", "bold green")
        to.print(Panel(body.append(f"   {why}" if why else "", "dim"), border_style="dim"))
    print_summary(results, to)


def print_summary(results: Sequence[Result], to: Console, more: str = "") -> None:
    """Print how many rows were scored, and their mean."""
    scored = [value for value, _ in results if value is not None]
    mean = f", mean {sum(scored) / len(scored):.3g}" if scored else ""
    to.print(f"{len(scored)} of {len(results)} scored{mean}{more}")


def score_all(function: Function, rows: Sequence[dict[str, Any]], out: Path, timeout: float = 60.0) -> list[Result]:
    """Score every row in worker processes, one per core, and write {"line", "value", "why"} for each, in the file's order."""
    batches = spread(function, cut(rows, BATCH_ROWS), usable_cores(), timeout)
    results = [result for batch in batches for result in batch]
    with out.open("w", encoding="utf-8") as lines:
        for row, (value, why) in sorted(zip(rows, results, strict=True), key=lambda pair: pair[0]["line"]):
            lines.write(json.dumps({"line": row["line"], "value": value, "why": why}, ensure_ascii=False) + "\n")
    return results
