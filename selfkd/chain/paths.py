"""Every name inside a run folder. No other module spells one, so a reader of a folder and its writer cannot disagree.

run.json  recipe.yaml  recipe.resolved.yaml  prompts/  code/   frozen when the run is created
round-001/01-sample.json          the commit of a step
round-001/01-sample/              its data, each file named by its content
round-001/cut-01-sample-KEY.json  into chunks of what size its answers are cut, where a run is not exact
round-001/sealed.json             the commit of the round
round-001/pruned-001.json         which checkpoints retention took away, and the next time -002
round-001/rounded-001.json        which checkpoints it rounded to bf16, and what they hold since
numerics.json                     what fixes the numbers, from the first engine or trainer on
facts/engine-001.json             what the processes that computed ran on and with
updates/KEY/                      the checkpoints and checks of an update in progress, until its step is committed
amendments/001.json  leases/  logs/attempt-001/  tmp/
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfkd.errors import UsageError


@dataclass(frozen=True)
class RoundPaths:
    """The names of one round."""

    folder: Path
    index: int

    @property
    def holds_records(self) -> bool:
        return any(self.folder.glob("*.json"))

    @property
    def seal(self) -> Path:
        return self.folder / "sealed.json"

    def tombstone(self, number: int) -> Path:
        return self.folder / f"pruned-{number:03d}.json"

    def tombstones(self) -> list[Path]:
        """Return the tombstones on disk, oldest first; the first version of selfkd wrote one of them at most, `pruned.json`."""
        first = self.folder / "pruned.json"
        return [*([first] if first.exists() else []), *_by_number(self.folder, r"pruned-([0-9]{3,})\.json")]

    def next_tombstone(self) -> Path:
        numbers = [int(path.stem.rpartition("-")[2]) for path in self.tombstones() if "-" in path.stem]
        return self.tombstone(1 + max(numbers, default=0))

    def rounded(self) -> list[Path]:
        """Return the records of checkpoints that were rounded to bf16, oldest first."""
        return _by_number(self.folder, r"rounded-([0-9]{3,})\.json")

    def next_rounded(self) -> Path:
        numbers = [int(path.stem.rpartition("-")[2]) for path in self.rounded()]
        return self.folder / f"rounded-{1 + max(numbers, default=0):03d}.json"

    def commit(self, number: int, step: str) -> Path:
        return self.folder / f"{number:02d}-{step}.json"

    def data(self, number: int, step: str) -> Path:
        """Return the folder of what step `number` makes."""
        return self.folder / f"{number:02d}-{step}"

    def cut(self, number: int, step: str, key: str) -> Path:
        return self.folder / f"cut-{number:02d}-{step}-{key[:12]}.json"

    def cuts(self) -> list[Path]:
        """Return the records of how answers were cut."""
        return sorted(self.folder.glob("cut-*.json"))

    def commits(self) -> list[Path]:
        """Return the commits on disk, in the order of the steps: step 100 comes after step 11."""
        return _by_number(self.folder, r"([0-9]{2,})-.+\.json")

    def made_by(self, step: str) -> list[Path]:
        """Return the commits on disk of the step with this name: one, or none."""
        return [path for path in self.commits() if path.stem.partition("-")[2] == step]

    def at_number(self, number: int) -> list[Path]:
        """Return the commits that have this number; more than one would be a mistake."""
        return sorted(self.folder.glob(f"{number:02d}-*.json"))


@dataclass(frozen=True)
class Paths:
    """The names of one run. Records hold paths relative to `folder`, so a run that is moved stays whole."""

    folder: Path

    @property
    def info(self) -> Path:
        """The record that makes a run exist."""
        return self.folder / "run.json"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def resolved(self) -> Path:
        return self.folder / "recipe.resolved.yaml"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts"

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def data(self) -> Path:
        """What `bring` steps bring, as it was read."""
        return self.folder / "data"

    @property
    def leases(self) -> Path:
        return self.folder / "leases"

    @property
    def tmp(self) -> Path:
        """Garbage by definition: whatever a crash leaves here is removed by the next attempt."""
        return self.folder / "tmp"

    @property
    def updates(self) -> Path:
        """What an update in progress goes on from. It goes when its step is committed, and no record names it."""
        return self.folder / "updates"

    def update(self, key: str) -> Path:
        return self.updates / key[:32]

    @property
    def holds_checkpoints(self) -> bool:
        """Whether there is something that an update may go on from."""
        return any(self.updates.glob("*/step-*/seal.json"))

    @property
    def frozen(self) -> tuple[Path, ...]:
        """What creation writes before `run.json`; a crash in between leaves only these."""
        return self.prompts, self.code, self.data, self.recipe, self.resolved, self.tmp

    @property
    def attempted(self) -> tuple[Path, ...]:
        """What attempts leave that committed nothing, beside their logs."""
        return self.folder / "facts", *(names.folder for names in self.rounds() if not names.holds_records)

    @property
    def holds_a_chain(self) -> bool:
        """Whether anything was committed, or computed that a commit may rest on."""
        return bool(self.numerics.exists() or self.amendments() or any(names.holds_records for names in self.rounds()))

    @property
    def was_a_run(self) -> bool:
        """Whether anything here is of a run, be its `run.json` lost."""
        return self.info.exists() or self.resolved.exists() or self.leases.exists() or bool(self.rounds())

    def round(self, index: int) -> RoundPaths:
        return RoundPaths(self.folder / f"round-{index:03d}", index)

    def round_of(self, path: str) -> RoundPaths | None:
        """Return the round that a path relative to the run lies in; None where it lies in none."""
        return next((names for names in self.rounds() if names.folder.name == path.partition("/")[0]), None)

    def rounds(self) -> list[RoundPaths]:
        """Return the rounds that have a folder, by number."""
        found = [RoundPaths(path, index) for index, path in _numbered(self.folder, "round")]
        return sorted(found, key=lambda names: names.index)

    @property
    def numerics(self) -> Path:
        """The record of what fixes the numbers, once an engine or a trainer came up with it."""
        return self.folder / "numerics.json"

    def computer(self, kind: str, number: int) -> Path:
        """Return the record of what processes of a kind compute with; the first is what later ones are compared with."""
        return self.folder / "facts" / f"{kind}-{number:03d}.json"

    def computers(self, kind: str) -> list[Path]:
        """Return the records of a kind, the first one first."""
        return _by_number(self.folder / "facts", rf"{re.escape(kind)}-([0-9]{{3,}})\.json")

    def facts(self) -> list[Path]:
        """Return the records of all kinds."""
        return sorted((self.folder / "facts").glob("*.json"))

    def amendment(self, number: int) -> Path:
        return self.folder / "amendments" / f"{number:03d}.json"

    def amendments(self) -> list[Path]:
        """Return the amendments, oldest first."""
        return _by_number(self.folder / "amendments", r"([0-9]{3,})\.json")

    def attempt(self, number: int) -> Path:
        """Return the log folder of an attempt."""
        return self.folder / "logs" / f"attempt-{number:03d}"

    def attempts(self) -> list[int]:
        """Return the numbers of the attempts that have a log folder, oldest first."""
        return sorted(number for number, _ in _numbered(self.folder / "logs", "attempt"))

    def events(self, number: int) -> Path:
        return self.attempt(number) / "events.jsonl"

    def relative(self, path: Path) -> str:
        """Return `path` as records name it."""
        return path.relative_to(self.folder).as_posix()

    def shown(self, path: Path) -> str:
        """Return `path` as messages name it: the run's own name, then the place inside it."""
        return f"{self.folder.name}/{self.relative(path)}"


def _numbered(folder: Path, kind: str) -> Iterator[tuple[int, Path]]:
    """Yield (number, folder) of `round-001`, …; a copy that somebody called round-001.bak is none of ours."""
    for path in folder.glob(f"{kind}-*"):
        if (found := re.fullmatch(rf"{kind}-([0-9]{{3,}})", path.name)) and path.is_dir():
            yield int(found[1]), path


def _by_number(folder: Path, pattern: str) -> list[Path]:
    """Return the files whose names match `pattern`, by the number in it."""
    found = [(int(match[1]), path) for path in folder.glob("*.json") if (match := re.fullmatch(pattern, path.name))]
    return [path for _, path in sorted(found)]


def find_run(given: Path, runs: Path) -> Path:
    """Return the folder of a run that a person named, by its path or by its bare name under `runs`.

    A folder of that name here that is a run, or was one, is what is meant: another one must not be read in its place. One that
    never was, such as the folder of the recipe, is not. UsageError names both places where the run is in neither.
    """
    if given.is_absolute() or len(given.parts) != 1 or Paths(given).was_a_run:
        return given
    if Paths(runs / given).info.is_file():
        return runs / given
    raise no_run(runs / given, f"{given} and {runs / given}")


def no_run(folder: Path, where: str = "") -> UsageError:
    """Return the error that a folder holds no run; that of a sweep holds several."""
    if runs_under(folder):
        fix = f"Its runs: selfkd status --runs {folder}. All together: selfkd compare {folder}"
        return UsageError("holds runs, and is none", str(folder), fix)
    return UsageError("no run here (run.json is missing)", where or str(folder), "List the runs: selfkd status")


def runs_under(folder: Path) -> list[Path]:
    """Return the folders in `folder` that hold a run."""
    return sorted(path.parent for path in folder.glob("*/run.json"))
