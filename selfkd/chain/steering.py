"""Which rounds are kept, which is best, when to stop, and which checkpoints stay on disk. Judges sealed records; runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from selfkd.core import views
from selfkd.errors import RecipeError
from selfkd.recipe.schema import Recipe

Record = Mapping[str, Any]


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
    held = frame.select(views.expression(recipe.keep_if, frame.columns, "keep_if")).item()
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
