"""A wish to stop, while this very process trains: the step at hand is finished and sealed, as a rank of a group would.

The handler of whoever drives the run would raise in the middle of a step, which leaves nothing that could be saved.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from selfkd.backend.base import OnSteps, Saves, TrainProgress
from selfkd.backend.trainer import sealed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopped_gently(saves: Saves | None) -> Iterator[Callable[[OnSteps], OnSteps]]:
    """Have the first Ctrl-C or SIGTERM ask the update to end behind its step; a second one, or STOP_SECONDS, goes to the handler before.

    Yields how to hear of steps: whoever hears of them may put a handler of its own in place, and ours goes back behind that.
    Outside of the main thread, and where no checkpoint is to be made, everything stays as it is.
    """
    if saves is None or not saves.minutes or threading.current_thread() is not threading.main_thread():
        yield lambda on_progress: on_progress
        return
    asking = _Asking(saves)
    asking.install()
    try:
        yield asking.listen
    finally:
        asking.leave()


class _Asking:
    """The handlers of one update. `before` are those that it took the place of."""

    def __init__(self, saves: Saves) -> None:
        self.flag, self.began = saves.folder / sealed.STOP, time.monotonic()
        self.before: dict[int, Any] = {}
        self.again: threading.Timer | None = None

    def install(self) -> None:
        for number in SIGNALS:
            if callable(found := signal.getsignal(number)) and found != self.asked:
                self.before[number] = found
                signal.signal(number, self.asked)

    def leave(self) -> None:
        if self.again:
            self.again.cancel()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def listen(self, on_progress: OnSteps) -> OnSteps:
        def heard(progress: TrainProgress) -> None:
            on_progress(progress)
            self.install()

        return heard

    def asked(self, number: int, frame: Any) -> None:
        if self.again or time.monotonic() - self.began < sealed.WORTH_SECONDS:
            self.before[number](number, frame)
            return
        self.flag.touch()
        self.again = threading.Timer(sealed.STOP_SECONDS, os.kill, (os.getpid(), number))
        self.again.daemon = True
        self.again.start()
