"""What each command does, from parsed arguments to an exit code. Every one imports only what it needs, when it is called."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from selfkd.core.files import as_typed
from selfkd.errors import UsageError

if TYPE_CHECKING:
    from selfkd.chain.run import Run
    from selfkd.report.status import Status

RUNS = Path("runs")


# -------------------------------------------------------------------------------------------------------- run and resume


def run(given: Namespace) -> int:
    from selfkd.backend.machine import read_machine
    from selfkd.recipe.load import load

    recipe = load(given.recipe, given.overrides)
    machine = read_machine(given.on)
    if given.plan:
        from selfkd.recipe import plan

        print(plan.text(recipe, machine))
        return 0
    from selfkd.chain.run import Run

    run = Run.open(recipe, given.runs / (given.name or recipe.name), machine, given.amend)
    return _drive(run, lambda state: _more_rounds(given, state))


def resume(given: Namespace) -> int:
    from selfkd.backend.machine import read_machine
    from selfkd.chain.run import Run

    run = Run.at(given.run, read_machine(given.on) if given.on else None)
    return _drive(run, lambda state: say("status", str(given.run)))


def _drive(run: Run, further: Callable[[Status], str]) -> int:
    from selfkd.cli.drive import drive, print_end

    state = drive(run)
    folder = str(run.folder)
    newest = str(state.rounds[-1].index if state.rounds else 0)
    print_end(
        state,
        {
            "read what it wrote": say("show", folder, "--round", newest),
            "prove that nothing changed": say("verify", folder),
            "go on": further(state),
        },
    )
    return 0


def _more_rounds(given: Namespace, state: Status) -> str:
    """The same command with three more rounds."""
    kept = [word for word in given.overrides if not word.startswith("rounds=")]
    words = ["run", given.recipe, *kept, f"rounds={state.rounds_wanted + 3}"]
    words += ["--name", given.name] if given.name else []
    words += ["--on", str(given.on)] if given.on else []
    words += ["--runs", str(given.runs)] if given.runs != RUNS else []
    return say(*words)


# --------------------------------------------------------------------------------------------------------------- readers


def status(given: Namespace) -> int:
    from selfkd.report import status, tables
    from selfkd.report.bar import follow

    to = tables.console()
    if given.run is not None:
        state = follow(given.run, to) if given.follow else status.read(given.run)
        tables.print_status(state, to)
        return 0
    folders = status.runs_under(given.runs)
    if not folders:
        raise UsageError("no runs here", str(given.runs), f"Start one: {say('run', 'quickstart')}")
    if given.follow:
        raise UsageError("name the run to follow", "--follow", "Runs: " + ", ".join(map(str, folders)))
    to.print(tables.runs_table([status.read(folder) for folder in folders]))
    return 0


def show(given: Namespace) -> int:
    from selfkd.report import rows, tables

    find_function = rows.training_rows if given.training_rows else rows.samples
    rows.show(find_function(given.run, given.round, given.step, given.where, given.n), tables.console())
    return 0


def verify(given: Namespace) -> int:
    from selfkd.report.tables import span
    from selfkd.report.verify import examine

    if not (given.run / "run.json").is_file():
        raise UsageError("there is no run here (run.json is missing)", str(given.run), f"List the runs: {say('status')}")
    began = time.monotonic()
    found = examine(given.run, given.quick)
    for path in found.pruned:
        print(f"pruned   {path}")
    for problem in found.problems:
        print(f"damaged  {problem}")
    what = "sizes" if given.quick else "hashes"
    counted = f"{found.rounds} rounds, {found.steps} steps, {what} of {found.files} files in {span(time.monotonic() - began)}"
    if found.problems:
        print(
            f"{given.run} is NOT as it was committed: {len(found.problems)} problem{'' if len(found.problems) == 1 else 's'}. Checked {counted}."
        )
        return 1
    print(f"{given.run} is as it was committed: {counted}. Head {found.head[:16] or 'none yet'}")
    return 0


def lint(given: Namespace) -> int:
    from selfkd.chain.dry_run import lint_and_walk
    from selfkd.recipe.lint import lint
    from selfkd.recipe.load import load

    recipe = load(given.recipe, given.overrides)
    report = lint_and_walk(recipe) if given.dry_run else lint(recipe)
    print(report.text())
    return 0 if report.ok else 2


def try_reward(given: Namespace) -> int:
    from selfkd.cli.try_reward import print_scored, print_summary, read_rows, score_all
    from selfkd.report import tables
    from selfkd.rewards.check import score_batch
    from selfkd.rewards.find import find_function

    function = find_function(given.function, [Path.cwd()])
    if given.out:
        print_summary(score_all(function, read_rows(given.data), given.out), tables.console(), f"   {given.out}")
        return 0
    rows = read_rows(given.data, given.n)
    print_scored(rows, score_batch(function, rows), function.name, tables.console())
    return 0


def recipes(given: Namespace) -> int:
    from selfkd.recipe.library import recipes

    found = recipes()
    width = max((len(name) for name, _ in found), default=0)
    for name, line in found:
        print(f"{name:<{width}}  {line}")
    return 0


def cp(given: Namespace) -> int:
    from selfkd.recipe.library import copy

    for path in copy(given.name, given.folder):
        print(path)
    return 0


def doctor(given: Namespace) -> int:
    from selfkd.cli.doctor import checks

    failed = False
    for check in checks(given.runs):
        print(
            f"{check.level:<5} {check.name:<14} {check.fact}" + (f"\n      {'':<14} {check.fix}" if check.fix else ""),
            flush=True,
        )
        failed = failed or check.level == "fail"
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------------------- words


def say(*words: str) -> str:
    """A command as it can be typed here: by the name this one was called by."""
    return shlex.join([*shlex.split(_called()), *words])


def _called() -> str:
    path = Path(sys.argv[0])
    if path.name != "selfkd":
        return "selfkd" if shutil.which("selfkd") else f"{shlex.quote(sys.executable)} -m selfkd"
    found = shutil.which("selfkd")
    if found and Path(found).resolve() == path.resolve():
        return "selfkd"
    return shlex.quote(as_typed(path))
