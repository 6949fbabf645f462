"""What lies in a run folder and counts for nothing: leftovers of crashes, which no record names.

A step exists if its commit does, so a kill between its data and its commit leaves files that nobody will read again. Of a round that
is not sealed nothing is garbage: the next attempt takes finished chunks as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfkd.chain import records, rounded
from selfkd.chain.paths import RoundPaths
from selfkd.chain.records import Commit
from selfkd.chain.run import Run
from selfkd.core import storage


@dataclass(frozen=True)
class Garbage:
    """A file or folder that no record names, how many bytes it has, and what it is."""

    path: Path
    bytes: int
    what: str


def garbage(run: Run) -> list[Garbage]:
    """Return what may be taken away, largest first. Call it under the lease, where it is to be taken away: a driver writes into tmp/."""
    found = [*_temporary(run), *(one for names in run.paths.rounds() if names.seal.is_file() for one in _unnamed(run, names))]
    return sorted(found, key=lambda one: (-one.bytes, str(one.path)))


def collect(run: Run) -> list[Garbage]:
    """Take it away, and return what that was; BusyError where a driver holds the run."""
    with run.lease():
        found = garbage(run)
        for one in found:
            storage.remove(one.path)
    return found


def _temporary(run: Run) -> Iterator[Garbage]:
    for path in sorted(run.paths.tmp.iterdir()) if run.paths.tmp.is_dir() else ():
        yield Garbage(path, _size(path), "of an attempt that ended")
    ended = next(run.rounds_to_walk(), None) is None
    for path in sorted(run.paths.updates.iterdir()) if ended and run.paths.updates.is_dir() else ():
        yield Garbage(path, _size(path), "checkpoints of an update that is over")


def _unnamed(run: Run, names: RoundPaths) -> Iterator[Garbage]:
    """Yield the files of a sealed round that neither a commit names nor a copy in bf16, a folder of nothing else as a whole."""
    commits = [records.read(path, Commit) for path in names.commits()]
    named = {run.folder / path for one in commits for path in one.files}
    named |= {run.folder / path for copy in rounded.copies(names).values() for path in copy.files}
    folders = [path for path in sorted(names.folder.iterdir()) if path.is_dir()]
    for folder in folders:
        yield from _inside(folder, named)


def _inside(folder: Path, named: set[Path]) -> Iterator[Garbage]:
    held = storage.files_in(folder)
    if not any(path in named for path in held):
        yield Garbage(folder, _size(folder), "of a step that was made otherwise" if held else "empty")
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _inside(path, named)
        elif path not in named:
            yield Garbage(path, _size(path), "written before a crash, or a second time")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in storage.files_in(path)) if path.is_dir() else path.stat().st_size
