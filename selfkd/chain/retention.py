"""Which checkpoints stay on disk, and taking the others away. Judges sealed records; nothing but checkpoints is ever removed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from selfkd.chain.run import Run
from selfkd.chain.steering import Record, best_round
from selfkd.core import storage
from selfkd.recipe.schema import Recipe


def pruned_paths(round_folder: Path) -> list[str]:
    """Paths (relative to the run) that retention took away from a round."""
    path = round_folder / "pruned.json"
    return list(json.loads(path.read_text())["paths"]) if path.exists() else []


def prune(run: Run, recipe: Recipe) -> None:
    """Take away the checkpoints that `keep` does not name; a tombstone goes first, so a crash between is finished next time."""
    sealed = run.sealed()
    keep = recipe.keep
    rounds = {record["round"] for record in sealed[len(sealed) - keep.last :]} if keep.last else set()
    rounds |= {best_round(sealed, recipe.best)} if keep.best else set()
    rounds |= {0} if keep.base else set()
    rounds |= _named(recipe, sealed)
    needed = {model["path"] for record in sealed if record["round"] in rounds for model in record["models"].values()}
    needed |= {model.path for model in run.head().values()}
    for record in sealed:
        folder = run.round_folder(record["round"])
        whole = record["round"] == 0 and 0 in rounds  # the base and what the warm-up made of it, both
        gone = [path for path in _checkpoints(folder, record) if path not in needed and not whole]
        if gone and not (folder / "pruned.json").exists():
            storage.put_json(folder / "pruned.json", {"paths": gone}, run.tmp)
        for path in pruned_paths(folder):
            if (run.folder / path).exists():
                storage.remove(run.folder / path)


def _named(recipe: Recipe, sealed: Sequence[Record]) -> set[int]:
    """Rounds whose models the recipe's steps go on using (`from: base`, `reference: round-3`), whatever `keep` says."""
    steps = recipe.steps_of(recipe.rounds)
    words = {getattr(step, field, None) for step in steps for field in ("model", "from_", "reference", "logprob")}
    whens = {word.rsplit("@", 1)[-1] for word in words if word}
    known = {"base": 0, "warm": 0, "best": best_round(sealed, recipe.best)}
    return {known[when] for when in whens & known.keys()} | {int(when[6:]) for when in whens if when.startswith("round-")}


def _checkpoints(folder: Path, record: Record) -> list[str]:
    commits = [json.loads((folder / step["file"]).read_text()) for step in record["steps"]]
    return [model["path"] for commit in commits for model in commit["models"].values()]
