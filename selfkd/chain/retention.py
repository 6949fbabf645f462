"""Which checkpoints stay on disk, in which format, and taking the others away. Judges sealed records; nothing but checkpoints is ever removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfkd.chain import records, rounded
from selfkd.chain.commit import pruned_paths
from selfkd.chain.records import Seal, Tombstone
from selfkd.chain.run import Run, head_of
from selfkd.chain.steering import best_rounds
from selfkd.chain.trust import Trust
from selfkd.core import storage
from selfkd.core.pool import Model
from selfkd.errors import ChainError
from selfkd.recipe.schema import Recipe

ENGINE_FORMAT = {"bf16": "bfloat16"}  # of an engine to which a checkpoint kept so is the same as before


def prune(run: Run, say: Callable[[str], None] = lambda text: None) -> None:
    """Take away the checkpoints that `keep` does not name, and round those that it wants in bf16.

    A tombstone goes first, so a crash between is finished next time. Call it under the lease. `say` hears of what is left as it is.
    """
    for index, paths in superfluous(run).items():
        names = run.paths.round(index)
        fresh = sorted(set(paths) - set(pruned_paths(names)))
        if fresh:
            records.write(names.next_tombstone(), Tombstone(paths=fresh), run.paths.tmp)
        for path in paths:
            for lying in _lying(run, path):
                storage.remove(lying)
    for leftover in _cut_short(run):
        storage.sweep(leftover.parent)
    for paths in to_round(run).values():
        if sound := [path for path in paths if _is_sound(run, path, say)]:
            rounded.make(run.paths, sound)


def is_due(run: Run) -> bool:
    """Whether a prune would take anything away: `keep` has changed, or a kill came between a seal and its prune, or inside it."""
    return bool(superfluous(run) or _cut_short(run) or to_round(run))


def kept_format(recipe: Recipe, numerics: Mapping[str, Any]) -> str:
    """Return the format in which checkpoints are kept that no training needs: fp32 wherever the engine loads other bytes than bf16."""
    wanted = recipe.keep.as_
    return wanted if numerics.get("dtype") == ENGINE_FORMAT.get(wanted) else "fp32"


def format_remark(recipe: Recipe, numerics: Mapping[str, Any]) -> str:
    """Return that `keep` asks for a format in which this run keeps nothing, or ''."""
    if recipe.keep.as_ == kept_format(recipe, numerics):
        return ""
    return f"Checkpoints are kept in fp32: the engine computes in {numerics.get('dtype')}, so bf16 is not what it loads (keep.as: bf16)."


def to_round(run: Run) -> dict[int, list[str]]:
    """Return {round: checkpoints whole on disk that are to be kept in bf16}, without those that a training may yet start from.

    The root stays as it is: runs of one model share its files.
    """
    if kept_format(run.recipe, run.numerics) == "fp32":
        return {}
    sealed = run.sealed()
    needed = _trained_from(run, sealed)
    found: dict[int, list[str]] = {}
    for seal in sealed:
        full = [entry.path for made in run.commits(seal) for entry in made.models.values() if entry.kind == "full"]
        if narrow := [path for path in full if path not in needed and (run.folder / path).is_dir()]:
            found[seal.round] = narrow
    return found


def _trained_from(run: Run, sealed: Sequence[Seal]) -> set[str]:
    """Return the checkpoints that a training may start from or be held against: root, head, what steps name, bases of adapters."""
    used = _used_rounds(run.recipe, sealed)
    heads = [seal.head() for seal in sealed if seal.round in used] + [head_of(sealed), dict(run.loaded())]
    bases = {model.base for seal in sealed for model in seal.head().values() if model.base}
    return bases | {model.path for head in heads for model in head.values()}


def _is_sound(run: Run, path: str, say: Callable[[str], None]) -> bool:
    """Whether a checkpoint is as it was committed: a copy of a damaged one would look as if it were sound."""
    model = next(
        entry.model("")
        for seal in run.sealed()
        for one in run.commits(seal)
        for entry in one.models.values()
        if entry.path == path
    )
    try:
        Trust(run.folder).weights(model)  # hashed now, whatever was known of it when it was committed
    except ChainError as error:
        say(f"{path} stays in fp32: {error.what}.")
        return False
    return True


def _lying(run: Run, path: str) -> list[Path]:
    """Return the folders in which a checkpoint lies: as it was committed, and as a copy in bf16."""
    names = run.paths.round_of(path)
    copy = rounded.copies(names).get(path) if names else None
    return [folder for folder in (run.folder / path, *([run.folder / copy.path] if copy else [])) if folder.exists()]


def superfluous(run: Run) -> dict[int, list[str]]:
    """Return {round: checkpoints on disk that `keep` does not name, and states of optimisers that go on nowhere, relative to the run}."""
    sealed = run.sealed()
    rounds = kept_rounds(run.recipe, sealed)
    needed = {path for seal in sealed if seal.round in rounds for model in seal.head().values() for path in _folders(model)}
    needed |= {path for model in head_of(sealed).values() for path in _folders(model)}  # the next round starts from it
    goes_on = _trained_from(run, sealed)
    found: dict[int, list[str]] = {}
    for seal in sealed:
        whole = seal.round == 0 and 0 in rounds  # the base and what the warm-up made of it, both
        gone = [path for path in _checkpoints(run, seal) if path not in needed and _lying(run, path)]
        gone = [*(gone if not whole else []), *_idle_states(run, seal, goes_on)]
        if gone:
            found[seal.round] = gone
    return found


def _idle_states(run: Run, seal: Seal, goes_on: set[str]) -> list[str]:
    """Return the optimisers' states on disk of a round whose models no training may start from (`goes_on`)."""
    found = [(made.models[role].path, state.path) for made in run.commits(seal) for role, state in made.states.items()]
    return [state for model, state in found if model not in goes_on and (run.folder / state).exists()]


def _cut_short(run: Run) -> list[Path]:
    return [path for names in run.paths.rounds() for path in names.folder.glob(f"*/{storage.REMOVED}*")]


def _folders(model: Model) -> list[str]:
    """Return the checkpoints that a model needs: its own, and that of the base which an adapter changes."""
    return [model.path, *([model.base] if model.base else [])]


def kept_rounds(recipe: Recipe, sealed: Sequence[Seal]) -> set[int]:
    """Return the rounds whose checkpoints stay: what `keep` says, and what the steps go on using."""
    keep = recipe.keep
    rounds = {seal.round for seal in sealed[max(0, len(sealed) - keep.last) :]} if keep.last else set()
    rounds |= best_rounds(sealed, recipe.best) if keep.best else set()
    rounds |= {0} if keep.base else set()
    return rounds | _used_rounds(recipe, sealed)


def _used_rounds(recipe: Recipe, sealed: Sequence[Seal]) -> set[int]:
    """Return the rounds whose models the steps name (`from: base`, `reference: round-3`), whatever `keep` says."""
    references = recipe.named_models()
    found = {{"base": 0, "warm": 0}.get(reference.when, reference.round) for reference in references}
    best = best_rounds(sealed, recipe.best) if any(reference.when == "best" for reference in references) else set()
    return best | {index for index in found if index is not None}


def _checkpoints(run: Run, seal: Seal) -> list[str]:
    return [entry.path for made in run.commits(seal) for entry in made.models.values()]
