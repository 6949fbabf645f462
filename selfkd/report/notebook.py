"""A run as a notebook holds it: its tables as Polars frames, its rounds as a table on the screen, its report as a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import polars as pl

from selfkd.backend.machine import Machine, read_machine
from selfkd.chain import contents, drive
from selfkd.chain import run as chain
from selfkd.chain.attempt import Watch, nobody
from selfkd.chain.fork import Forked, fork
from selfkd.core.files import builtin_folder
from selfkd.errors import SelfkdError
from selfkd.recipe.load import load
from selfkd.recipe.schema import Recipe
from selfkd.report import status
from selfkd.report.rescore import Rescored, rescore
from selfkd.report.tables import lines_of, rounds_cells
from selfkd.report.verify import Findings, verify
from selfkd.rewards.find import find_function

FRAME = "width: 100%; height: 48rem; border: 0"  # of a page inside a notebook


class Page(str):
    """A report as one HTML text, which a notebook shows in a frame of its own."""

    def save(self, path: str | Path) -> Path:
        """Write the page, and return where it lies."""
        Path(path).write_text(self, "utf-8")
        return Path(path)

    def _repr_html_(self) -> str:
        return f'<iframe style="{FRAME}" title="selfkd report" srcdoc="{escape(self, quote=True)}"></iframe>'


class Run(chain.Run):
    """One chain, opened by `selfkd.open` or made by `selfkd.run`. Frames are read from disk each time: a run may go on meanwhile."""

    def scores(self, round: int | None = None, where: str | None = None, step: str | None = None) -> pl.DataFrame:
        """Return one row per score that a step gave in a round: sample, name, draw, versus, value, weight, why, step, round.

        `where` is a SQL expression over these columns. UsageError where the round has none.
        """
        found = contents.scores(self.paths, round, step)
        return found.filter(pl.sql_expr(where)) if where else found

    def report(self) -> Page:
        """Return the run's report as one HTML page that needs no network: show it, or `.save("report.html")`."""
        from selfkd.report.page.write import of_runs

        return Page(of_runs([self.folder], _commands))

    def verify(self, data: bool = False) -> Findings:
        """Return what `selfkd verify` finds; with `data`, selections and training rows are made again."""
        return verify(self.folder, data=data)

    def fork(self, into: str | Path, after: int, overrides: str | Sequence[str] = ()) -> Run:
        """Return a new run that begins as this one was after a round; `selfkd.run` does not know it, `resume` goes on with it."""
        made: Forked = fork(self.folder, Path(into), after, [overrides] if isinstance(overrides, str) else overrides)
        return Run.at(made.folder)

    def rescore(self, function: str, name: str | None = None, round: int | None = None) -> Rescored:
        """Return what a round's stored samples score by `file.py:fn` instead of the score `name`, and which would have been kept."""
        found = find_function(function, [Path.cwd(), builtin_folder()])
        return rescore(self, found, name or found.name, round)

    def go_on(self, machine: Machine | None = None, watch: Watch = nobody) -> Run:
        """Go on with the run as it was frozen, to its end; safe to repeat."""
        drive.go_on(chain.Run.at(self.folder, machine), watch)
        return Run.at(self.folder, machine)

    def _repr_html_(self) -> str:
        """Return the table of rounds, with what must be known of it."""
        try:
            state = status.read(self.folder)
        except SelfkdError as error:
            return f"<pre>{escape(str(error))}</pre>"
        titles, *rows = [[escape(str(cell)) for cell in row] for row in rounds_cells(state.rounds, state.split, wide=False)]
        head = "".join(f"<th>{cell}</th>" for cell in titles)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        notes = "<br>".join(escape(str(line)) for line in lines_of(state))
        title = f"<b>{escape(state.name)}</b> · {escape(state.model)} · {escape(state.state)}"
        return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><small>{notes}</small>"


def _commands(folder: Path) -> dict[str, str]:
    shown = str(folder)
    return {
        "go on with it": f"selfkd.open({shown!r}).go_on()",
        "prove that nothing changed": f"selfkd.verify({shown!r})",
        "its best model": f"selfkd.open({shown!r}).model('policy@best').path",
    }


def open_run(folder: str | Path, machine: Machine | None = None) -> Run:
    """Open the run in `folder` as it was frozen; UsageError where there is none."""
    return Run.at(Path(folder), machine)


def run(
    recipe: Recipe | str | Path,
    folder: str | Path,
    machine: Machine | str | Path | None = None,
    watch: Watch = nobody,
    amended: bool = False,
) -> Run:
    """Start the run in `folder`, or go on with it, to its end. Safe to repeat: whatever is committed is read back.

    `recipe` may be the name or path of a recipe file, and `machine` the path of a machine file.
    `watch` is called with each event, a dict with the keys `event` and `t`. To end the run it raises `selfkd.errors.Stopped`;
    any other Exception of it is noted once, and the run goes on.
    Raises the errors of `selfkd.errors`; whatever happens, what was committed stays.
    """
    if not isinstance(machine, Machine):
        machine = read_machine(Path(machine) if machine else None)
    opened = Run.open(recipe if isinstance(recipe, Recipe) else load(str(recipe)), Path(folder), machine, amended)
    drive.go_on(opened, watch)
    return opened
