"""The state of the optimiser that made a model: finding it, and refusing one that is not that model's, or not as it was committed."""

from __future__ import annotations

from selfkd.backend.base import OptimiserState
from selfkd.chain import records
from selfkd.chain.commit import pruned_paths
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit
from selfkd.chain.trust import Trust
from selfkd.core.pool import Model
from selfkd.errors import ChainError

FRESH = "Write `optimiser: fresh` and repeat the command with --amend."


def state_of(paths: Paths, trust: Trust, model: Model, where: str) -> OptimiserState | None:
    """Return the state that was committed with a model; None where its update left none, or no update made it.

    ChainError where it is of other weights, was taken away, or is not as it was committed: without it an update would end elsewhere.
    """
    for made in _commits(paths, model.path):
        for role in [role for role, entry in made.models.items() if entry.path == model.path and role in made.states]:
            entry = made.states[role]
            if entry.model != model.digest:
                what = f"the optimiser's state {entry.path} belongs to the weights {entry.model[:12]}, not to {model}"
                raise ChainError(what, where, FRESH)
            _refuse_pruned(paths, entry.path, where)
            trust.files(made.files, f"{entry.path}/")
            return OptimiserState((paths.folder / entry.path).absolute(), entry.digest)
    return None


def _commits(paths: Paths, path: str) -> list[Commit]:
    """Return the commits of the round in which a checkpoint lies, sealed or not."""
    names = paths.round_of(path)
    return [records.read(one, Commit) for one in names.commits()] if names else []


def _refuse_pruned(paths: Paths, path: str, where: str) -> None:
    names = paths.round_of(path)
    if names and path in pruned_paths(names) and not (paths.folder / path).exists():
        what = f"the optimiser's state of these weights is not on disk any more: no step went on with them, so it was taken away ({path})"
        raise ChainError(what, where, f"{FRESH}   Or restore this folder from a copy.")
