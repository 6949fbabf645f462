"""Which numerics a run computes with: those of the machine file until an engine or a trainer came up with them, then always the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfkd.backend.choose import on_cards
from selfkd.backend.machine import NUMERIC, Machine, fixed_numerics
from selfkd.chain import records
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit, Info, Numerics
from selfkd.core import digest
from selfkd.errors import ChainError
from selfkd.recipe.schema import Recipe

COMPUTING = ("engine", "trainer")  # the kinds of processes whose numbers the numerics fix


def asked(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """Return the numerics that a machine file and a recipe ask for."""
    exact = not on_cards(machine) if recipe.exact == "auto" else bool(recipe.exact)
    return {**fixed_numerics(machine), "exact": exact}


def in_force(paths: Paths, info: Info, recipe: Recipe, machine: Machine) -> Mapping[str, Any]:
    """Return the numerics of this attempt: those of the record, those of run.json while the machine is the same, or today's.

    A run made before there was such a record is fixed to those of run.json.
    """
    if paths.numerics.exists():
        return records.read(paths.numerics, Numerics).numerics
    if machine.words() == info.machine or (info.numerics_fixed and _was_used(paths)):
        return info.numerics
    return asked(recipe, machine)


def fix(paths: Paths, numerics: Mapping[str, Any], attempt: int) -> None:
    """Fix the run to the numerics that an engine or a trainer came up with; ChainError where another attempt fixed it to others."""
    plain = digest.as_json(numerics)
    if records.write(paths.numerics, Numerics(numerics=plain, attempt=attempt), paths.tmp):
        return
    if records.read(paths.numerics, Numerics).numerics != plain:
        what = "another driver fixed this run to other numerics meanwhile"
        raise ChainError(what, paths.shown(paths.numerics), "Nothing of this was kept. Repeat the command.")


def refuse_lost(paths: Paths, info: Info) -> None:
    """Raise ChainError where an engine or a trainer came up for this run and the record of its numerics is gone.

    Today's numerics would give other numbers, and the run would not say so.
    """
    if not info.numerics_fixed and not paths.numerics.exists() and (trace := _of_computing(paths)):
        what = f"is missing, but {paths.shown(trace)} was made with it: which numerics this run is fixed to is not known"
        fix = "Restore the file from a copy.   Start a new chain: --name X"
        raise ChainError(what, paths.shown(paths.numerics), fix)


def _of_computing(paths: Paths) -> Path | None:
    """Return a file that is there because an engine or a trainer came up; None where none did."""
    for path in (path for kind in COMPUTING for path in paths.computers(kind)):
        return path
    commits = (path for names in paths.rounds() for path in names.commits())
    return next((path for path in commits if computed(records.read(path, Commit, unchanged=False))), None)


def computed(commit: Commit) -> bool:
    """Whether an engine or a trainer made a step."""
    return any(commit.notes.get("makers", {}).get(kind) for kind in COMPUTING)


def ignored(numerics: Mapping[str, Any], machine: Machine) -> list[str]:
    """Return the fields of a machine that ask for other numerics than the run is fixed to: 'dtype float32 (bfloat16 asked)'.

    A file asks for what it names, a Machine made in Python for what is not the default; threads 0 are whatever is free.
    """
    usual = Machine()
    named = machine.named or [name for name in NUMERIC if getattr(machine, name) != getattr(usual, name)]
    asked = {name: getattr(machine, name) for name in named if name in NUMERIC and (name != "threads" or machine.threads)}
    return [f"{name} {numerics.get(name)} ({value} asked)" for name, value in asked.items() if value != numerics.get(name)]


def _was_used(paths: Paths) -> bool:
    """Whether there is a step beyond the first one, which only brings the model in."""
    return any(len(names.commits()) > 1 or names.index for names in paths.rounds())
