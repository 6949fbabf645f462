"""Every selection and every training row of a run made again from its stored tables, by the code and recipe that made them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from selfkd.chain.again import Walk
from selfkd.chain.run import Run
from selfkd.errors import SelfkdError


@dataclass
class Recomputed:
    """What was found: `problems`, one sentence each; how many `steps` were made again, and how many a machine would be needed for."""

    problems: list[str] = field(default_factory=list)
    steps: int = 0
    left_out: int = 0


def recompute(folder: Path) -> Recomputed:
    """Walk every sealed round again. A step whose code is not as it was frozen, or that fails now, is a problem too."""
    found = Recomputed()
    try:
        run = Run.at(folder)
        sealed = run.sealed()
    except SelfkdError as error:
        found.problems.append(str(error))
        return found
    for seal in sealed:
        _walk(run, seal.round, found)
    return found


def _walk(run: Run, index: int, found: Recomputed) -> None:
    try:
        for one in Walk(run, index):
            where = f"{run.paths.round(index).folder.name}/{one.made.number:02d}-{one.made.step}"
            found.problems += [f"{where}: {said}" for said in one.differing()]
            found.problems += [f"{where}: could not be made again: {one.why}"] if one.why else []
            found.steps += one.added is not None
            found.left_out += one.added is None and not one.why
    except SelfkdError as error:
        found.problems.append(f"round {index}: {error}")
