"""The terminal while a run goes on: one line per finished round, one bar for the step in progress.

Reads a run folder, writes nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from selfkd.chain.paths import Paths
from selfkd.errors import Stopped
from selfkd.report import status
from selfkd.report.status import Status
from selfkd.report.tables import console, round_line, span, step_line

PACE_SHARE = 0.05  # of the remaining work must be done before its pace says how long the rest takes
PACE_SECONDS = 1.0  # must have passed as well: the first answers of a batch come late and say little
PLAIN_SECONDS = 10.0  # between two progress lines where the output is a file or a pipe
SILENT_SECONDS = 15.0  # after which such an output gets a line though nothing was reported: an import, a download, a long step
BEAT_SECONDS = 1.0
REDRAWS_PER_SECOND = 4
ENGINE_STAGES = ("generate", "measure")  # stages that wait for an engine to start, the first time


class _Bar(Live):
    """A bar whose thread never dies with a traceback on the screen: the first error is kept for who shows events."""

    error: Exception | None = None

    def refresh(self) -> None:
        try:
            super().refresh()
        except Stopped:  # a signal, in the main thread
            raise
        except Exception as error:
            self.error = self.error or error


class _Pulse:
    """Calls `beat` every second in a thread of its own, as `_Bar` draws: the first error ends it, and is kept for who shows events."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self.error: Exception | None = None
        self._beat, self._ended = beat, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(BEAT_SECONDS)  # no longer: it may be stuck in a pipe that nobody reads

    def _run(self) -> None:
        while not self.error and not self._ended.wait(BEAT_SECONDS):
            self.error = _error_of(self._beat)


@contextmanager
def waiting(what: str, to: Console | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Show that `what` goes on: drawn on a terminal, a line now and then in a pipe. Raises nothing of its own."""
    to = to or console()
    began = printed = clock()

    def line() -> Text:
        return Text(f"{what} …  {span(clock() - began)}", "dim")

    def beat() -> None:
        nonlocal printed
        if clock() - printed >= SILENT_SECONDS:
            printed = clock()
            to.print(line())

    bar = _Bar(console=to, refresh_per_second=REDRAWS_PER_SECOND, transient=True, get_renderable=line)
    sign = bar if to.is_terminal else _Pulse(beat)
    _error_of(sign.start)
    try:
        yield
    finally:
        _error_of(sign.stop)


class RunDisplay:
    """Shows a run. Use as a context manager, and give `show` every event that goes to events.jsonl.

    `show` raises what went wrong with the screen, also in the thread that draws; opening and closing raise nothing. A screen that
    is gone is not written to again. `steps_of` tells how many steps a round has, `begins` what is done before the first step.
    `clock` is the time in seconds, for the pace of plain lines and time left.
    """

    def __init__(
        self,
        folder: Path,
        steps_of: Callable[[int], int],
        to: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        begins: str = "",
    ) -> None:
        self.folder, self.steps_of, self.clock, self.between = folder, steps_of, clock, begins
        self.console = to or console()
        self.live: _Bar | None = None
        self._pulse: _Pulse | None = None
        self._error: Exception | None = None  # of opening the bar; `show` raises it
        self._gone = False  # the terminal was closed, the pipe is broken, the disk behind it is full
        self.current: dict[str, Any] = {}  # the newest event of the step in progress
        self._step_began, self._done_before = 0.0, 0  # when this attempt began the step, and how much it found done
        self._printed_at = self._told_at = -math.inf  # the last line of a step; the last line of any kind
        self._engine_started = False

    def __enter__(self) -> RunDisplay:
        self._step_began = self._told_at = self.clock()  # before the first frame, which shows how long it has been
        if self.console.is_terminal:  # drawn by a thread of its own, so that the clock runs while an engine starts
            self.live = _Bar(
                console=self.console, refresh_per_second=REDRAWS_PER_SECOND, transient=True, get_renderable=self.line
            )
            self._error = _error_of(self.live.start)
        else:
            self._pulse = _Pulse(self._beat)
            self._error = _error_of(self._pulse.start)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back: the bar goes, the cursor returns. May be called twice."""
        if self.live:
            bar, self.live = self.live, None
            self._error = self._error or bar.error
            _error_of(bar.stop)
        if self._pulse:
            pulse, self._pulse = self._pulse, None
            self._error = self._error or pulse.error
            _error_of(pulse.stop)

    def print(self, text: str, style: str = "") -> None:
        self._put(Text(text, style))

    def _put(self, line: Text) -> None:
        self._told_at = self.clock()
        self.console.print(line)

    def _beat(self) -> None:
        """Print the line of the step in progress again where nothing was printed for long."""
        if self.clock() - self._told_at >= SILENT_SECONDS and (line := self.line()):
            self._put(line)

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event; unknown kinds with a text are printed, so that nothing a backend reports is lost."""
        if self._gone:
            return
        try:
            self._raise_of_bar()
            self._show(event)
        except OSError as error:
            self._gone = not isinstance(error, BlockingIOError)  # a slow terminal comes back
            if self._gone:
                self.close()
            raise

    def _raise_of_bar(self) -> None:
        """Raise what opening or drawing the bar raised, or a line of the pulse; neither goes on."""
        if self._error or (self.live and self.live.error) or (self._pulse and self._pulse.error):
            self.close()
            error, self._error = self._error, None
            if error:
                raise error

    def _show(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind in ("step", "progress"):
            self._step(event)
        elif kind == "made":
            self.current = {}
        elif kind == "sealed":
            self._sealed()
        elif event.get("text") and kind not in ("stopped", "failed", "done"):
            self.print(str(event["text"]), "yellow" if kind == "warning" else "dim")

    def _step(self, event: Mapping[str, Any]) -> None:
        """Show a new step, or new figures of this one. Time left is judged by what this attempt did, not by what it found done."""
        before = self.current
        if any(before.get(name) != event.get(name) for name in ("round", "step", "unit")):
            self._step_began, self._done_before = self.clock(), event.get("done", 0)
        same = before if before.get("step") == event.get("step") else {}
        announced: dict[str, Any] = {name: same[name] for name in ("number", "verb", "stage") if name in same}
        self.between = ""
        self.current = {**announced, **event}  # a new dict: the drawing thread reads the old one
        self._engine_started = self._engine_started or bool(event.get("rate"))
        silent = event["event"] == "step" and self._starts_engine()  # for half a minute: say why
        if not self.live and (silent or self.clock() - self._printed_at >= PLAIN_SECONDS):
            self._printed_at = self.clock()
            self._put(self.line())

    def _starts_engine(self) -> bool:
        return not self._engine_started and self.current.get("stage") in ENGINE_STAGES

    def _sealed(self) -> None:
        self.current = {}
        rounds = status.rounds(Paths(self.folder))
        if rounds:
            self._put(round_line(rounds[-1], status.main_split(rounds)))

    def line(self) -> Text:
        """Return the line of the step in progress; before the first one what is done meanwhile, and nothing between steps."""
        current, spent = self.current, span(self.clock() - self._step_began)
        if not current:
            return Text(f"{self.between} …  {spent}" if self.between else "", "dim")
        left = self._seconds_left(current)
        known = current if left is None else {**current, "left": left}
        starting = "starting engine …  " if self._starts_engine() else ""
        return step_line(known, self.steps_of(int(current.get("round", 0))), spent, starting)

    def _seconds_left(self, current: Mapping[str, Any]) -> float | None:
        """Return how long the rest takes at the pace of this attempt; None while that is not known."""
        done, total = current.get("done", 0), current.get("total", 0)
        fresh, spent = done - self._done_before, self.clock() - self._step_began
        if fresh <= PACE_SHARE * (total - self._done_before) or spent <= PACE_SECONDS:
            return None
        return float((total - done) * spent / fresh)


def _error_of(action: Callable[[], None]) -> Exception | None:
    """Return what `action` raised, or None."""
    try:
        action()
    except Stopped:
        raise
    except Exception as error:
        return error
    return None


def states(folder: Path, pause: float = 1.0) -> Iterator[Status]:
    """Yield the state of a run now and whenever it changed, until nobody drives it any more; the last one says how it ended."""
    told = None
    while True:
        state = status.read(folder)
        if told != (told := replace(state, note="")):  # the note of a running one tells how old its heartbeat is
            yield state
        if state.state != "running":
            return
        time.sleep(pause)


def follow(folder: Path, to: Console, pause: float = 1.0) -> Status:
    """Show a run until nobody drives it any more; a terminal is redrawn, a pipe gets a line at most every 10 seconds."""
    printed, state = 0, status.read(folder)
    with RunDisplay(folder, status.step_counts(folder), to) as display:
        for state in states(folder, pause):
            for summary in state.rounds[printed:]:
                to.print(round_line(summary, state.split))
            printed = len(state.rounds)
            if state.state == "running" and state.progress:
                display.show(state.progress)
    return state
