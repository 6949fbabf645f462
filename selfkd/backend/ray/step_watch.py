"""Whether ranks still make steps: of a rank that hangs nobody hears, for its process lives on and its neighbours wait for it.

Only an update that made a step can hang here: before the first one models are read and kernels compiled, which takes what it takes,
and behind the last one the child is written. Knows neither Ray nor a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from selfkd.backend.base import TrainProgress
from selfkd.backend.trainer import sealed

HANG_SECONDS = 3600.0  # without a step: a step that holds the longest row may take a hundred times as long as the others
LONGEST_STEPS = 20.0  # so many times the longest step so far, where that is more
MOST_AT_ONCE = 10.0  # seconds between two looks that count: where more went by, the driver was stopped, and the ranks with it


@dataclass
class StepWatch:
    """One try of an update. `saves` is the folder of its checkpoints: while one is written, no step is due.

    `until` is the step behind which it hands out its model, where it does so before its last one.
    """

    saves: Path | None = None
    until: int | None = None
    longest: float = 0.0
    _reached: float = 0.0  # seconds of the update, as its steps tell them
    _looked: float = 0.0
    _waited: float = 0.0
    _due: bool = False

    def heard(self, progress: TrainProgress) -> None:
        """Note a step; what ranks say between steps is none, nor is where they go on from."""
        if not progress.keys() & {"said", "warning", "computers"}:
            self.longest = max(self.longest, progress["seconds"] - self._reached)
            last = progress["steps"] if self.until is None else min(self.until, progress["steps"])
            self._due, self._waited = progress["step"] < last, 0.0
        self._reached = max(self._reached, progress["seconds"])

    def hangs(self, now: float) -> str:
        """Return why the update counts as hanging, or ''. Called again and again."""
        passed, self._looked = min(now - self._looked, MOST_AT_ONCE), now
        if self._due and not (self.saves and (self.saves / sealed.DRAFT).exists()):
            self._waited += passed
        most = max(HANG_SECONDS, LONGEST_STEPS * self.longest)
        return f"no step for {most:.0f} s, and the longest so far took {self.longest:.0f} s" if self._waited > most else ""
