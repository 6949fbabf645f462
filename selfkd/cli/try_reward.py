"""Trying a reward on a few rows of a file, without a model and without a run."""

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

BATCH = 32  # small, so that slow rows at the end do not leave a core idle
FIELDS = ("prompt", "completion", "answer", "meta")
SHAPE = 'A row looks like {"prompt": "2 + 2 = ?", "completion": "It is 4.", "answer": "4"}; other columns are the reward\'s by name.'


def read_rows(path: Path, n: int | None = None) -> list[dict[str, Any]]:
    """The first `n` rows (None: all) of a JSONL file in the form rewards take; UsageError names file and line of a bad one.

    Rows with the same prompt form a group, as the samples of one prompt do.
    """
    if not path.is_file():
        raise UsageError("no such file", str(path), SHAPE)
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and (n is None or len(rows) < n):
                rows.append({**_row(line, f"{path}:{number}"), "line": number})
    if not rows:
        raise UsageError("no rows in this file", str(path), SHAPE)
    return sorted(rows, key=lambda row: str(row["group"]))  # sorted() is stable: a group's samples become neighbours


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UsageError(f"is not JSON: {error}", where, SHAPE) from None
    if not isinstance(given, dict) or not isinstance(given.get("completion"), str):
        raise UsageError("a row needs a text column 'completion'", where, SHAPE)
    meta = {**(given.get("meta") or {}), **{name: value for name, value in given.items() if name not in FIELDS}}
    answer = given.get("answer")
    prompt = str(given.get("prompt", ""))
    return {
        "group": prompt,
        "prompt": prompt,
        "messages": [{"role": "user", "content": prompt}],
        "completion": given["completion"],
        "answer": answer if answer is None else str(answer),
        "meta": meta,
        "sample": {},
        "token_ids": [],
    }


def print_scored(rows: Sequence[dict[str, Any]], results: Sequence[Result], name: str, to: Console) -> None:
    """One panel per row: prompt, answer, completion, and the score with its reason; a failure is said, never a zero."""
    for row, (value, why) in zip(rows, results, strict=True):
        body = Text("prompt: ", "dim").append(row["prompt"], "default")
        if row["answer"] is not None:
            body.append("\nanswer: ", "dim").append(row["answer"], "default")
        body.append("\n\n" + row["completion"] + "\n\n", "default")
        body.append(
            f"{name} {value:g}" if value is not None else f"{name} unscored", "bold green" if value is not None else "bold red"
        )
        to.print(Panel(body.append(f"   {why}" if why else "", "dim"), border_style="dim"))
    print_summary(results, to)


def print_summary(results: Sequence[Result], to: Console, more: str = "") -> None:
    scored = [value for value, _ in results if value is not None]
    mean = f", mean {sum(scored) / len(scored):.3g}" if scored else ""
    to.print(f"{len(scored)} of {len(results)} scored{mean}{more}")


def score_all(function: Function, rows: Sequence[dict[str, Any]], out: Path, timeout: float = 60.0) -> list[Result]:
    """Score every row in worker processes, one a core, and write {"line", "value", "why"} for each, in the file's order."""
    results = [result for batch in spread(function, cut(rows, BATCH), usable_cores(), timeout) for result in batch]
    with out.open("w", encoding="utf-8") as lines:
        for row, (value, why) in sorted(zip(rows, results, strict=True), key=lambda pair: pair[0]["line"]):
            lines.write(json.dumps({"line": row["line"], "value": value, "why": why}, ensure_ascii=False) + "\n")
    return results
