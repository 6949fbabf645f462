"""Commands that read what a run holds, row by row. A docstring here is the text of `selfkd help COMMAND`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfkd.chain.paths import find_run
from selfkd.cli import answers, commands
from selfkd.errors import UsageError

if TYPE_CHECKING:
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
