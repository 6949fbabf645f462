"""Which checkpoints stay on disk, and taking the others away. Judges sealed records; nothing but checkpoints is ever removed."""

from __future__ import annotations

from collections.abc import Sequence

from selfkd.chain import records
from selfkd.chain.commit import pruned_paths
from selfkd.chain.records import Seal, Tombstone
from selfkd.chain.run import Run, head_of
from selfkd.chain.steering import best_round
from selfkd.core import storage
from selfkd.core.pool import Model
from selfkd.recipe.schema import Recipe


def prune(run: Run) -> None:
    """Take away the checkpoints that `keep` does not name; a tombstone goes first, so a crash between is finished next time."""
    sealed = run.sealed()
    rounds = kept_rounds(run.recipe, sealed)
    needed = {path for seal in sealed if seal.round in rounds for model in seal.head().values() for path in _folders(model)}
    needed |= {path for model in head_of(sealed).values() for path in _folders(model)}  # the next round starts from it
    for seal in sealed:
        names = run.paths.round(seal.round)
        whole = seal.round == 0 and 0 in rounds  # the base and what the warm-up made of it, both
        gone = [path for path in _checkpoints(run, seal) if path not in needed and not whole]
        if gone and not names.pruned.exists():
            records.write(names.pruned, Tombstone(paths=gone), run.paths.tmp)
        for path in pruned_paths(names):
            if (run.paths.folder / path).exists():
                storage.remove(run.paths.folder / path)


def _folders(model: Model) -> list[str]:
    """Return the checkpoints that a model needs: its own, and that of the base which an adapter changes."""
    return [model.path, *([model.base] if model.base else [])]


def kept_rounds(recipe: Recipe, sealed: Sequence[Seal]) -> set[int]:
    """Return the rounds whose checkpoints stay: what `keep` says, and what the steps go on using."""
    keep = recipe.keep
    rounds = {seal.round for seal in sealed[len(sealed) - keep.last :]} if keep.last else set()
    rounds |= {best_round(sealed, recipe.best)} if keep.best else set()
    rounds |= {0} if keep.base else set()
    return rounds | _used_rounds(recipe, sealed)


def _used_rounds(recipe: Recipe, sealed: Sequence[Seal]) -> set[int]:
    """Return the rounds whose models the steps name (`from: base`, `reference: round-3`), whatever `keep` says."""
    named = {"base": 0, "warm": 0, "best": best_round(sealed, recipe.best)}
    references = [reference for step in recipe.steps_of(recipe.rounds) for reference in step.models().values()]
    found = {named.get(reference.when, reference.round) for reference in references}
    return {index for index in found if index is not None}


def _checkpoints(run: Run, seal: Seal) -> list[str]:
    return [entry.path for made in run.commits(seal) for entry in made.models.values()]
