"""What `selfkd fork` does, from its arguments to an exit code. A docstring here is the text of `selfkd help fork`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selfkd.chain.paths import find_run
from selfkd.cli.commands import RUNS, command_line, refuse_place
from selfkd.core.wording import counted

if TYPE_CHECKING:
    from selfkd.chain.fork import Forked


def fork(run: Path, overrides: Sequence[str], after: int, name: str | None, runs: Path) -> int:
    """Begin a new run as another one was after a round, with changes to its recipe.

    The earlier rounds are shared, and so is each step of the next one that would be made alike. The recipe is the one that made
    the next round; rewards stay as they were frozen, and files that a change names are looked for in the working directory.
    """
    from selfkd.chain.fork import fork as make

    refuse_place(name, runs)
    source = find_run(run, RUNS)
    found = make(source, _free(source.name, name, runs), after, overrides)
    print("\n".join(_told(found, source)))
    return 0


def _free(old: str, name: str | None, runs: Path) -> Path:
    """Return where the new run is to lie: under the name that was given, else the first of old-fork, old-fork-2, … that is free."""
    if name:
        return runs / name
    names = (f"{old}-fork{'' if number == 1 else f'-{number}'}" for number in range(1, 10_000))
    return next(runs / one for one in names if not (runs / one).exists())


def _told(found: Forked, source: Path) -> Iterator[str]:
    shared = "the base" if found.after == 0 else f"the base and {counted(found.after, 'round')}"
    yield f"{found.folder}: {shared} of {source}"
    if found.made:
        taken = ", ".join(found.steps) or "none"
        yield f"  of {counted(found.made, 'step')} that round {found.after + 1} had, as they are: {taken}"
    yield from (f"  {said}" for said in found.changed)
    yield f"\nNext:\n  {command_line('resume', str(found.folder))}"
