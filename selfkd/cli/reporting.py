"""The command `report`. Its docstring is the text of `selfkd help report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from selfkd.chain.paths import Paths, find_run
from selfkd.cli import commands
from selfkd.errors import UsageError


def report(places: Sequence[Path], out: Path | None, md: bool) -> int:
    """Write what a run, several runs or a sweep came to as one HTML page that needs no network: gain, alarms, answers, diagnostics, lineage."""
    from selfkd.report.page import write
    from selfkd.report.sweeps import is_sweep

    here = [_here(place) for place in places]
    of_sweep = len(here) == 1 and is_sweep(here[0])
    if of_sweep:
        text = write.of_sweep(here[0], sweep_commands, html=not md)
    else:
        text = write.of_runs([find_run(place, commands.RUNS) for place in places], run_commands, html=not md)
    if md and out is None:
        print(text, end="")
        return 0
    file = out or Path(f"{here[0].resolve().stem if len(here) == 1 else 'report'}.html")
    _write(file, text)
    print(f"{file}  {write.bytes_text(len(text.encode()))}")
    return 0


def _here(given: Path) -> Path:
    """Return what a person means by a run or a sweep: a path, else its bare name under runs/."""
    return given if given.exists() or given.is_absolute() or len(given.parts) != 1 else commands.RUNS / given


def _write(file: Path, text: str) -> None:
    """Write the page; UsageError where that would take away a file that is no page of ours, or there is no such folder."""
    from selfkd.report.page.write import is_page

    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(
            "is no file that could be written" if file.is_dir() else "lies in no folder that is there",
            str(file),
            "Name a file: --out FILE",
        )
    if file.exists() and not is_page(file):
        raise UsageError(
            "is there, and no report wrote it", str(file), "Name another file (--out FILE), or move this one away."
        )
    draft = file.with_name(f".{file.name}-{os.getpid()}")  # a page that is being looked at must never be half of one
    draft.write_text(text, "utf-8")
    draft.replace(file)


def run_commands(folder: Path) -> dict[str, str]:
    """Return what may be typed to go on from a run."""
    shown, line, paths = str(folder), commands.command_line, Paths(folder)
    again = "make it again" + (", as it began" if paths.amendments() else "")
    model = f"{folder.resolve().name}-model"
    return {
        again: line("run", str(paths.resolved), "--name", f"{folder.resolve().name}-again"),
        "go on with it": line("resume", shown),
        "try it otherwise after a round": line("fork", shown, "--after", "K", "key=value"),
        "read samples": line("show", shown, "--round", "K"),
        "prove that nothing changed": line("verify", shown),
        "export its best model, with a card": line("export", shown, model),
        "chat with its base and its best model": line("chat", shown, "--rounds", "base,best"),
        "its best model, from Python": f"selfkd.open({shown!r}).model('policy@best').path",
    }


def sweep_commands(place: Path) -> dict[str, str]:
    """Return what may be typed to go on from a sweep."""
    line = commands.command_line
    found = {"the same as a table": line("compare", str(place))}
    if place.is_dir():
        found["the page of one trial"] = line("report", str(place / "ARM.1.s0"))
    return found
