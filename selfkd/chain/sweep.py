"""Making the trials of a sweep, one after the other: each a run of its own, and each ended by one result that is put if absent.

    runs/SWEEP/
      plan-001.json …        what was asked for: trials, metric; one more where the sweep file changed
      ARM.1.s0/              the run of arm ARM, first combination, seed 0; headroom-…/ shows the base before anything is trained
      results/ARM.1.s0.json  THE end of that trial: what it measured, or why it failed
      tests/ARM-….json       the test split, of the combination that dev chose, once all trials of the arm are there
      spent.json             seconds of all calls

Killed anywhere, the same command goes on: results are read, a run that was begun goes on, and no result is ever rewritten.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from selfkd.backend.machine import Machine
from selfkd.chain import records
from selfkd.chain.freeze import now
from selfkd.chain.headroom import lacks_headroom
from selfkd.chain.paths import Paths
from selfkd.chain.records import Info
from selfkd.chain.results import Place, Plan, Result, chosen, lines_of, meaning, result_of
from selfkd.chain.run import Run
from selfkd.chain.trained import steps_taken
from selfkd.core import digest, storage, yamlfile
from selfkd.core.lease import Lease
from selfkd.errors import ChainError, GuardError, RewardError, Stopped, UsageError
from selfkd.recipe.control import decodings
from selfkd.recipe.sweep import Sweep, Trial, probe_of

TICK = 20.0  # seconds between two notes of how long a sweep has taken: as much is lost where it is killed
OWN_FAILURES = (GuardError, RewardError)  # what a trial fails by itself; of anything else the next call may be free

Drive = Callable[[Run, Callable[[dict[str, Any]], None]], None]
Say = Callable[[str], None]


# ---- the walk ----


def walk(sweep: Sweep, folder: Path, machine: Machine, drive: Drive, say: Say) -> list[Trial]:
    """Make every trial that has no result yet; return those that the budget left out.

    `drive` walks a run to its end. BusyError where another process makes this sweep, ChainError where a trial was another one before.
    """
    place = Place(folder)
    with Lease(place.leases, place.tmp):
        _note_plan(sweep, place)
        _bring(sweep, place)
        clock = Clock(place.spent, sweep)
        left = []
        for trial in sweep.trials:
            if place.result(trial.name).exists():
                refuse_another(trial, records.read(place.result(trial.name), Result))
            elif why := clock.over() or _tokens_over(sweep, place):
                left.append(trial)
                say(f"{trial.name}  not run: {why}")
            else:
                try:
                    _make(trial, sweep, place, machine, clock.watching(drive), say)
                except BudgetSpent as error:
                    left.append(trial)
                    say(f"{trial.name}  stopped: {error.what}")
            clock.note()
        for arm in sweep.arms:
            _report_test(arm, sweep, place)
        return left


def _make(trial: Trial, sweep: Sweep, place: Place, machine: Machine, drive: Drive, say: Say) -> None:
    """Make one trial and put its result."""
    said = trial.asked()
    try:
        if why := _without_headroom(trial, sweep, place, machine, drive, say):
            raise GuardError(why)
        steps = _steps(trial, place)
        recipe = trial.load(steps)
        said |= {"steps": list(steps), "recipe": meaning(recipe)}
        say(f"{trial.name}  {len(place.results()) + 1} of {len(sweep.trials)}")
        run = Run.open(recipe, place.run(trial), machine)
        drive(run, lambda event: None)
        found = result_of(run.folder, _metric(run, sweep, trial))
    except OWN_FAILURES as error:
        said = {"steps": [], "recipe": "", **said}
        found = {"failed": " ".join(str(error).split())}
    record = Result(format=records.FORMAT, sweep=sweep.name, when=now(), **said, **found)
    records.write(place.result(trial.name), record, place.tmp)


def _bring(sweep: Sweep, place: Place) -> None:
    """Put the results that a file of the sweep holds, made elsewhere or before: those trials are done."""
    kept = sweep.folder / sweep.results if sweep.results else None
    wanted = {trial.name: trial for trial in sweep.trials}
    for result in lines_of(kept)[0] if kept and kept.is_file() else []:
        if result.name in wanted and not result.is_test:
            refuse_another(wanted[result.name], result)
            records.write(place.result(result.name), result, place.tmp)


def refuse_another(trial: Trial, result: Result) -> None:
    """Raise ChainError where a result is that of another recipe: one name must not mean two things."""
    if not result.recipe:
        return
    if meaning(trial.load(result.steps)) != result.recipe:
        fix = "Give the arm another name (name), or the sweep: finished trials stay as they are."
        raise ChainError(f"the arm '{trial.arm}' has another recipe now than when this was made", trial.name, fix)


def _note_plan(sweep: Sweep, place: Place) -> None:
    words = digest.as_json(sweep.words())
    plans = place.plans()
    newest = records.read(plans[-1], Plan) if plans else None
    if newest is None or {name: getattr(newest, name) for name in words} != words:
        path = place.folder / f"plan-{len(plans) + 1:03d}.json"
        records.write(path, Plan(format=records.FORMAT, **words), place.tmp)


def _steps(trial: Trial, place: Place) -> Sequence[int]:
    """Return the steps of the method's trial beside this one, where its control trains for as long."""
    if not (trial.takes_steps and trial.method):
        return ()
    beside = place.result(trial.method)
    result = records.read(beside, Result) if beside.exists() else None
    if result is None or result.failed:
        raise GuardError(f"its method's trial {trial.method} has no result that says for how many steps to train")
    told = [int(one.get("steps", 0)) for one in result.rounds[1:]]  # a result that came from elsewhere has no run here
    return [max(1, count) for count in told] if any(told) else steps_taken(place.folder / trial.method)


def _metric(run: Run, sweep: Sweep, trial: Trial) -> str:
    """Return the metric that a trial is judged by: of a control that only decodes the best one of them on dev."""
    if trial.control != "best-decoding":
        return sweep.metric
    metrics = run.sealed()[0].metrics
    known = [name for name in decodings(sweep.metric, list(metrics)) if metrics[name] is not None]
    sign = -1 if sweep.mode == "min" else 1
    return max(known, key=lambda name: sign * metrics[name], default=sweep.metric)


# ---- headroom ----


def _without_headroom(trial: Trial, sweep: Sweep, place: Place, machine: Machine, drive: Drive, say: Say) -> str:
    """Return why nothing can be learned by this method, as far as the base shows; ''."""
    if trial.headroom is None:
        return ""
    recipe = probe_of(trial, sweep.trials[0].seed).load()
    folder = place.probe(recipe)
    if not (Paths(folder).info.is_file() and Paths(folder).round(0).seal.is_file()):
        say(f"{trial.name}  what the base can do: {folder.name}")
        drive(Run.open(recipe, folder, machine), lambda event: None)
    return lacks_headroom(folder, sweep.metric, trial.headroom)


def _report_test(arm: str, sweep: Sweep, place: Place) -> None:
    """Put what the chosen combination of an arm measured on test, one record per seed, where all of its trials have a result."""
    trials = [trial for trial in sweep.trials if trial.arm == arm]
    if not all(place.result(trial.name).exists() for trial in trials):
        return
    results = [records.read(place.result(trial.name), Result) for trial in trials]
    best = chosen(results, sweep.mode)
    for one in (one for one in results if one.number == best and not one.failed):
        metric = f"test/{one.metric.partition('/')[2]}"
        path = place.test(one.name, results)
        info = Paths(place.folder / one.name).info
        if path.exists() or not info.is_file() or "test" not in records.read(info, Info).prompts:
            continue
        with suppress(GuardError):  # a run that ended without its test split says so itself
            found = {**one.to_json(), **result_of(place.folder / one.name, metric), "when": now()}
            records.write(path, Result.from_json(found), place.tmp)


# ---- what it may take ----


class BudgetSpent(Stopped):
    """Raised at an event where the hours of a sweep are over; the trial at hand can go on."""


def _tokens_over(sweep: Sweep, place: Place) -> str:
    most = sweep.budget.tokens
    spent = sum(one.tokens for one in place.results()) if most else 0
    return f"{spent:,} of {most:,} tokens are spent" if most and spent >= most else ""


class Clock:
    """How long a sweep has taken in all calls, written down as it goes on. A budget's file may be shared by sweeps."""

    def __init__(self, path: Path, sweep: Sweep) -> None:
        self._path = path
        self._file = sweep.folder / sweep.budget.file if sweep.budget.file else None
        self._words = _budget_file(self._file) if self._file else {}
        hours = sweep.budget.hours or self._words.get("hours")
        self._most = None if hours is None else 3600.0 * float(hours)
        self._noted = time.monotonic()

    @property
    def seconds(self) -> float:
        if self._file:
            return 3600.0 * float(_budget_file(self._file).get("spent_hours") or 0.0)
        return float(json.loads(self._path.read_text())["seconds"]) if self._path.exists() else 0.0

    def over(self) -> str:
        spent = self.seconds
        return f"{spent / 3600:.2f} of {self._most / 3600:g} hours are spent" if self._most and spent >= self._most else ""

    def note(self) -> None:
        """Write down the time since the last note."""
        now = time.monotonic()
        spent = self.seconds + now - self._noted
        self._noted = now
        if self._file:
            text = self._file.read_text("utf-8")
            line = f"spent_hours: {spent / 3600:.4f}"
            known = re.search(r"(?m)^spent_hours:.*$", text)
            _replace(self._file, text[: known.start()] + line + text[known.end() :] if known else f"{text.rstrip()}\n{line}\n")
        else:
            _replace(self._path, json.dumps({"seconds": round(spent, 1)}))

    def watching(self, drive: Drive) -> Drive:
        """Return `drive`, which notes the time at events and ends the run where it is over."""

        def watch(event: dict[str, Any]) -> None:
            if time.monotonic() - self._noted >= TICK:
                self.note()
                if why := self.over():
                    raise BudgetSpent(why)

        return lambda run, _: drive(run, watch)


def _budget_file(path: Path) -> dict[str, Any]:
    try:
        tree, _ = yamlfile.read(path, str(path), yamlfile.Problems())
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", str(path), "Write it: hours: 10") from None
    words = yamlfile.plain(tree)
    if not isinstance(words, dict) or not isinstance(words.get("hours"), int | float):
        raise UsageError("a budget file has a number of hours", str(path), "Write: hours: 10")
    return words


def _replace(path: Path, text: str) -> None:
    draft = storage.temporary(path.parent, path.suffix)
    draft.write_text(text, "utf-8")
    os.replace(draft, path)
