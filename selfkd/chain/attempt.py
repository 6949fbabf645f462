"""One process's try at a run: its number, its log folder, and whoever watches its events."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfkd.chain.paths import Paths
from selfkd.core import storage
from selfkd.errors import Stopped

Watch = Callable[[dict[str, Any]], None]


def nobody(event: dict[str, Any]) -> None:
    """Watch nothing: events still go to events.jsonl."""


@dataclass(frozen=True)
class Attempt:
    """`watch` is called with each event; what it raises stops the run."""

    number: int
    paths: Paths
    watch: Watch = nobody

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
        """Append one line to events.jsonl, and tell whoever watches; a reader skips a torn last line."""
        self.watch(self._write(kind, more))

    def failed(self, error: BaseException) -> None:
        """Record how the attempt ended; whoever watched has seen enough. A failure leaves its traceback in driver.log."""
        if isinstance(error, Stopped | KeyboardInterrupt):
            self._write("stopped", {"text": ""})
            return
        with (self.logs / "driver.log").open("a", encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(error)))
        self._write("failed", {"text": str(error) or type(error).__name__})

    def _write(self, kind: str, more: dict[str, Any]) -> dict[str, Any]:
        event = {"t": round(time.time(), 3), "event": kind, **more}
        with self.paths.events(self.number).open("a", encoding="utf-8") as log:
            log.write(json.dumps(event, default=str) + "\n")
        return event

    @contextmanager
    def logging(self) -> Iterator[None]:
        """What libraries log and warn of in this process goes to driver.log, not between the lines of a screen."""
        root, handler = logging.getLogger(), logging.FileHandler(self.logs / "driver.log", encoding="utf-8")
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
