"""What a run folder says about its run: the rounds, their measurements, who drives it and how far the step in progress is.

Reads only what is on disk, so it works on a moved folder, on another machine's copy and while a driver writes: a file that
is not there yet is a fact about the run, and a torn last line of a log is left out.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.core.files import reference_parts
from selfkd.core.lease import PATIENCE_SECONDS, started_at
from selfkd.core.stats import Change, change
from selfkd.errors import ChainError, UsageError

STAGES = ("generate", "score", "train", "measure")
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Measured:
    """What one measure step says: the score that tables show, as a mean over prompts with the half-width of its interval."""

    split: str
    score: str
    value: float | None
    interval: float | None
    change: Change | None  # against the base, on the same prompts; None for the base itself


@dataclass(frozen=True)
class Round:
    """One sealed round. `kept` counts samples that no step dropped, None where the round made none; `survived` is the share
    of the update that the engine sees, and `unproved` says why a weight swap could not be told from no swap."""

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


@dataclass(frozen=True)
class Status:
    """A run at one moment. `state`: new, running, done, stopped, failed, or interrupted (killed, or its machine went)."""

    folder: Path
    name: str
    model: str
    rounds_wanted: int
    rounds: Sequence[Round]
    state: str
    note: str
    log: Path | None
    progress: Mapping[str, Any] = field(default_factory=dict)

    @property
    def split(self) -> str:
        return main_split(self.rounds)


def main_split(rounds: Sequence[Round]) -> str:
    """The split that tables show: the one measured in most rounds, `dev` before `test`."""
    counts = Counter(split for done in rounds for split in done.measured)
    return min(counts, key=lambda split: (-counts[split], split), default="dev")


def read(folder: Path) -> Status:
    """The state of the run in `folder`; UsageError where there is none."""
    manifest = run_json(folder)
    finished = rounds(folder)
    wanted = rounds_wanted(folder, manifest)
    log = newest_log(folder)
    events = _tail(log / "events.jsonl") if log else []
    state, note = _state(folder, finished, wanted, events)
    shown = {} if state == "done" else _progress(events)
    return Status(folder, manifest["name"], _model_name(manifest["model"]), wanted, finished, state, note, log, shown)


def run_json(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.is_file():
        raise UsageError(
            "no run here (run.json is missing)", str(folder), "List the runs of a folder: selfkd status --runs runs"
        )
    return record(path)


def record(path: Path) -> dict[str, Any]:
    """A JSON record of a run; ChainError where it cannot be read. That it was not changed is for `verify` to say."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ChainError(f"cannot be read: {error}", str(path), "See all damage: selfkd verify RUN") from None
    return found


def runs_under(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/run.json"))


def round_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("round-*") if path.is_dir())


def step_commits(round_folder: Path) -> list[dict[str, Any]]:
    """The commits of the steps made so far in one round, in order."""
    paths = sorted(round_folder.glob("[0-9][0-9]-*.json"))
    return [record(path) for path in paths]


def rounds_wanted(folder: Path, manifest: Mapping[str, Any]) -> int:
    """How many rounds the newest amendment asks for, else the run as created."""
    wanted = int(manifest["rounds"])
    for path in sorted((folder / "amendments").glob("*.json")):
        wanted = int(record(path)["recipe"]["rounds"])
    return wanted


def rounds(folder: Path) -> list[Round]:
    """The sealed rounds, each compared with round 0 on the prompts that both measured."""
    found: list[Round] = []
    base: dict[str, dict[str, float]] = {}
    for path in round_folders(folder):
        if (path / "sealed.json").is_file():
            sealed = record(path / "sealed.json")
            found.append(_round(folder, sealed, step_commits(path), base))
    return found


def _round(
    folder: Path, sealed: Mapping[str, Any], commits: Sequence[dict[str, Any]], base: dict[str, dict[str, float]]
) -> Round:
    notes = sealed.get("notes", {})
    stages = dict(notes.get("funnel", ()))
    seconds = {stage: 0.0 for stage in (*STAGES, "other")}
    for stage, spent in notes.get("seconds", {}).items():
        seconds[stage if stage in STAGES else "other"] += spent
    measured = {}
    for commit in commits:
        if commit["verb"] == "measure":
            split, reward = commit["identity"]["split"], commit["identity"]["reward"]
            first, *others = [reference_parts(name)[1] for name in ([reward] if isinstance(reward, str) else reward)]
            name = split if split not in measured else f"{split} ({commit['step']})"
            measured[name] = _measured(folder, commit, first, base)
            measured |= {f"{name}/{other}": _measured(folder, commit, other, base) for other in others}
    swaps = [swap for commit in reversed(commits) if (swap := commit["notes"].get("swap"))]
    return Round(
        sealed["round"],
        sealed["kept"],
        sealed.get("why", ""),
        sealed.get("stop", ""),
        sealed["digest"],
        measured,
        stages.get("samples") or None,
        stages.get("kept") if stages.get("samples") else None,
        int(notes.get("tokens", 0)),
        seconds,
        next((swap["survived"] for swap in swaps if swap.get("survived") is not None), None),
        next((swap["proved"] for swap in swaps if isinstance(swap.get("proved"), str)), ""),
    )


def _measured(folder: Path, commit: Mapping[str, Any], score: str, base: dict[str, dict[str, float]]) -> Measured:
    """`base` collects the per-prompt scores of the first time a step measured, and everything later is compared with it.

    `measure-warm` is `measure` again, after the steps that run before the first round.
    """
    split = commit["identity"]["split"]
    metrics, scores = commit["metrics"], prompt_means(folder, commit, score)
    against = base.setdefault(f"{commit['step'].removesuffix('-warm')}/{score}", scores)
    moved = None if against is scores else change(against, scores)
    return Measured(split, score, metrics.get(f"{split}/{score}"), metrics.get(f"{split}/{score}_interval"), moved)


def prompt_means(folder: Path, commit: Mapping[str, Any], score: str) -> dict[str, float]:
    """{prompt id: mean of `score` over its answers} of a measure step; prompts without any scored answer are left out."""
    files = {name: [folder / path for path in table["files"]] for name, table in commit["tables"].items()}
    if not files.get("samples") or not files.get("scores"):
        return {}
    if not all(path.is_file() for paths in files.values() for path in paths):
        return {}  # verify names what is missing; a status is not the place to fail
    values = pl.scan_parquet(files["scores"]).filter((pl.col("name") == score) & pl.col("value").is_not_null())
    per_sample = values.group_by("sample").agg(pl.col("value").mean())
    owners = pl.scan_parquet(files["samples"]).select(sample="id", prompt="prompt")
    means = per_sample.join(owners, on="sample").group_by("prompt").agg(pl.col("value").mean()).collect()
    return dict(means.sort("prompt").select("prompt", "value").iter_rows())


def newest_log(folder: Path) -> Path | None:
    return max((path for path in (folder / "logs").glob("attempt-*") if path.is_dir()), default=None)


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last events; a line that was cut by the window, or is being written right now, is left out."""
    if not path.is_file():
        return []
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = handle.read().split(b"\n")
    return [event for line in lines if (event := _event(line))]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and "event" in parsed else None


def _progress(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The step in progress: its announcement with the newest figures over it; empty between steps."""
    shown: dict[str, Any] = {}
    for event in events:
        if event["event"] in ("made", "sealed", "attempt"):
            shown = {}
        elif event["event"] == "step":
            shown = dict(event)
        elif event["event"] == "progress":
            shown = {**shown, **event}
    return shown


def _state(folder: Path, finished: Sequence[Round], wanted: int, events: Sequence[dict[str, Any]]) -> tuple[str, str]:
    holder = driver(folder)
    if holder:
        return "running", holder
    if finished and (finished[-1].index >= wanted or finished[-1].stop):
        return "done", finished[-1].stop
    for event in reversed(events):
        if event["event"] in ("stopped", "failed"):
            return event["event"], str(event.get("text", ""))
    return ("interrupted", "its driver ended without a word") if events else ("new", "")


def driver(folder: Path) -> str:
    """Who drives the run now: 'process 123 on host, heartbeat 3 s ago'; empty where nobody does.

    On this machine the process itself is looked for; a lease of another machine counts while its heartbeat is fresh by the
    folder's own clock. Never waits, so on another machine it may be late by `PATIENCE_SECONDS`.
    """
    newest = max((folder / "leases").glob("*.json"), default=None)
    if newest is None or newest.with_suffix(".done").exists():
        return ""
    holder = record(newest)
    beat = newest.with_suffix(".beat")
    age = max(0.0, time.time() - (beat if beat.exists() else newest).stat().st_mtime)
    here = holder["host"] == socket.gethostname()
    alive = started_at(holder["pid"]) == holder["started"] if here else age < PATIENCE_SECONDS
    return f"process {holder['pid']} on {holder['host']}, heartbeat {age:.0f} s ago" if alive else ""


def _model_name(model: Any) -> str:
    """A short name of what the run started from: the last part of a hub id or path."""
    text = model if isinstance(model, str) else next((str(v) for v in model.values() if isinstance(v, str)), str(model))
    return text.rstrip("/").rsplit("/", 1)[-1].removeprefix("package:")
