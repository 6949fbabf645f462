"""What each command does, from its arguments to an exit code. A docstring here is the text of `selfkd help COMMAND`.

Every command imports only what it needs, when it is called.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from selfkd.chain.paths import find_run, no_run, runs_under
from selfkd.cli import answers
from selfkd.core.files import NAME, as_typed
from selfkd.core.wording import counted
from selfkd.errors import Stopped, UsageError

if TYPE_CHECKING:
    from selfkd.backend.machine import Machine
    from selfkd.chain.run import Run
    from selfkd.recipe.schema import Recipe
    from selfkd.report.status import Status

RUNS = Path("runs")
RECIPES_LEGEND = (
    "compared: with others in a sweep (docs/reproduce.md); only walked: its steps, with a scripted model; not tried: neither.\n"
    "What [C] and other marks mean says the head of the file: selfkd cp NAME DIR"
)


# -------------------------------------------------------------------------------------------------------- run and resume


def run(
    recipe: str,
    overrides: Sequence[str],
    name: str | None,
    on: Path | None,
    small: bool,
    plan: bool,
    amend: bool,
    control: str | None,
    steps_of: Path | None,
    log: Sequence[str],
    notify: Sequence[str],
    runs: Path,
    as_json: bool = False,
) -> int:
    """Start a run, or go on where it stopped: safe to repeat, safe to requeue."""
    from selfkd.backend.machine import read_machine
    from selfkd.recipe.load import load

    if as_json and not plan:
        raise UsageError("is for --plan", answers.FLAG, "Write both, or leave it out: of a run, selfkd status RUN --json")
    refuse_place(name, runs)
    loaded, machine = load(recipe, overrides, small, control, _steps_taken(steps_of, control)), read_machine(on)
    which = _which(recipe)
    if which and not as_json:
        print(which, flush=True)
    if plan:
        return _plan(loaded, machine, name, runs, which, as_json)
    from selfkd.chain.run import Run
    from selfkd.report.bar import waiting
    from selfkd.report.tracking import targets_of

    targets = targets_of(log, notify)
    with waiting("reading prompts and rewards"):
        opened = Run.open(loaded, runs / (name or loaded.name), machine, amend)
    for remark in opened.remarks():
        print(remark)

    def go_on(state: Status) -> dict[str, str]:
        rounds, wider = opened.ways_on()
        more = [*rounds, *wider]
        changed = {word.partition("=")[0] for word in more}
        words = ["run", recipe, *(word for word in overrides if word.partition("=")[0] not in changed), *more]
        words += ["--small"] if small else []
        words += ["--name", name] if name else []
        words += ["--on", str(on)] if on else []
        words += ["--control", control] if control else []
        words += ["--steps-of", str(steps_of)] if steps_of else []
        words += ["--runs", str(runs)] if runs != RUNS else []
        words += [part for name in log for part in ("--log", name)]  # an address may hold a secret, and this line is logged
        words += ["--amend"] if wider else []
        return {"go on": command_line(*words)}

    return _drive(opened, go_on, targets)


def _plan(loaded: Recipe, machine: Machine, name: str | None, runs: Path, which: str, as_json: bool) -> int:
    """Print what a run will cost; UsageError where it cannot be."""
    from selfkd.chain.past_pace import newest
    from selfkd.recipe.plan import plan

    found = plan(loaded, machine, runs / (name or loaded.name), newest(runs, machine))
    if as_json:
        lines = [{"name": what, "text": text} for what, text in found.lines]
        return answers.told("run", {"note": which, "lines": lines, "problems": found.problems}, 2 if found.problems else 0)
    print(found, flush=True)
    found.refuse()
    return 0


def _steps_taken(run: Path | None, control: str | None) -> Sequence[int]:
    """Return the steps that the updates of a method's run took, for a control that is to take as many."""
    from selfkd.chain.trained import steps_taken

    if run is None:
        return ()
    if control is None:
        raise UsageError("is for a control", "--steps-of", "Write --control too, or leave it out.")
    return steps_taken(find_run(run, RUNS))


def _which(recipe: str) -> str:
    """Return which file a recipe's name means where a shipped one is called so too, else ''."""
    from selfkd.recipe.load import hidden

    return hidden(recipe) or ""


def refuse_place(name: str | None, runs: Path) -> None:
    """Raise UsageError where a run would lie outside the folder of runs, or that folder is none."""
    if name is not None and not re.fullmatch(NAME, name):
        raise UsageError(
            f"'{name}' is not the name of one folder", "--name", "Use letters, digits, '_', '.' and '-'; --runs DIR says where."
        )
    if runs.exists() and not runs.is_dir():
        raise UsageError("is a file, not a folder of runs", str(runs), "Name a folder: --runs DIR")


def resume(run: Path, on: Path | None, log: Sequence[str], notify: Sequence[str]) -> int:
    """Go on with the recipe and the code that the run keeps inside."""
    from selfkd.backend.machine import read_machine
    from selfkd.chain.run import Run
    from selfkd.report.tracking import targets_of

    run = find_run(run, RUNS)
    return _drive(
        Run.at(run, read_machine(on) if on else None),
        lambda state: {"see this table again": command_line("status", str(run))},
        targets_of(log, notify),
    )


def track(run: Path, to: Sequence[str]) -> int:
    """Tell the rounds of a run to a tracker: those that it was not told yet, however the run was made."""
    from selfkd.report.tracking import check_target, follow

    folder = find_run(run, RUNS)
    for target in to:
        follow(folder, check_target(target), lambda: True)
    return 0


def _drive(run: Run, more: Callable[[Status], dict[str, str]], targets: Sequence[str]) -> int:
    """Walk the run to its end, then print its table and the commands that may come next."""
    from selfkd.cli.drive import drive

    drive(run, targets=targets)
    try:
        _print_end(run, more)
        sys.stdout.flush()
    except Stopped:
        raise
    except Exception as error:  # the run is done, whoever sees it
        drop_output()
        said = f"The run is done; its table could not be shown ({type(error).__name__}: {error})."
        say(f"{said}\n    See it: {command_line('status', str(run.folder))}")
    return 0


def _print_end(run: Run, more: Callable[[Status], dict[str, str]]) -> None:
    from selfkd.cli.drive import print_end
    from selfkd.report.status import read

    state, folder = read(run.folder), str(run.folder)
    newest = str(state.rounds[-1].index if state.rounds else 0)
    print_end(
        state,
        {
            "read what it wrote": command_line("show", folder, "--round", newest),
            "prove that nothing changed": command_line("verify", folder),
            **more(state),
        },
    )


def say(text: str) -> None:
    """Print to stderr; an exit code must not depend on whether anybody reads it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def drop_output() -> None:
    """Let go of a stdout that cannot be written to: what it still holds must not fail again when Python ends."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --------------------------------------------------------------------------------------------------------------- readers


def status(run: Path | None, follow: bool, runs: Path, as_json: bool = False) -> int:
    """Read run folders, also while a driver writes to them."""
    from selfkd.report import bar, status, tables

    to = tables.console()
    if run is not None:
        run = find_run(run, runs)
        if as_json:
            for state in bar.states(run) if follow else [status.read(run)]:
                answers.told("status", state)
            return 0
        tables.print_status(bar.follow(run, to) if follow else status.read(run), to)
        return 0
    folders = runs_under(runs)
    if not folders:
        raise UsageError("no runs here", str(runs), f"Start one: {command_line('run', 'quickstart')}")
    if follow:
        raise UsageError("name the run to follow", "--follow", "Runs: " + ", ".join(map(str, folders)))
    states = [status.read_or_reason(folder) for folder in folders]
    if as_json:
        unreadable = [str(state) for state in states if not isinstance(state, status.Status)]
        return answers.told(
            "status", {"runs": [one for one in states if isinstance(one, status.Status)], "unreadable": unreadable}
        )
    to.print(tables.runs_table([state for state in states if isinstance(state, status.Status)]))
    for reason in (str(state) for state in states if not isinstance(state, status.Status)):
        to.print(reason, style="yellow", soft_wrap=True, markup=False)
    return 0


def verify(run: Path, quick: bool, data: bool, as_json: bool = False) -> int:
    """Check the chain and re-hash every file that counts."""
    from selfkd.report.tables import span
    from selfkd.report.verify import verify as check_run

    run = find_run(run, RUNS)
    if not (run / "run.json").is_file():
        raise no_run(run)
    began = time.monotonic()
    found = check_run(run, quick, data)
    if as_json:
        seconds = round(time.monotonic() - began, 3)
        return answers.told(
            "verify", {"run": run, **answers.plain(found), "quick": quick, "seconds": seconds}, 1 if found.problems else 0
        )
    for path in found.pruned:
        print(f"pruned   {path}")
    for path in found.rounded:
        print(f"in bf16  {path}")
    for moved in found.moved:
        print(f"moved    {moved}")
    for problem in found.problems:
        print(f"damaged  {problem}")
    what = "sizes" if quick else "hashes"
    sizes = f"{counted(found.rounds, 'round')}, {counted(found.steps, 'step')}, {what} of {counted(found.files, 'file')}"
    made = f", {counted(found.again, 'step')} made again" if data else ""
    checked = f"{sizes}{made} in {span(time.monotonic() - began)}"
    if found.problems:
        print(f"{run} is NOT as it was committed: {counted(len(found.problems), 'problem')}. Checked {checked}.")
        return 1
    print(f"{run} is as it was committed: {checked}. Head {found.head[:16] or 'none yet'}")
    return 0


def doctor(runs: Path, as_json: bool = False) -> int:
    """Check versions, cores, memory, disk, run folder, sandbox, GPU and imports."""
    from selfkd.cli.doctor import checks

    if as_json:
        every = list(checks(runs))
        return answers.told("doctor", {"checks": every}, 1 if any(check.level == "fail" for check in every) else 0)
    failed = False
    for check in checks(runs):
        fix = f"\n      {'':<14} {check.fix}" if check.fix else ""
        print(f"{check.level:<5} {check.name:<14} {check.fact}{fix}", flush=True)
        failed = failed or check.level == "fail"
    return 1 if failed else 0


# --------------------------------------------------------------------------------------------------- recipes and rewards


def lint(
    recipe: str,
    overrides: Sequence[str],
    small: bool,
    dry_run: bool,
    on: Path | None,
    control: str | None = None,
    steps_of: Path | None = None,
    as_json: bool = False,
) -> int:
    """Check a recipe, its rewards and its prompts."""
    from selfkd.backend.machine import read_machine
    from selfkd.recipe.lint import Doctests, look, try_rewards
    from selfkd.recipe.load import read

    which = _which(recipe)
    tell_person: Callable[..., None] = (lambda *lines: None) if as_json else partial(print, sep="\n", flush=True)
    if which:
        tell_person(which)
    words, machine = read(recipe, overrides, small, control, _steps_taken(steps_of, control)), read_machine(on)
    allowed = machine.environment
    doctests = Doctests(words, allowed)
    report, frames = look(words, machine=machine if on else None)
    tell_person(report.text())
    with _telling() as tell:
        rewards = try_rewards(words, frames, doctests, tell)
    tell_person(*(["", rewards.text()] if rewards.text() else []))
    if dry_run and report.ok and rewards.ok:
        from selfkd.chain.dry_run import try_walk  # loads the chain and a backend, which lint alone does not need

        rewards += try_walk(words, allowed)
        tell_person(*rewards.notes[-1:], *rewards.problems)
    wrong = len(report.problems) + len(rewards.problems)
    code = 2 if wrong else 0
    if as_json:
        return answers.told("lint", {"note": which, **answers.plain(report + rewards)}, code)
    print(f"{recipe}  {counted(wrong, 'problem') if wrong else 'no problems'}")
    return code


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """Tell on a terminal what is being done, in place; nowhere else."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def try_reward(function: str, data: Path, n: int, out: Path | None, on: Path | None, as_json: bool = False) -> int:
    """Score the first rows of a file with a reward function, as a run would."""
    from selfkd.backend.machine import read_machine
    from selfkd.cli import try_reward as trial
    from selfkd.report import tables
    from selfkd.rewards.find import find_function

    allowed = tuple(read_machine(on).environment)
    found = replace(find_function(function, [Path.cwd()]), environment=allowed)
    if out:
        trial.check_place(out)
    rows = trial.read_rows(data, None if out else n)
    results = trial.score(found, rows, prints=not out)
    said = trial.failure(found, results)
    if as_json:
        if out:
            trial.write_scores(rows, results, out)
        return answers.told("try", trial.as_data(rows, results, found.name, said), 1 if said else 0)
    if out:
        trial.write_scores(rows, results, out)
        trial.print_summary(results, tables.console(), f"   {out}")
    else:
        trial.print_scored(rows, results, found.name, tables.console())
    if line := trial.stand_ins(rows):
        print(line)
    if said:
        print(said, file=sys.stderr)
    return 1 if said else 0


def recipes(as_json: bool = False) -> int:
    """List the shipped recipes and those under recipes/: what each is, needs and trains, how close it is to its paper, and whether it was compared in a sweep."""
    from selfkd.recipe.cards import card
    from selfkd.recipe.library import recipes

    found = [card(name, path) for name, path in recipes()]
    if as_json:
        return answers.told("recipes", {"recipes": found})
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        print(f"{one.name:<{width}}  {one.title}")
        if said := one.sentence():
            print(f"{'':<{width}}  {said}")
    print(f"\n{RECIPES_LEGEND}")
    return 0


def cp(name: str, folder: Path) -> int:
    """Copy a recipe and the rewards and templates it names."""
    from selfkd.recipe.library import copy

    for path in copy(name, folder):
        print(path)
    return 0


# ---------------------------------------------------------------------------------------------------------- command lines


def command_line(*words: str) -> str:
    """Return a command as it can be typed here: by the name that this process was called by."""
    return shlex.join([*shlex.split(_called()), *words])


def _called() -> str:
    path = Path(sys.argv[0])
    found = shutil.which("selfkd")
    if path.name != "selfkd":
        return "selfkd" if found else f"{shlex.quote(sys.executable)} -m selfkd"
    on_path = found and Path(found).resolve() == path.resolve()
    return "selfkd" if on_path else shlex.quote(as_typed(path))
