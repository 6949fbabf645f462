"""A page as one file: HTML that needs no network and no JavaScript, or Markdown. Lays out what the modules beside it found.

Whatever a model, a prompt or a recipe wrote is text: the templates escape it, and `clean` shows the signs that would act.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

import selfkd
from selfkd.core.wording import counted
from selfkd.errors import UsageError
from selfkd.report import adapters, comparison, model_card, sweep_table, sweeps, tables
from selfkd.report.compare import compare
from selfkd.report.page import beneath, diagnostics, drawn, examples, story
from selfkd.report.page.noted import Diagnostic
from selfkd.report.page.opened import Opened, open_run
from selfkd.report.page.text import beginning, clean, shortened

GENERATOR = '<meta name="generator" content="selfkd report">'  # by which a page of ours is known
GENERATOR_MD = "<!-- selfkd report -->"
COLUMNS = 10  # rounds of a table of one diagnostic, beside which a chart has all of them
LINE = "\n"
MARKS = re.compile(r"([\\`*_\[\]|])")  # of Markdown
Commands = Callable[[Path], Mapping[str, str]]  # what may be typed about a run: {what it does: the command}


def of_runs(folders: Sequence[Path], commands: Commands, html: bool = True) -> str:
    """Return the page of a run, or of several side by side; UsageError where one of them is none."""
    runs = [open_run(folder) for folder in folders]
    names = [run.state.name for run in runs]
    names = [str(run.paths.folder) if names.count(name) > 1 else name for name, run in zip(names, runs, strict=True)]
    parts = [
        {"name": name, **run_part(run, commands, html, f"r{at}-")}
        for at, (name, run) in enumerate(zip(names, runs, strict=True), 1)
    ]
    return _page("runs", html, title=" · ".join(names), runs=parts, together=_together(runs) if len(runs) > 1 else None)


def of_sweep(place: Path, commands: Commands, html: bool = True) -> str:
    """Return the page of a sweep: its arms beside their controls, those too that have no figure."""
    found = sweeps.report(place)
    chart = drawn.arms(found) if html else None
    cells, legend = sweep_table.cells(found), sweep_table.legend(found)
    return _page(
        "sweep", html, title=found.name, found=found, chart=chart, cells=cells, legend=legend, commands=commands(place)
    )


def run_part(run: Opened, commands: Commands, html: bool, prefix: str) -> dict[str, Any]:
    """Return all that the templates say of one run."""
    ledger = examples.ledger(run, run.shown)
    controls, funnel = story.controls(run), story.funnel(run)
    dropped_in, dropped = examples.dropped(run, max(run.shown, 1))
    return {
        "id": prefix,
        "run": run,
        "state": run.state,
        "headline": story.headline(run),
        "ended": story.ended(run),
        "best": run.name_of(run.best),
        "shown": run.name_of(run.shown),
        "rounds": [_round_row(run, index) for index in range(len(run.rounds))],
        "accuracy": drawn.accuracy(run, controls) if html else None,
        "controls": controls,
        "alarms": story.alarms(run),
        "notes": _notes(run),
        "suites": story.suites(run),
        "still_right": story.still_right(ledger),
        "funnel": funnel,
        "funnel_chart": drawn.samples(run, funnel) if html and funnel else None,
        "ledger": ledger,
        "rose": examples.moved(run, run.shown, ledger.rose) if ledger else [],
        "fell": examples.moved(run, run.shown, ledger.fell) if ledger else [],
        "dropped_in": dropped_in,
        "dropped": dropped,
        "cost": story.cost(run),
        "commands": commands(run.paths.folder),
        "groups": [(group, [_figure(run, one, html) for one in group.diagnostics]) for group in diagnostics.groups(run)],
        "galleries": examples.galleries(run) if html else [],
        "training": beneath.training(run) if html else None,
        "recipe": beneath.recipe_text(run),
        "in_force": model_card.recipe_text(run.recipe),
        "changes": beneath.changes(run),
        "lineage": beneath.lineage(run),
    }


def _notes(run: Opened) -> list[str]:
    """Return what updates said of themselves."""
    checked = [f"{run.name_of(one.index)}: {said}" for one in run.rounds for said in (*one.checked, *one.apart)]
    return [*checked, *adapters.lines([(one.index, one.adapters) for one in run.rounds])]


def _round_row(run: Opened, at: int) -> dict[str, str]:
    one = run.rounds[at]
    found = run.main.get(one.index)
    share = f"{one.kept} of {one.samples}" if one.samples and one.kept is not None else ""
    return {
        "name": run.name_of(one.index) + ("" if one.accepted else " (rolled back)"),
        "value": tables.mean_text(found, run.percent) if found else "",
        "change": tables.against_base(found, run.percent) if found else "",
        "kept": share,
        "tokens": tables.count(one.tokens),
        "time": tables.span(sum(one.seconds.values())),
    }


def _figure(run: Opened, one: Diagnostic, html: bool) -> dict[str, Any]:
    known = sorted(one.values.items())
    last = next(((index, value) for index, value in reversed(known) if value is not None), None)
    shown = examples.some_of([index for index, _ in known], run.best, COLUMNS) if known else set()
    return {
        "one": one,
        "last": (run.name_of(last[0]), tables.number_text(last[1], one.percent)) if last else None,
        "chart": drawn.diagnostic(run, one) if html else None,
        "cells": [(run.name_of(index), _cell(one, index)) for index, _ in known if index in shown],
        "left_out": len(known) - len([index for index, _ in known if index in shown]),
    }


def _cell(one: Diagnostic, index: int) -> str:
    value, between = one.values[index], one.bounds.get(index)
    if value is None:
        return "unknown"
    bounds = (
        f" [{tables.number_text(between[0], one.percent)}, {tables.number_text(between[1], one.percent)}]" if between else ""
    )
    return tables.number_text(value, one.percent) + bounds


def _together(runs: Sequence[Opened]) -> dict[str, Any]:
    """Return runs side by side; where they cannot be compared, why."""
    try:
        found = compare([run.paths.folder for run in runs])
    except UsageError as error:
        return {"why": str(error)}
    return {
        "found": found,
        "cells": comparison.cells(found),
        "legend": comparison.legend(found),
        "chart": drawn.compared(found),
        "paths": drawn.side_by_side(runs, found.metric),
    }


# ---- templates ----


@cache
def _environment(html: bool) -> jinja2.Environment:
    folder = resources.files(__package__) / "templates"
    files = {one.name: one.read_text("utf-8") for one in folder.iterdir() if one.is_file()}
    made = jinja2.Environment(
        loader=jinja2.DictLoader(files),
        autoescape=html,
        finalize=clean,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "shortened": shortened,
        "beginning": beginning,
        "span": tables.span,
        "tokens": tables.count,
        "bytes": bytes_text,
        "number": number,
    }
    made.filters |= {"cell": markdown_cell, "counted": counted}
    return made


def _page(kind: str, html: bool, **said: Any) -> str:
    name = f"{kind}.{'html' if html else 'md'}"
    text = _environment(html).get_template(name).render(version=selfkd.__version__, generator=GENERATOR, **said)
    return f"{'' if html else f'{GENERATOR_MD}{LINE}'}{text.strip()}{LINE}"


def bytes_text(size: int) -> str:
    """Return 512 B, 3.1 MB, 2.40 GB.

    >>> bytes_text(3_100_000), bytes_text(2_400_000_000)
    ('3.1 MB', '2.40 GB')
    """
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.4g}"


def markdown_cell(text: object) -> str:
    """Return text that stays in its cell and its line, and is no markup there: no link or image of a model's is followed.

    >>> markdown_cell("a|b <i> ![x](y)")
    'a\\\\|b &lt;i&gt; !\\\\[x\\\\](y)'
    """
    said = MARKS.sub(r"\\\1", " ".join(str(clean(text)).split()))
    return said.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# ---- a file ----


def is_page(path: Path) -> bool:
    """Whether a file is a page that a report wrote, and may be written over by the next one."""
    try:
        with path.open("rb") as handle:
            head = handle.read(2000)
            return GENERATOR.encode() in head or head.startswith(GENERATOR_MD.encode())
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", str(path), "Name another file: --out FILE") from error
