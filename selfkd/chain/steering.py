"""Which rounds are kept, which is best, and when to stop: judged from sealed records alone. Runs nothing and opens no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from selfkd.chain.records import Seal
from selfkd.core import views
from selfkd.recipe.schema import Best, Stop

Metrics = Mapping[str, Any]


def best_round(sealed: Sequence[Seal], best: Best | None) -> int:
    """Return the accepted round with the best metric, the earliest on a tie; the newest accepted one where no metric is named."""
    accepted = [seal for seal in sealed if seal.accepted]
    if best is None:
        return accepted[-1].round if accepted else 0
    sign = 1 if best.mode == "max" else -1
    judged = [seal for seal in accepted if seal.metrics.get(best.metric) is not None]
    if not judged:
        return 0
    return max(judged, key=lambda seal: (sign * seal.metrics[best.metric], -seal.round)).round


def verdict(keep_if: str | None, best: Best | None, sealed: Sequence[Seal], metrics: Metrics) -> tuple[bool, str]:
    """Return (accepted, why not): `keep_if` over this round's metrics, `prev_…` and `best_…`; a null is not accepted, and says so."""
    if not keep_if or not sealed:
        return True, ""
    columns = _columns(metrics) | _columns(sealed[-1].metrics, "prev_")
    columns |= _columns(sealed[best_round(sealed, best)].metrics, "best_")
    numbers = {name: [value] for name, value in columns.items() if isinstance(value, int | float) or value is None}
    frame = pl.DataFrame(numbers, schema=dict.fromkeys(numbers, pl.Float64), strict=False)
    held = frame.select(views.expression(keep_if, frame, "condition", "keep_if")).item()
    return (True, "") if held else (False, f"{'could not judge' if held is None else 'not'} {keep_if}")


def _columns(metrics: Metrics, prefix: str = "") -> dict[str, Any]:
    """Return metrics under the names that SQL can hold: dev/correct is dev_correct."""
    return {f"{prefix}{name.replace('/', '_')}": value for name, value in metrics.items()}


def stop_reason(stop: Stop | None, sealed: Sequence[Seal], metrics: Metrics, index: int, spent: int = 0) -> str:
    """Return why the run ends with round `index`, or ''.

    Patience counts rounds since the best one of the stop metric; `spent` are the tokens generated so far, this round's too.
    """
    if stop is None or index == 0:
        return ""
    if stop.patience and stop.metric:
        values = [*(seal.metrics.get(stop.metric) for seal in sealed), metrics.get(stop.metric)]
        sign = 1 if stop.mode == "max" else -1
        known = [(sign * value, -at) for at, value in enumerate(values) if value is not None]
        if known and index + max(known)[1] >= stop.patience:
            return f"{stop.metric} did not improve for {stop.patience} rounds"
    if stop.tokens and spent >= stop.tokens:
        return f"{spent} tokens were generated, budget {stop.tokens}"
    return ""
