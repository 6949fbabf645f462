"""What a run folder says about its run: the rounds, their measurements, who drives it and how far the step in progress is.

Reads only what is on disk, so it works on a moved folder, on another machine's copy and while a driver writes: a file that
is not there yet is a fact about the run, and a torn last line of a log is left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selfkd.chain import agreement, filtering, measured, records, steering
from selfkd.chain.measured import Measured
from selfkd.chain.paths import Paths, no_run
from selfkd.chain.records import Amendment, Commit, Info, Seal
from selfkd.core.filters import Filtering
from selfkd.core.lease import holder
from selfkd.errors import SelfkdError
from selfkd.recipe.load import frozen
from selfkd.recipe.schema import Best, Stop
from selfkd.report import adapters
from selfkd.steps import STAGES
from selfkd.steps.check import told

COLUMNS = (*STAGES, "other")  # of the seconds, in the order of the table
State = Literal["new", "running", "done", "stopped", "failed", "interrupted"]
CUT = "/cut"  # how a measure step calls the share of answers that ended at the limit
TAIL_BYTES = 1 << 16  # of events.jsonl: some hundreds of its last lines


@dataclass(frozen=True)
class RoundSummary:
    """One sealed round, for a reader.

    `accepted` and `why`: whether the next round goes on from its model, and if not, why it was rolled back. `kept` counts
    samples that no step dropped, None where the round made none. `survived` is the share of the update that the engine sees;
    `unproved` says why a swap of weights could not be proved; `moved` what it was made with, where the run began with something else;
    `checked` what its updates were measured to be on their way; `adapters` what they learned in place of all weights. `told` are numbers that steps said of themselves, as a judge does, by
    step/number; `warnings` what they warned of. `filters` say what was kept is worth by gold that did not choose it;
    `apart` how far engine and trainer were from each other where an update began. `cut` is the share of measured answers that ended at
    the limit, by split.
    """

    index: int
    accepted: bool
    why: str
    stop: str
    digest: str
    measured: Mapping[str, Measured]
    samples: int | None
    kept: int | None
    tokens: int
    seconds: Mapping[str, float]
    survived: float | None
    unproved: str
    moved: str = ""
    checked: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    told: Mapping[str, float | None] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    filters: Sequence[Filtering] = ()
    apart: Sequence[str] = ()
    cut: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Status:
    """A run at one moment. It was interrupted where its driver was killed, or the machine went down."""

    folder: Path
    name: str
    model: str
    rounds_wanted: int
    rounds: Sequence[RoundSummary]
    state: State
    note: str
    log: Path | None
    progress: Mapping[str, Any] = field(default_factory=dict)
    best: str = ""  # 'round 1, by dev/right': the best round, where the recipe says what that is and a round was made
    control: str = ""  # which control of its method the run is

    @property
    def split(self) -> str:
        return main_split(self.rounds)


def main_split(rounds: Sequence[RoundSummary]) -> str:
    """Return the split that tables show: the one measured in most rounds, `dev` before `test`."""
    counts = Counter(split for summary in rounds for split in summary.measured)
    return min(counts, key=lambda split: (-counts[split], split), default="dev")


def read(folder: Path) -> Status:
    """Return the state of the run in `folder`; raise UsageError where there is none."""
    paths = Paths(folder)
    info = info_of(paths)
    amendments, sealed = [records.read(path, Amendment, unchanged=False) for path in paths.amendments()], seals_of(paths)
    recipe = in_force(info, amendments)
    finished, wanted = rounds(paths), int(recipe["rounds"])
    attempts = paths.attempts()
    events = _tail(paths.events(attempts[-1])) if attempts else []
    state, note = _state(paths, finished, wanted, _ended_early(recipe, sealed, amendments), events)
    return Status(
        folder=folder,
        name=info.name,
        model=_model_name(info.model),
        rounds_wanted=wanted,
        rounds=finished,
        state=state,
        note=note,
        log=paths.attempt(attempts[-1]) if attempts else None,
        progress={} if state == "done" else _progress(events),
        best=_best(recipe, sealed),
        control=str(recipe.get("control") or ""),
    )


def read_or_reason(folder: Path) -> Status | SelfkdError:
    """Return the state of a run, or the error that says why it cannot be read: one such run must not hide the others."""
    try:
        return read(folder)
    except SelfkdError as error:
        return error


def info_of(paths: Paths) -> Info:
    """Return what was fixed when the run was created; raise UsageError where there is no run."""
    if not paths.info.is_file():
        raise no_run(paths.folder)
    return records.read(paths.info, Info, unchanged=False)


def in_force(info: Info, amendments: Sequence[Amendment]) -> Mapping[str, Any]:
    """Return the recipe as it was amended last."""
    return amendments[-1].recipe if amendments else info.recipe


def step_counts(folder: Path) -> Callable[[int], int]:
    """Return a function that tells how many steps a round of the run has; 0 where this version cannot read its recipe."""
    paths = Paths(folder)
    info = info_of(paths)
    amendments = [records.read(path, Amendment, unchanged=False) for path in paths.amendments()]
    try:
        recipe = frozen(dict(in_force(info, amendments)), folder)
    except SelfkdError:
        return lambda index: 0
    return lambda index: len(recipe.steps_of(index))


def _ended_early(recipe: Mapping[str, Any], sealed: Sequence[Seal], amendments: Sequence[Amendment]) -> str:
    """Return why the run ended before its last round, or '': a stop that the recipe in force would not make is none any more."""
    words = recipe.get("stop")
    spent = sum(seal.notes.get("tokens", 0) for seal in sealed)
    return steering.ended_early(Stop.model_validate(words) if words else None, sealed, amendments, spent)


def _best(recipe: Mapping[str, Any], sealed: Sequence[Seal]) -> str:
    words = recipe.get("best")
    if not words or len(sealed) < 2:
        return ""
    best = Best.model_validate(words)
    index = steering.best_round(sealed, best)
    return f"{f'round {index}' if index else 'the base'}, by {best.metric}"


def seals_of(paths: Paths) -> list[Seal]:
    return [records.read(names.seal, Seal, unchanged=False) for names in paths.rounds() if names.seal.is_file()]


def rounds(paths: Paths) -> list[RoundSummary]:
    """Return the sealed rounds, each compared with round 0 on the prompts that both measured."""
    found: list[RoundSummary] = []
    for names in paths.rounds():
        if names.seal.is_file():
            seal = records.read(names.seal, Seal, unchanged=False)
            found.append(_summary(paths, seal, [records.read(path, Commit, unchanged=False) for path in names.commits()]))
    return found


def _summary(paths: Paths, seal: Seal, commits: Sequence[Commit]) -> RoundSummary:
    known = measured.recorded(seal.notes)
    apart = seal.notes.get("engine_apart", {})
    funnel = dict(seal.notes.get("funnel", ()))
    samples = funnel.get("samples") or None
    swaps = [swap for commit in reversed(commits) if (swap := commit.notes.get("swap"))]
    return RoundSummary(
        index=seal.round,
        accepted=seal.accepted,
        why=seal.why,
        stop=seal.stop,
        digest=seal.digest,
        measured=measured.measurements(paths, commits) if known is None else known,
        samples=samples,
        kept=funnel.get("kept") if samples else None,
        tokens=int(seal.notes.get("tokens", 0)),
        seconds=_seconds(seal.notes.get("seconds", {})),
        survived=next((swap["survived"] for swap in swaps if swap.get("survived") is not None), None),
        unproved=next((swap["proved"] for swap in swaps if isinstance(swap.get("proved"), str)), ""),
        moved=seal.notes.get("level", "").partition(": ")[2],
        checked=tuple(f"{commit.step}: {told(commit.checks)}" for commit in commits if commit.checks),
        adapters=adapters.learned(commits),
        told={
            **{name: value for commit in commits if not commit.outside for name, value in commit.metrics.items()},
            **{f"{commit.step}/{name}": value for commit in commits for name, value in _distances(commit).items()},
        },
        warnings=[warning for commit in commits for warning in commit.notes.get("warnings", ())]
        + [found["alarm"] for found in apart.values() if "alarm" in found],
        apart=[f"{step}: {agreement.told(found)}" for step, found in apart.items()],
        filters=filtering.recorded(seal.notes),
        cut={name.removesuffix(CUT): share for name, share in seal.metrics.items() if name.endswith(CUT) and share is not None},
    )


def _distances(commit: Commit) -> dict[str, float]:
    """Return how far a model that was distilled was from its teacher, and from who sampled its rows, at its first and its last step."""
    found = commit.notes.get("train", {})
    names = [f"{name}_{end}" for name in ("divergence", "staleness") for end in ("first", "last")]
    return {name: found[name] for name in names if name in found}


def _seconds(spent: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of every column; what a record calls otherwise counts as other."""
    seconds: dict[str, float] = dict.fromkeys(COLUMNS, 0.0)
    for stage, more in spent.items():
        seconds[stage if stage in COLUMNS else "other"] += more
    return seconds


def _tail(path: Path) -> list[dict[str, Any]]:
    """Return the last events, without a line that the window cut or that is being written right now."""
    if not path.is_file():
        return []
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = handle.read().split(b"\n")
    return [event for line in lines if (event := event_of(line))]


def event_of(line: bytes) -> dict[str, Any] | None:
    """Return the event that a line of events.jsonl holds; None where it is torn, or no event."""
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and "event" in parsed else None


def _progress(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the step in progress: its announcement with the newest figures over it; nothing between steps."""
    shown: dict[str, Any] = {}
    for event in events:
        if event["event"] in ("made", "sealed", "attempt"):
            shown = {}
        elif event["event"] == "step":
            shown = dict(event)
        elif event["event"] == "progress":
            shown = {**shown, **event}
    return shown


def _state(
    paths: Paths, finished: Sequence[RoundSummary], wanted: int, stop: str, events: Sequence[dict[str, Any]]
) -> tuple[State, str]:
    if driver := holder(paths.leases):
        return "running", driver
    if stop or (finished and finished[-1].index >= wanted):
        return "done", stop
    for event in reversed(events):
        if event["event"] in ("stopped", "failed"):
            return event["event"], str(event.get("text", ""))
    return ("interrupted", "its driver ended without giving a reason") if events else ("new", "")


def _model_name(source: Mapping[str, Any]) -> str:
    """Return a short name of what the run started from: the last part of a hub id or path."""
    return str(source["path"]).rstrip("/").rsplit("/", 1)[-1].removeprefix("package:")
