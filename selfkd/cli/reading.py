"""Commands that read what a run holds, row by row. A docstring here is the text of `selfkd help COMMAND`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfkd.chain.paths import find_run
from selfkd.cli import answers, commands
from selfkd.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from selfkd.report.logs import Line
    from selfkd.report.rows import Found


def show(
    run: Path,
    index: int | None,
    step: str | None,
    where: str | None,
    n: int,
    training_rows: bool,
    as_prompted: bool,
    tokens: bool,
    ids: bool,
    as_json: bool = False,
) -> int:
    """Show rows: what was asked, answered, scored, kept; with --as-prompted what the model saw of it, with --tokens what it learned."""
    from selfkd.report import rows
    from selfkd.report.tables import console

    if ids and not (as_prompted or tokens):
        raise UsageError("is for --as-prompted and --tokens", "--ids", "Write one of them too, or leave it out.")
    if tokens and not training_rows:
        raise UsageError("is for --training-rows", "--tokens", "Write both; of samples, what the model saw: --as-prompted")
    find, folder = rows.training_rows if training_rows else rows.samples, find_run(run, commands.RUNS)
    found = find(folder, index, step, where, n, as_prompted or tokens)
    if as_json:
        return answers.told("show", _data(found, folder, as_prompted, tokens))
    if as_prompted:
        from selfkd.report.as_prompted import print_prompted, tokenizer_of

        print_prompted(found, tokenizer_of(folder), ids, console())
    if tokens:
        from selfkd.report.as_prompted import tokenizer_of
        from selfkd.report.learned_text import print_learned

        print_learned(found, tokenizer_of(folder), folder, ids, console())
    if as_prompted or tokens:
        return 0
    from selfkd.report.panels import print_rows

    print_rows(found, console())
    return 0


def trace(run: Path, id: str, index: int | None, n: int, as_json: bool = False) -> int:
    """Trace a training row or a checkpoint back to samples, judgments, prompts, scores and code, and forward to what came of it."""
    from selfkd.report.tables import console
    from selfkd.report.trace import trace as traced
    from selfkd.report.tree import print_trace

    found = traced(find_run(run, commands.RUNS), id, index)
    if as_json:
        return answers.told("trace", {**answers.plain(found), "unproved": found.doubts()})
    print_trace(found, console(), n)
    return 0


def _data(found: Found, folder: Path, as_prompted: bool, tokens: bool) -> dict[str, Any]:
    """Return the rows that were found for a program: each with all columns, a sample with why it has no score, and its tokens on request."""
    rows = found.first.to_dicts()
    for row in rows if found.table == "samples" else ():
        row["unscored"] = {name: why for (sample, name), why in found.reasons.items() if sample == row["id"]}
    if as_prompted:
        from selfkd.report.as_prompted import shown, tokenizer_of

        rows = [{**row, "prompted": one} for row, one in zip(rows, shown(found, tokenizer_of(folder)), strict=True)]
    if tokens:
        from selfkd.report.as_prompted import tokenizer_of
        from selfkd.report.learned_text import as_data

        rows = [{**row, "tokens": one} for row, one in zip(rows, as_data(found, tokenizer_of(folder), folder), strict=True)]
    about = {name: getattr(found, name) for name in ("table", "title", "index", "total", "matched", "scores")}
    return {**about, "rows": rows}


def logs(run: Path, attempt: int | None, name: str | None, n: int | None, follow: bool, as_json: bool = False) -> int:
    """Show what happened in the newest attempt at a run, and what its driver, engines and ranks said."""
    from selfkd.report import logs as kept
    from selfkd.report.tables import console

    folder, to = find_run(run, commands.RUNS), console()
    if follow and (attempt is not None or n is not None):
        raise UsageError("follows the newest attempt from its beginning", "--follow", "Leave out --attempt and -n.")
    if follow:
        for line in kept.follow(folder, name):
            answers.told("logs", line) if as_json else _print_line(line, to)
        return 0
    found = kept.of(folder, attempt)
    lines = kept.read(found, name, n)
    if as_json:
        return answers.told("logs", {"attempt": found.attempt, "attempts": found.attempts, "logs": found.files, "lines": lines})
    for line in lines:
        _print_line(line, to)
    if others := found.others(found.chosen(name)):
        to.print(f"Other logs of attempt {found.attempt} (--of NAME): {others}", style="dim", markup=False, soft_wrap=True)
    return 0


def _print_line(line: Line, to: Console) -> None:
    to.print(line.text, style="yellow" if line.failed else "", markup=False, soft_wrap=True)
