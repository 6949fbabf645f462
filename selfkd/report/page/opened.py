"""A run as its page reads it: its status, and the records beneath it, each read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from selfkd.chain import records, steering
from selfkd.chain.measured import Measured
from selfkd.chain.paths import Paths
from selfkd.chain.records import Amendment, Commit, Info, Seal
from selfkd.recipe.schema import Best
from selfkd.report import status
from selfkd.report.status import RoundSummary, Status
from selfkd.report.tables import percent_of


@dataclass(frozen=True)
class Opened:
    """A run, read. `commits` are those of every round that has some, sealed or not."""

    paths: Paths
    info: Info
    state: Status
    seals: Sequence[Seal]
    commits: Mapping[int, Sequence[Commit]]
    amendments: Sequence[Amendment]

    @property
    def recipe(self) -> Mapping[str, Any]:
        return status.in_force(self.info, self.amendments)

    @property
    def forked(self) -> str:
        """Return of which run it was forked, or ''."""
        found = self.info.more.get("forked")
        return f"It was forked of {found['run']} after round {found['after']}." if isinstance(found, Mapping) else ""

    @property
    def rounds(self) -> Sequence[RoundSummary]:
        return self.state.rounds

    @cached_property
    def main(self) -> Mapping[int, Measured]:
        """Return {round: its measurement} of the score that the page is about: that of `best`, else the first one of the main split."""
        named = (self.recipe.get("best") or {}).get("metric")
        found = {one.index: measured for one in self.rounds for measured in one.measured.values() if measured.name == named}
        return found or {one.index: one.measured[self.state.split] for one in self.rounds if self.state.split in one.measured}

    @property
    def metric(self) -> str:
        return next(iter(self.main.values())).name if self.main else ""

    @cached_property
    def percent(self) -> bool:
        return percent_of(list(self.main.values()))

    @cached_property
    def mode(self) -> str:
        return str((self.recipe.get("best") or {}).get("mode", "max"))

    @cached_property
    def best(self) -> int:
        """Return the best round by the recipe, the newest accepted one where that does not say what is best."""
        words = self.recipe.get("best")
        return steering.best_round(self.seals, Best.model_validate(words) if words else None)

    @cached_property
    def shown(self) -> int:
        """Return the round that is held against the base: the best one; where that is the base, the newest one that was kept, else the newest."""
        measured = [one for one in self.rounds if one.index and one.index in self.main]
        kept = [one.index for one in measured if one.accepted]
        return self.best or max(kept or [one.index for one in measured], default=0)

    @property
    def at_shown(self) -> Measured | None:
        return self.main.get(self.shown)

    def name_of(self, index: int) -> str:
        return "base" if index == 0 else f"round {index}"


def open_run(folder: Path) -> Opened:
    """Read a run; UsageError where there is none."""
    paths = Paths(folder)
    return Opened(
        paths=paths,
        info=status.info_of(paths),
        state=status.read(folder),
        seals=status.seals_of(paths),
        commits={
            names.index: [records.read(path, Commit, unchanged=False) for path in names.commits()] for names in paths.rounds()
        },
        amendments=[records.read(path, Amendment, unchanged=False) for path in paths.amendments()],
    )
