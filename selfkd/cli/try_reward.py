"""A reward tried on the rows of a file, without a model and without a run.

Rows are read as a run reads prompts, and scored as a run scores samples: in worker processes, from a copy of the reward's file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from selfkd.core.hardware import usable_cores
from selfkd.core.pool import Function
from selfkd.core.wording import counted
from selfkd.errors import UsageError
from selfkd.prompts.read import check_text, make_prompt
from selfkd.prompts.rows import rows_of_file
from selfkd.prompts.sources import Raw
from selfkd.prompts.templates import text_of
from selfkd.rewards.advice import way_out
from selfkd.rewards.check import score_batch
from selfkd.rewards.contract import Result, failed, told
from selfkd.rewards.pool import cut, spread

BATCH_ROWS = 32  # small, so that slow rows at the end do not leave a core idle
TIMEOUT = 60.0  # seconds of one call
ROW_FORM = 'A row looks like {"prompt": "2 + 2 = ?", "completion": "It is 4.", "answer": "4"}; other columns are the reward\'s by name.'


def read_rows(path: Path, n: int | None = None) -> list[dict[str, Any]]:
    """Return the first `n` rows (None: all) of a file in the form rewards take; UsageError names the place of a bad one.

    Prompt, answer and meta are read as a run reads them. Rows with the same prompt and answer form a group, as the samples of
    one prompt do, and stand together.
    """
    if n is not None and n < 1:
        raise UsageError("-n must be 1 or more", f"-n {n}")
    if not path.is_file():
        raise UsageError("no such file", str(path), ROW_FORM)
    rows = [_row(value, place) for value, place in islice(rows_of_file(path), n)]
    if not rows:
        raise UsageError("no rows in this file", str(path), ROW_FORM)
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(row["group"], len(first))
    return sorted(rows, key=lambda row: first[row["group"]])


def _row(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError("a row needs a column 'completion'", place, ROW_FORM)
    prompt = _prompt({name: cell for name, cell in value.items() if name not in ("completion", "completion_ids")}, place)
    number = re.search(r"[0-9]+$", place)
    if "completion" not in value and prompt["answer"] is None:
        raise UsageError("a row needs a column 'completion', or a gold answer to try in its place", place, ROW_FORM)
    completion, gold = _completion(value.get("completion", prompt["answer"]), place), "completion" not in value
    return reward_row(prompt, completion, int(number[0]) if number else 0, gold, value.get("completion_ids"))


def reward_row(prompt: Mapping[str, Any], completion: str, line: int, gold: bool = False, ids: Any = None) -> dict[str, Any]:
    """Return a row in the form rewards take, of a prompt's messages, answer and meta. `gold`: its answer stands for a completion."""
    return {
        "line": line,
        "group": json.dumps([prompt["messages"], prompt["answer"]]),
        "prompt": text_of(prompt["messages"]),
        "messages": prompt["messages"],
        "completion": completion,
        "gold": gold,
        "answer": prompt["answer"],
        "meta": prompt["meta"],
        "sample": {},
        "token_ids": ids,
    }


def _prompt(columns: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return messages, answer and meta as a run reads them. Here a row may have no prompt: not every reward looks at it."""
    try:
        return make_prompt({}, Raw(columns, "", place), None)
    except UsageError as error:
        if not error.what.startswith("no column"):
            raise
    return {**make_prompt({}, Raw({**columns, "prompt": "none"}, "", place), None), "messages": []}


def _completion(value: Any, place: str) -> str:
    """Return the text of a completion, which TRL writes as a list of one message where prompts are conversations."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping) and value[0].get("role") == "assistant":
        value = value[0].get("content")
    if not isinstance(value, str):
        raise UsageError("the completion must be text, or a list of one message of the assistant", place, ROW_FORM)
    check_text(value, place)
    return value


def stand_ins(rows: Sequence[dict[str, Any]]) -> str:
    """Return that gold answers were tried, where rows have no completion; '' where all have one."""
    count = sum(row["gold"] for row in rows)
    return f"{counted(count, 'row')} without a completion: the gold answer is tried, which should score well." if count else ""


def score(function: Function, rows: Sequence[dict[str, Any]], prints: bool = False) -> list[Result]:
    """Return (value, why) of each row, from worker processes, one per core; with SELFKD_DEBUG=1 from this one, for a debugger.

    `prints` shows what the function prints, on standard error.
    """
    if os.environ.get("SELFKD_DEBUG") == "1":
        return score_batch(function, rows)
    batches = spread(function, cut(rows, BATCH_ROWS), usable_cores(), TIMEOUT, prints=prints)
    return [result for batch in batches for result in batch]


def failure(function: Function, results: Sequence[Result]) -> str:
    """Return how many rows the function failed on, why, and what to do; "" where it scored or abstained on all of them."""
    reasons = [why for value, why in results if failed(value, why)]
    if not reasons:
        return ""
    said = f"{len(reasons)} of {len(results)} rows could not be scored. First: {told(function.name, reasons[0])}"
    if os.environ.get("SELFKD_DEBUG") == "1" and (trace := getattr(reasons[0], "trace", "")):
        said += f"\n{trace}"
    advice = way_out(reasons[0], str(function.path), function.environment)
    return said + "".join(f"\n    {line}" for line in advice.splitlines())


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
        at = getattr(why, "at", "")
        to.print(Panel(body.append(f"   {at}: {why}" if at else f"   {why}" if why else "", "dim"), border_style="dim"))
    print_summary(results, to)


def print_summary(results: Sequence[Result], to: Console, more: str = "") -> None:
    """Print how many rows were scored, and their mean."""
    scored = [value for value, _ in results if value is not None]
    mean = f", mean {sum(scored) / len(scored):.3g}" if scored else ""
    to.print(f"{len(scored)} of {len(results)} scored{mean}{more}")


def as_data(rows: Sequence[dict[str, Any]], results: Sequence[Result], name: str, failed: str) -> dict[str, Any]:
    """Return what was scored for a program: each row's line, completion, value and reason, and why the function failed, if it did."""
    scored = [
        {"line": row["line"], "completion": row["completion"], "gold": row["gold"], "value": value, "why": why or ""}
        for row, (value, why) in zip(rows, results, strict=True)
    ]
    return {"function": name, "rows": scored, "failed": failed}


def check_place(out: Path) -> None:
    """Raise UsageError where the scores could not be written, before anything is scored."""
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise UsageError(what, str(out), "--out names a file in a folder that exists.")


def write_scores(rows: Sequence[dict[str, Any]], results: Sequence[Result], out: Path) -> None:
    """Write {"line", "value", "why"} for each row, in the file's order."""
    with out.open("w", encoding="utf-8") as lines:
        for row, (value, why) in sorted(zip(rows, results, strict=True), key=lambda pair: pair[0]["line"]):
            lines.write(json.dumps({"line": row["line"], "value": value, "why": why}, ensure_ascii=False) + "\n")
