"""What the updates of a run took: tokens, and optimiser steps, which a control that trains as long as its method is told."""

from __future__ import annotations

from pathlib import Path

from selfkd.chain import records
from selfkd.chain.paths import Paths, no_run
from selfkd.chain.records import Commit, Seal
from selfkd.errors import UsageError

POLICY = "policy"


def steps_taken(folder: Path) -> list[int]:
    """Return the steps of each sealed round after the base, those of several updates of the policy together.

    UsageError where there is no run, or no update of one that counts its steps.
    """
    paths = Paths(folder)
    if not paths.info.is_file():
        raise no_run(folder)
    found = []
    for names in paths.rounds():
        if names.index and names.seal.is_file():
            seal = records.read(names.seal, Seal)
            found.append(sum(steps_of(records.read(names.folder / step.file, Commit)) for step in seal.steps))
    if not any(found):
        raise UsageError(
            "no update of this run says how many steps it took", str(folder), "Name a run of the method that has trained."
        )
    return [max(1, count) for count in found]


def learned(commit: Commit) -> int:
    """Return the tokens that an update learned, to its last step also where an earlier one was picked."""
    whole = commit.notes.get("checked") or {}
    return int(whole.get("trained") or commit.notes.get("train", {}).get("tokens", 0))


def steps_of(commit: Commit) -> int:
    """Return the optimiser steps of an update of the policy, 0 of any other step."""
    return int(commit.notes.get("train", {}).get("steps", 0)) if POLICY in commit.models else 0
