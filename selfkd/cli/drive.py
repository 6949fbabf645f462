"""One attempt at a run, from a terminal: the screen, the attempt's log, and the two signals that stop it.

Stopping loses nothing that was committed: the chunk in flight is asked again by the same command.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from selfkd.chain.run import Run
from selfkd.core.files import as_typed
from selfkd.errors import BusyError, Stopped
from selfkd.report import status
from selfkd.report.bar import Screen
from selfkd.report.tables import console, print_rounds, round_line, rounds_of

AGAIN_SECONDS = 1.0  # `timeout` and schedulers signal a process and its group: two SIGTERMs at once are one wish
SHOW_CURSOR = b"\x1b[?25h\n"


class Interrupts:
    """SIGTERM or Ctrl-C raises Stopped in the main thread; a second one ends the process at once.

    Libraries get in the way: Ray puts its own handler in place when it starts, and code that catches every exception may
    swallow ours. So `check`, called at each event, puts the handler back and raises again.
    """

    def __init__(self) -> None:
        self.stopped, self._at = False, -AGAIN_SECONDS
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        self._install()
        if self.stopped:
            raise Stopped("stopped on request")

    def _install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and time.monotonic() - self._at < AGAIN_SECONDS:
            return
        if self.stopped:
            if sys.stderr.isatty():
                os.write(2, SHOW_CURSOR)  # no Python stream here: it may be locked by what was interrupted
            os._exit(Stopped.code)
        self.stopped, self._at = True, time.monotonic()
        raise Stopped("stopped on request")


def drive(run: Run) -> status.Status:
    """Walk the run to its end, showing it; the state it ends in. Raises Stopped, or what went wrong after logging it."""
    state = status.read(run.folder)
    if state.state == "done" and next(run.rounds_to_walk(), None) is None:
        return state  # nothing to do: no engine, no attempt, no lease
    holder = status.driver(run.folder)
    if holder:
        fix = f"Watch it: selfkd status {run.folder} --follow   Or stop it, or give this run another name: --name X"
        raise BusyError(f"another driver holds this run ({holder})", str(run.folder), fix)
    screen = Screen(run.folder, lambda index: len(run.recipe.steps_of(index)))
    with Interrupts() as interrupts, screen:
        _announce(run, state, screen)
        run.watch = _watcher(interrupts, screen)
        try:
            _walk(run)
        except BaseException as error:
            run.watch = lambda event: None
            told = _told(error, interrupts)
            _log(told, run)
            if told is error:
                raise
            raise told from error
    return status.read(run.folder)


def print_end(state: status.Status, following: Mapping[str, str]) -> None:
    """The table of rounds, and the commands that come next."""
    to = console()
    to.print()
    print_rounds(state, to)
    to.print("\nNext:")
    width = max(len(command) for command in following.values())
    for meaning, command in following.items():
        to.print(f"  {command:<{width}}   # {meaning}", soft_wrap=True, markup=False)


def _announce(run: Run, state: status.Status, screen: Screen) -> None:
    """The head line, the rounds sealed by earlier attempts, and how to stop."""
    run.begin_attempt()
    screen.say(f"{state.name} · {state.model} · {rounds_of(run.recipe.rounds)} · {run.machine.backend}", "bold")
    for done in state.rounds:
        screen.console.print(round_line(done, state.split))
    screen.say(f"Ctrl-C is safe; repeat the command to go on.   Log: {as_typed(run.log_folder())}", "dim")


def _watcher(interrupts: Interrupts, screen: Screen) -> Callable[[dict[str, Any]], None]:
    def watch(event: dict[str, Any]) -> None:
        interrupts.check()
        screen.watch(event)

    return watch


def _walk(run: Run) -> None:
    from selfkd.backend import open_backend
    from selfkd.chain.loop import walk

    with _logging_to(run.log_folder() / "driver.log"):
        run.check_head()  # a round checks it only for an attempt that began inside it; this one began before the engine
        with closing(open_backend(run.machine, run.numerics, run.log_folder())) as backend:
            walk(run, backend)
        run.event("done")


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """What libraries log and warn of in this process goes to the attempt's log, not between the lines of the screen."""
    root, handler = logging.getLogger(), logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


def _told(error: BaseException, interrupts: Interrupts) -> BaseException:
    """What stopped the run, in our words: whatever a stop made a library raise is still a stop."""
    by_ray = isinstance(error, SystemExit) and error.code == signal.SIGTERM  # Ray's own handler was first
    if isinstance(error, Stopped) or not (interrupts.stopped or by_ray or isinstance(error, KeyboardInterrupt)):
        return error
    return Stopped("stopped on request")


def _log(error: BaseException, run: Run) -> None:
    """Words to events.jsonl, the traceback of a failure to driver.log, and a note on the error that says where."""
    if isinstance(error, Stopped):
        run.event("stopped", text="")
        return
    with (run.log_folder() / "driver.log").open("a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))
    run.event("failed", text=str(error) or type(error).__name__)
    error.add_note(f"Log: {as_typed(run.log_folder())}")
