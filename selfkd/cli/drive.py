"""One attempt at a run, from a terminal: what is shown of it, its log, and the two signals that stop it.

Stopping loses nothing that was committed: the same command generates the chunk in flight again.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from selfkd.backend.machine import SLOW
from selfkd.chain import numerics
from selfkd.chain.attempt import WATCHER, Attempt, Watch, nobody
from selfkd.chain.drive import catch_up, is_finished, refuse_second_driver
from selfkd.chain.drive import drive as walk_to_the_end
from selfkd.chain.run import Run
from selfkd.core.accelerator import accelerator
from selfkd.core.files import as_typed
from selfkd.core.hardware import usable_cores
from selfkd.errors import STOPPED, Stopped
from selfkd.report import status
from selfkd.report.bar import RunDisplay
from selfkd.report.tables import begins_again, console, print_rounds, round_line, rounds_of
from selfkd.report.tracking import Beside, said_of

REPEAT_SECONDS = 1.0  # `timeout` and schedulers signal a process and its group: a SIGTERM this soon is the same wish again
SIGNALS = (signal.SIGINT, signal.SIGTERM)
STARTED = {"ray": "Ray", "local": "in this process", "fake": "the fake model"}  # what is waited for before the first step
SHOW_CURSOR = b"\x1b[?25h\n"


class Interrupts:
    """SIGTERM or Ctrl-C raises Stopped in the main thread; a second one ends the process at once.

    Libraries get in the way: Ray puts its own handler in place when it starts, and code that catches every exception may
    swallow ours. So `check`, called at each event, puts the handler back and raises again.
    """

    def __init__(self) -> None:
        self.stopped, self._stopped_at = False, -math.inf
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._handlers_before = {number: signal.getsignal(number) for number in SIGNALS}
        self._install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Put the handler back, and raise Stopped again where a stop was asked for. Only the main thread can do either."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._install()
        if self.stopped:
            raise Stopped(STOPPED)

    def _install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and time.monotonic() - self._stopped_at < REPEAT_SECONDS:
            return
        if self.stopped:
            if sys.stderr.isatty():
                os.write(2, SHOW_CURSOR)  # no Python stream here: it may be locked by what was interrupted
            os._exit(Stopped.code)
        self.stopped, self._stopped_at = True, time.monotonic()
        raise Stopped(STOPPED)


def drive(run: Run, watch: Watch = nobody, targets: Sequence[str] = ()) -> None:
    """Walk the run to its end, showing it; `watch` is told of events too, and may raise Stopped. `targets` are told of its rounds.

    Raise Stopped, or what went wrong after logging it; never what went wrong with showing.
    """
    if is_finished(run):
        catch_up(run)
        return  # no engine and no attempt
    refuse_second_driver(run)
    stopped_in = status.read(run.folder).progress
    begins = f"starting {STARTED.get(run.machine.backend, run.machine.backend)}"
    display = RunDisplay(run.folder, lambda index: len(run.recipe.steps_of(index)), begins=begins)
    with Interrupts() as interrupts, display:
        attempt = run.begin(_observer(interrupts, display, watch))
        beside = Beside(run.folder, targets, attempt.logs, attempt.warn)
        with attempt.shielded(WATCHER):
            _announce(run, attempt, display)
            if line := said_of(targets):
                display.print(line, "dim")
            if (line := begins_again(stopped_in)) and not run.paths.holds_checkpoints:
                display.print(line, "dim")
        with beside:
            try:
                walk_to_the_end(run, attempt)
            except BaseException as error:
                reason = _reason(error, interrupts)
                attempt.failed(reason)
                if not isinstance(reason, Stopped):
                    reason.add_note(f"Log: {as_typed(attempt.logs)}")
                if reason is error:
                    raise
                raise reason from error


def print_end(state: status.Status, following: Mapping[str, str]) -> None:
    """Print the table of rounds, and the commands that come next."""
    to = console()
    to.print()
    print_rounds(state, to)
    to.print("\nNext:")
    width = max(len(command) for command in following.values())
    for meaning, command in following.items():
        to.print(f"  {command:<{width}}   # {meaning}", soft_wrap=True, markup=False)


def _announce(run: Run, attempt: Attempt, display: RunDisplay) -> None:
    """Print the head line, the number formats, the rounds sealed by earlier attempts, and how to stop."""
    state = status.read(run.folder)
    display.print(f"{state.name} · {state.model} · {rounds_of(run.recipe.rounds)} · {run.machine.backend}", "bold")
    if line := numerics.told(run.numerics, run.recipe):
        display.print(line, "dim")
    if line := numerics.spare_cores(run.numerics, run.info.machine, usable_cores(), accelerator().on_cards):
        display.print(line, "dim")
    if run.machine.generator == "transformers":
        display.print(f"generator: {SLOW}", "yellow")
    for summary in state.rounds:
        display.console.print(round_line(summary, state.split))
    display.print(f"Ctrl-C is safe; repeat the command to go on.   Log: {as_typed(attempt.logs)}", "dim")


def _observer(interrupts: Interrupts, display: RunDisplay, watch: Watch) -> Watch:
    def observe(event: dict[str, Any]) -> None:
        interrupts.check()
        watch(event)
        display.show(event)

    return observe


def _reason(error: BaseException, interrupts: Interrupts) -> BaseException:
    """Return why the run ended: Stopped for whatever error a stop made a library raise, else the error itself."""
    by_ray = isinstance(error, SystemExit) and error.code == signal.SIGTERM  # Ray's own handler was first
    asked_to_stop = interrupts.stopped or by_ray or isinstance(error, KeyboardInterrupt)
    return Stopped(STOPPED) if asked_to_stop and not isinstance(error, Stopped) else error
