"""Which checkpoints stay on disk, and taking the others away. Judges sealed records; nothing but checkpoints is ever removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfkd.chain import records
from selfkd.chain.commit import pruned_paths
from selfkd.chain.records import Seal, Tombstone
from selfkd.chain.run import Run, head_of
from selfkd.chain.steering import best_rounds
from selfkd.core import storage
from selfkd.core.pool import Model
from selfkd.recipe.schema import Recipe


def prune(run: Run) -> None:
    """Take away the checkpoints that `keep` does not name; a tombstone goes first, so a crash between is finished next time.

    Call it under the lease.
    """
    for index, paths in superfluous(run).items():
        names = run.paths.round(index)
        fresh = sorted(set(paths) - set(pruned_paths(names)))
        if fresh:
            records.write(names.next_tombstone(), Tombstone(paths=fresh), run.paths.tmp)
        for path in paths:
            storage.remove(run.paths.folder / path)
    for leftover in _cut_short(run):
        storage.sweep(leftover.parent)


def is_due(run: Run) -> bool:
    """Whether a prune would take anything away: `keep` has changed, or a kill came between a seal and its prune, or inside it."""
    return bool(superfluous(run) or _cut_short(run))


def superfluous(run: Run) -> dict[int, list[str]]:
    """Return {round: checkpoints on disk that `keep` does not name, relative to the run}, by round."""
    sealed = run.sealed()
    rounds = kept_rounds(run.recipe, sealed)
    needed = {path for seal in sealed if seal.round in rounds for model in seal.head().values() for path in _folders(model)}
    needed |= {path for model in head_of(sealed).values() for path in _folders(model)}  # the next round starts from it
    found: dict[int, list[str]] = {}
    for seal in sealed:
        whole = seal.round == 0 and 0 in rounds  # the base and what the warm-up made of it, both
        gone = [path for path in _checkpoints(run, seal) if path not in needed and (run.folder / path).exists()]
        if gone and not whole:
            found[seal.round] = gone
    return found


def _cut_short(run: Run) -> list[Path]:
    return [path for names in run.paths.rounds() for path in names.folder.glob(f"*/{storage.REMOVED}*")]


def _folders(model: Model) -> list[str]:
    """Return the checkpoints that a model needs: its own, and that of the base which an adapter changes."""
    return [model.path, *([model.base] if model.base else [])]


def kept_rounds(recipe: Recipe, sealed: Sequence[Seal]) -> set[int]:
    """Return the rounds whose checkpoints stay: what `keep` says, and what the steps go on using."""
    keep = recipe.keep
    rounds = {seal.round for seal in sealed[len(sealed) - keep.last :]} if keep.last else set()
    rounds |= best_rounds(sealed, recipe.best) if keep.best else set()
    rounds |= {0} if keep.base else set()
    return rounds | _used_rounds(recipe, sealed)


def _used_rounds(recipe: Recipe, sealed: Sequence[Seal]) -> set[int]:
    """Return the rounds whose models the steps name (`from: base`, `reference: round-3`), whatever `keep` says."""
    references = [reference for step in recipe.steps_of(recipe.rounds) for reference in step.models().values()]
    found = {{"base": 0, "warm": 0}.get(reference.when, reference.round) for reference in references}
    best = best_rounds(sealed, recipe.best) if any(reference.when == "best" for reference in references) else set()
    return best | {index for index in found if index is not None}


def _checkpoints(run: Run, seal: Seal) -> list[str]:
    return [entry.path for made in run.commits(seal) for entry in made.models.values()]
