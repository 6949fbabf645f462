"""One process's try at a run: its number, its log folder, and whoever watches its events."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfkd.chain.paths import Paths
from selfkd.core import storage
from selfkd.errors import Stopped

Watch = Callable[[dict[str, Any]], None]
EVENTS, DRIVER_LOG, WATCHER = "events.jsonl", "driver.log", "the display"


def nobody(event: dict[str, Any]) -> None:
    """Watch nothing: events still go to events.jsonl."""


@dataclass(frozen=True)
class Attempt:
    """One try. `watch` is called with each event.

    What a person sees never stops a run: where `watch` raises, or the log cannot be written, that is said once (to whichever of the
    two still works, else on stderr) and the run goes on. Only Stopped, and what is no Exception, passes.
    """

    number: int
    paths: Paths
    watch: Watch = nobody
    broken: set[str] = field(default_factory=set)  # what failed already, and was told of

    @classmethod
    def begin(cls, paths: Paths, watch: Watch = nobody) -> Attempt:
        """Make the next log folder, and say who begins."""
        number = 1 + max(paths.attempts(), default=0)
        storage.make_folder(paths.attempt(number))
        attempt = cls(number, paths, watch)
        attempt.event("attempt", host=platform.node(), pid=os.getpid())
        return attempt

    @property
    def logs(self) -> Path:
        return self.paths.attempt(self.number)

    def event(self, kind: str, **more: Any) -> None:
        """Append one line to events.jsonl, and tell whoever watches; a reader skips a torn line."""
        event = {"t": round(time.time(), 3), "event": kind, **more}
        self._log(event)
        self._tell(event)

    def warn(self, text: str) -> None:
        self.event("warning", text=text)

    def failed(self, error: BaseException) -> None:
        """Record how the attempt ended; whoever watched has seen enough. A failure leaves its traceback in driver.log."""
        if isinstance(error, Stopped | KeyboardInterrupt):
            kind, text = "stopped", ""
        else:
            kind, text = "failed", str(error) or type(error).__name__
            self._trace(error)
        self._log({"t": round(time.time(), 3), "event": kind, "text": text})

    # ---- two ears, each of which may be deaf ----

    def _log(self, event: Mapping[str, Any]) -> None:
        with self.shielded(EVENTS):
            torn = "\n" if EVENTS in self.broken else ""  # of a disk that was full: half a line may stand there
            with self.paths.events(self.number).open("a", encoding="utf-8") as log:
                log.write(torn + json.dumps(event, default=str) + "\n")

    def _tell(self, event: dict[str, Any]) -> None:
        with self.shielded(WATCHER):
            self.watch(event)

    def _trace(self, error: BaseException) -> None:
        with self.shielded(DRIVER_LOG), (self.logs / "driver.log").open("a", encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(error)))

    @contextmanager
    def shielded(self, what: str) -> Iterator[None]:
        """Do what only a person sees: an Exception is noted once as that of `what`."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:
            self._note(what, error)

    def _note(self, what: str, error: Exception) -> None:
        """Say once that `what` failed: in the log and to whoever watches, or on stderr where both failed."""
        if what in self.broken:
            return
        self.broken.add(what)
        text = f"{what} failed ({type(error).__name__}: {error}). The run goes on without."
        event = {"t": round(time.time(), 3), "event": "warning", "text": text}
        if what != EVENTS:
            self._log(event)
        if what != WATCHER:
            self._tell(event)
        else:
            self._trace(error)
        unheard = {EVENTS} if self.watch is nobody else {EVENTS, WATCHER}
        if unheard <= self.broken:
            with suppress(Exception):
                print(text, file=sys.stderr, flush=True)

    # ---- what libraries say ----

    @contextmanager
    def logging(self) -> Iterator[None]:
        """What libraries log and warn of in this process goes to driver.log, not between the lines of a screen."""
        root, handler = logging.getLogger(), _DriverLog(self)
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
            with self.shielded(DRIVER_LOG):
                handler.close()


class _DriverLog(logging.FileHandler):
    """driver.log, opened with its first line; what cannot be written there is told once, not printed between the lines of a screen."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt.logs / "driver.log", encoding="utf-8", delay=True)
        self.attempt = attempt

    def emit(self, record: logging.LogRecord) -> None:
        with self.attempt.shielded(DRIVER_LOG):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by `emit` of the base class, which catches whatever writing raised."""
        raise
