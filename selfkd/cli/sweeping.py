"""The commands `sweep` and `compare`. A docstring here is the text of `selfkd help COMMAND`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfkd.chain.paths import find_run
from selfkd.cli import answers, commands
from selfkd.core.wording import counted
from selfkd.errors import UsageError


def sweep(
    words: Sequence[str],
    seeds: int,
    controls: str,
    budget: str | None,
    metric: str | None,
    name: str | None,
    on: Path | None,
    plan: bool,
    runs: Path,
    as_json: bool = False,
) -> int:
    """Make every trial of a sweep, each method and control with as many, then compare them; safe to repeat, safe to requeue."""
    from selfkd.backend.machine import read_machine
    from selfkd.chain import sweep as made
    from selfkd.chain.results import Place
    from selfkd.cli.drive import drive
    from selfkd.recipe.sweep import is_sweep, read_sweep, sweep_of

    if as_json and not plan:
        raise UsageError("is for --plan", answers.FLAG, "Write both, or leave it out: of results, selfkd compare SWEEP --json")
    commands.refuse_place(name, runs)
    if len(words) == 1 and is_sweep(Path(words[0])):
        asked = read_sweep(Path(words[0]))
    else:
        listed = [one for one in controls.split(",") if one]
        asked = sweep_of(words, seeds, listed, budget, metric, name or "sweep")
    folder = runs / (name or asked.name)
    if plan and as_json:
        return answers.told(
            "sweep", {"folder": folder, "metric": asked.metric, "trials": asked.trials, "arms": len(asked.arms)}
        )
    if plan:
        for trial in asked.trials:
            print(
                f"{trial.name:<32} {trial.recipe}{f' --control {trial.control}' if trial.control else ''} {' '.join(trial.words)}"
            )
        print(f"{counted(len(asked.trials), 'trial')} of {counted(len(asked.arms), 'arm')} on {asked.metric}, in {folder}")
        return 0
    left = made.walk(asked, folder, read_machine(on), drive, lambda text: print(text, flush=True))
    done = Place(folder).results()
    print(f"\n{len(done)} of {counted(len(asked.trials), 'trial')} have a result in {folder}", flush=True)
    if any(not one.failed for one in done):
        _compare_sweep(folder, "text")
    if left:
        print(f"Not run: {', '.join(trial.name for trial in left)}. Raise the budget and repeat the command.")
    return 0


def compare(runs: Sequence[Path], metric: str | None, which: str, form: str) -> int:
    """Compare runs on one metric: each with its base and with the first run, prompt by prompt, and all of them at equal tokens."""
    from selfkd.report import comparison
    from selfkd.report.compare import compare as compared
    from selfkd.report.sweeps import is_sweep
    from selfkd.report.tables import console

    if len(runs) == 1 and is_sweep(folder := _sweep_here(runs[0])):
        return _compare_sweep(folder, form)
    if form == "jsonl":
        raise UsageError("is for one sweep", "--jsonl", "Name the folder of a sweep; of runs: --json")
    found = compared([find_run(run, commands.RUNS) for run in runs], metric, which)
    if form == "text":
        comparison.print_comparison(found, console())
        return 0
    if form == "json":
        return answers.told("compare", found.to_json())
    write = {
        "csv": comparison.as_csv,
        "latex": comparison.as_latex,
        "markdown": comparison.as_markdown,
    }
    print(write[form](found))
    return 0


def _sweep_here(given: Path) -> Path:
    """Return what a person means by the name of a sweep: a path, else its bare name under runs/."""
    return given if given.exists() or len(given.parts) != 1 else commands.RUNS / given


def _compare_sweep(place: Path, form: str) -> int:
    from selfkd.report import sweep_table, sweeps
    from selfkd.report.tables import console

    if form == "jsonl":
        print(sweeps.lines(place, commands.RUNS))
    elif form == "json":
        return answers.told("compare", sweeps.report(place, commands.RUNS).to_json())
    elif form == "text":
        sweep_table.print_report(sweeps.report(place, commands.RUNS), console())
    else:
        print(sweep_table.written(sweeps.report(place, commands.RUNS), form))
    return 0
