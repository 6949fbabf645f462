"""The logs of a run's attempts: what happened, line by line, and what its engines and ranks said.

Events are those of events.jsonl, in words and without figures of progress; all other files are shown as they are.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from selfkd.chain.attempt import DRIVER_LOG, EVENTS
from selfkd.chain.paths import Paths
from selfkd.core.wording import counted, did_you_mean
from selfkd.errors import UsageError
from selfkd.report import status

SILENT = ("progress",)  # kinds of events that a log need not tell


@dataclass(frozen=True)
class Line:
    """A line of a log: which one, its text, and of events the event itself. `failed` marks what a person must not miss."""

    log: str
    text: str
    event: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.event.get("event") in ("warning", "failed")


@dataclass(frozen=True)
class Logs:
    """The logs of one attempt: {name: file}, the events first, then the driver's, then those of engines, ranks and Ray."""

    folder: Path
    attempt: int
    attempts: tuple[int, ...]
    files: Mapping[str, Path]

    def chosen(self, name: str | None) -> list[str]:
        """Return the logs to read: events and what the driver said, or the one that is named. UsageError where there is none."""
        if name is None:
            return [one for one in self.files if one in (_stem(EVENTS), _stem(DRIVER_LOG))]
        if name not in self.files:
            fix = f"Logs of this attempt: {', '.join(self.files)}"
            raise UsageError(f"no log '{name}'.{did_you_mean(name, self.files)}", str(self.folder), fix)
        return [name]

    def others(self, shown: list[str]) -> str:
        """Return which other logs are not empty, those that Ray keeps of itself counted."""
        names = [name for name, path in self.files.items() if name not in shown and path.stat().st_size]
        own, more = [name for name in names if "/" not in name], sum("/" in name for name in names)
        return ", ".join([*own, *([f"{counted(more, 'file')} under ray/"] if more else [])])


def of(folder: Path, attempt: int | None = None) -> Logs:
    """Return the logs of an attempt, of the newest by default; UsageError where there is none."""
    paths = Paths(folder)
    status.info_of(paths)
    there = paths.attempts()
    if not there:
        raise UsageError("no attempt at this run was made yet", str(folder), "Start it: selfkd resume RUN")
    number = there[-1] if attempt is None else attempt
    if number not in there:
        raise UsageError(f"there is no attempt {number}", str(folder), f"Attempts: {', '.join(map(str, there))}")
    home = paths.attempt(number)
    files = {
        _stem(path.relative_to(home).as_posix()): path for path in sorted(home.rglob("*")) if path.is_file() and _is_log(path)
    }
    first = [name for name in (_stem(EVENTS), _stem(DRIVER_LOG)) if name in files]
    rest = sorted((name for name in files if name not in first), key=lambda name: (name.count("/"), name))
    return Logs(folder, number, tuple(there), {name: files[name] for name in (*first, *rest)})


def _is_log(path: Path) -> bool:
    return path.suffix in (".log", ".jsonl", ".out", ".err", ".txt")


def _stem(name: str) -> str:
    return name.removesuffix(".log").removesuffix(".jsonl")


def read(logs: Logs, name: str | None = None, last: int | None = None) -> list[Line]:
    """Return the lines of the chosen logs, of each only the `last` ones; a torn last line is left out of the events."""
    found: list[Line] = []
    for one in logs.chosen(name):
        found += deque(_lines(one, logs.files[one].read_text("utf-8", errors="replace").splitlines()), last)
    return found


def follow(folder: Path, name: str | None = None, pause: float = 0.5) -> Iterator[Line]:
    """Yield lines of the newest attempt's logs as they come, until nobody drives the run any more; of a new attempt, its own."""
    places: dict[Path, int] = {}
    while True:
        running = status.read(folder).state == "running"  # asked first: what is written before the end is read after it
        logs = of(folder)
        for one in logs.chosen(name) if name is None or name in logs.files else ():
            yield from _lines(one, _new(logs.files[one], places))
        if not running:
            return
        time.sleep(pause)


def _new(path: Path, places: dict[Path, int]) -> list[str]:
    """Return the whole lines that were added to a file since it was last read."""
    with path.open("rb") as handle:
        handle.seek(places.get(path, 0))
        whole = handle.read().rpartition(b"\n")[0]
    places[path] = places.get(path, 0) + (len(whole) + 1 if whole else 0)
    return whole.decode("utf-8", errors="replace").splitlines()


def _lines(name: str, raw: list[str]) -> Iterator[Line]:
    if name != _stem(EVENTS):
        yield from (Line(name, text) for text in raw)
        return
    for text in raw:
        event = status.event_of(text.encode())
        if event and event["event"] not in SILENT:
            yield Line(name, _said(event), event)


def _said(event: Mapping[str, Any]) -> str:
    """Return an event as a line: when, and what happened."""
    when = datetime.fromtimestamp(event["t"]).strftime("%Y-%m-%d %H:%M:%S") if isinstance(event.get("t"), int | float) else ""
    return f"{when}  {_words(event)}".strip()


def _words(event: Mapping[str, Any]) -> str:
    kind, index, step = event["event"], event.get("round"), event.get("step")
    if kind == "attempt":
        return f"attempt begins: process {event.get('pid')} on {event.get('host')}"
    if kind == "round":
        return f"round {index} of {event.get('last')}"
    if kind == "step":
        return f"round {index}: {step} begins"
    if kind == "made":
        seconds = event.get("seconds")
        return f"round {index}: {step} is made" + (f", {seconds:.1f} s" if isinstance(seconds, int | float) else "")
    if kind == "sealed":
        return f"round {index} is sealed" + ("" if event.get("accepted", True) else ", rolled back")
    text = str(event.get("text") or "")
    rest = {name: value for name, value in event.items() if name not in ("t", "event", "text")}
    return f"{kind}: {text}" if text else kind + (f" {json.dumps(rest, default=str)}" if rest else "")
