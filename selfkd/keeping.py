"""Which rounds are kept, which is best, when to stop, and which checkpoints stay on disk. Judges sealed records; runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from selfkd import storage, tables
from selfkd.errors import RecipeError

if TYPE_CHECKING:
    from selfkd.recipe import Recipe
    from selfkd.run import Run

Record = Mapping[str, Any]


def pruned(round_folder: Path) -> list[str]:
    """Paths (relative to the run) that retention took away from a round."""
    path = round_folder / "pruned.json"
    return list(json.loads(path.read_text())["paths"]) if path.exists() else []


def best_round(sealed: Sequence[Record], best: Any) -> int:
    """The kept round with the best metric, the earliest on a tie; the newest kept one where the recipe names no metric."""
    kept = [record for record in sealed if record["kept"]]
    if best is None:
        return int(kept[-1]["round"]) if kept else 0
    sign = 1 if best.mode == "max" else -1
    judged = [record for record in kept if record["metrics"].get(best.metric) is not None]
    if not judged:
        return 0
    return int(max(judged, key=lambda record: (sign * record["metrics"][best.metric], -record["round"]))["round"])


def verdict(recipe: Recipe, sealed: Sequence[Record], metrics: Mapping[str, Any]) -> tuple[bool, str]:
    """(kept, why not): `keep_if` over this round's metrics, `prev_…` and `best_…`; a null is not kept, and says so."""
    if not recipe.keep_if or not sealed:
        return True, ""
    best = sealed[best_round(sealed, recipe.best)]["metrics"]
    columns = {_column(name): value for name, value in metrics.items()}
    columns |= {f"prev_{_column(name)}": value for name, value in sealed[-1]["metrics"].items()}
    columns |= {f"best_{_column(name)}": value for name, value in best.items()}
    numbers = {name: [value] for name, value in columns.items() if isinstance(value, int | float) or value is None}
    frame = pl.DataFrame(numbers)
    held = frame.select(tables.expression(recipe.keep_if, frame.columns, "keep_if")).item()
    if not isinstance(held, bool) and held is not None:
        raise RecipeError(f"'{recipe.keep_if}' is not true or false", "keep_if")
    return (True, "") if held else (False, f"{'could not judge' if held is None else 'not'} {recipe.keep_if}")


def _column(metric: str) -> str:
    return metric.replace("/", "_")


def stop_reason(recipe: Recipe, sealed: Sequence[Record], metrics: Mapping[str, Any], index: int) -> str:
    """Why the run ends with this round, or ''. Patience counts rounds since the best one of the stop metric."""
    stop = recipe.stop
    if stop is None or index == 0:
        return ""
    if stop.patience and stop.metric:
        values = [record["metrics"].get(stop.metric) for record in sealed] + [metrics.get(stop.metric)]
        sign = 1 if stop.mode == "max" else -1
        known = [(sign * value, -at) for at, value in enumerate(values) if value is not None]
        if known and index + max(known)[1] >= stop.patience:
            return f"{stop.metric} did not improve for {stop.patience} rounds"
    spent = sum(record["notes"].get("tokens", 0) for record in sealed)
    if stop.tokens and spent >= stop.tokens:
        return f"{spent} tokens were generated, budget {stop.tokens}"
    return ""


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
        for path in pruned(folder):
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
