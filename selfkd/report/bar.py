"""The terminal while a run goes on: one line per finished round, one bar for the step in progress. Reads a run folder, writes nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from selfkd.report import status
from selfkd.report.status import Status
from selfkd.report.tables import console, round_line, span, step_line

FEW = 20  # a twentieth of the work must be done before its pace says how long the rest takes
PLAIN_SECONDS = 10.0  # between two progress lines where the output is a file or a pipe
REDRAWS = 4  # a second
ENGINE = ("sample", "measure")  # verbs that wait for an engine the first time


class Screen:
    """Watches a run. Use as a context manager; `watch` takes every event that goes to events.jsonl.

    `steps` says how many steps a round has. `clock` is the time in seconds, for the pace of plain lines and time left.
    """

    def __init__(
        self, folder: Path, steps: Callable[[int], int], to: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.steps, self.clock = folder, steps, clock
        self.console = to or console()
        self.live: Live | None = None
        self.current: dict[str, Any] = {}
        self._began, self._first_done = 0.0, 0
        self._said = -math.inf
        self._warm = False

    def __enter__(self) -> Screen:
        if self.console.is_terminal:  # drawn by a thread of its own, so that the clock runs while an engine starts
            self.live = Live(console=self.console, refresh_per_second=REDRAWS, transient=True, get_renderable=self.line)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back: the bar goes, the cursor returns. May be called twice."""
        if self.live:
            self.live.stop()
            self.live = None

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style))

    def watch(self, event: Mapping[str, Any]) -> None:
        """Show one event; unknown kinds with a text are printed, so that nothing a backend says is lost."""
        kind = event["event"]
        if kind in ("step", "progress"):
            self._step(event)
        elif kind == "made":
            self.current = {}
        elif kind == "sealed":
            self._sealed()
        elif event.get("text") and kind not in ("stopped", "failed", "done"):
            self.say(str(event["text"]), "yellow" if kind == "warning" else "dim")

    def _step(self, event: Mapping[str, Any]) -> None:
        """A new step, or new figures of this one. Time left is judged by what this attempt did, not by what it found done."""
        before = self.current
        if any(before.get(name) != event.get(name) for name in ("round", "step", "unit")):
            self._began, self._first_done = self.clock(), event.get("done", 0)
        same = before if before.get("step") == event.get("step") else {}
        named: dict[str, Any] = {name: same[name] for name in ("number", "verb") if name in same}
        self.current = {**named, **event}  # a new dict: the drawing thread reads the old one
        self._warm = self._warm or bool(event.get("rate"))
        waits = event["event"] == "step" and not self._warm and event.get("verb") in ENGINE  # half a minute of silence: say why
        if not self.live and (waits or self.clock() - self._said >= PLAIN_SECONDS):
            self._said = self.clock()
            self.console.print(self.line())

    def _sealed(self) -> None:
        self.current = {}
        rounds = status.rounds(self.folder)
        if rounds:
            self.console.print(round_line(rounds[-1], status.main_split(rounds)))

    def line(self) -> Text:
        """The step in progress: 'round 2  1/7 sample  ███░  5120/7473  2310 tok/s  left 6 m'; empty between steps."""
        current = self.current
        if not current:
            return Text("")
        left = self._left(current)
        known = current if left is None else {**current, "left": left}
        starting = "starting engine …  " if not self._warm and current.get("verb") in ENGINE else ""
        return step_line(known, self.steps(int(current.get("round", 0))), f"{starting}{span(self.clock() - self._began)}")

    def _left(self, current: Mapping[str, Any]) -> float | None:
        done, total = current.get("done", 0), current.get("total", 0)
        fresh, spent = done - self._first_done, self.clock() - self._began
        known = fresh * FEW > total - self._first_done and spent > 1  # the first answers of a batch come late and say little
        return (total - done) * spent / fresh if known else None


def follow(folder: Path, to: Console, pause: float = 1.0) -> Status:
    """Show a run until nobody drives it any more; a terminal is redrawn, a pipe gets a line at most every 10 seconds."""
    state = status.read(folder)
    with Screen(folder, lambda index: 0, to) as screen:
        sealed = len(state.rounds)
        for done in state.rounds:
            to.print(round_line(done, state.split))
        while state.state == "running":
            if state.progress:
                screen.watch(state.progress)
            time.sleep(pause)
            state = status.read(folder)
            for done in state.rounds[sealed:]:
                to.print(round_line(done, state.split))
            sealed = len(state.rounds)
    return state
