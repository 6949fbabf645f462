"""Which rounds are kept, which is best, and when to stop: judged from sealed records alone. Runs nothing and opens no file.

A metric is compared only between rounds that measured it in the same way: `Measures` says how, and where it differs there is
no value to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from selfkd.chain.records import Amendment, Seal
from selfkd.core import views
from selfkd.core.wording import counted
from selfkd.recipe.schema import Best, Stop

Metrics = Mapping[str, Any]
Measures = Mapping[str, str]  # {metric: digest of the step and the code that measured it}


def best_round(sealed: Sequence[Seal], best: Best | None) -> int:
    """Return the accepted round with the best metric, the earliest on a tie; the newest accepted one where no metric is named.

    Where the metric was measured in several ways, the newest way counts that an accepted round has a value of.
    """
    accepted = [seal for seal in sealed if seal.accepted]
    if best is None:
        return accepted[-1].round if accepted else 0
    judged = _judged(sealed, best)
    return _best_like(judged[-1], judged, best) if judged else 0


def best_rounds(sealed: Sequence[Seal], best: Best | None) -> set[int]:
    """Return the best round of each way in which the metric was measured: an amendment may go back to any of them."""
    judged = _judged(sealed, best) if best else []
    return {best_round(sealed, best)} | {_best_like(one, judged, best) for one in judged if best}


def _judged(sealed: Sequence[Seal], best: Best) -> list[Seal]:
    return [seal for seal in sealed if seal.accepted and seal.metrics.get(best.metric) is not None]


def _best_like(like: Seal, judged: Sequence[Seal], best: Best) -> int:
    """Return the best of the rounds that measured as `like` did."""
    sign = 1 if best.mode == "max" else -1
    alike = [seal for seal in judged if comparable(best.metric, seal.measures, like.measures)]
    return max(alike, key=lambda seal: (sign * seal.metrics[best.metric], -seal.round)).round


def comparable(metric: str, one: Measures, other: Measures) -> bool:
    """Whether two rounds measured a metric in the same way; a record that does not say how counts as the same."""
    return metric not in one or metric not in other or one[metric] == other[metric]


def verdict(
    keep_if: str | None, best: Best | None, sealed: Sequence[Seal], metrics: Metrics, measures: Measures
) -> tuple[bool, str]:
    """Return (accepted, why not): `keep_if` over this round's metrics, `prev_…` of the last accepted round, and `best_…`.

    A null is not accepted, and says so. What another round measured differently is null.
    """
    if not keep_if or not sealed:
        return True, ""
    prev, top = (sealed[at] for at in (best_round(sealed, None), best_round(sealed, best)))
    columns = _columns(metrics) | _compared(prev, metrics, measures, "prev_") | _compared(top, metrics, measures, "best_")
    numbers = {name: [value] for name, value in columns.items() if isinstance(value, int | float) or value is None}
    frame = pl.DataFrame(numbers, schema=dict.fromkeys(numbers, pl.Float64), strict=False)
    parsed = views.expression(keep_if, frame, "condition", "keep_if")
    held = frame.select(parsed).item()
    if held is None:
        return False, f"could not judge {keep_if}" + _changed(parsed.meta.root_names(), prev, top, measures)
    return (True, "") if held else (False, f"not {keep_if}")


def _changed(names: Sequence[str], prev: Seal, top: Seal, measures: Measures) -> str:
    """Return ': dev/right was measured differently in round 1' for the first such column among `names`."""
    for prefix, seal in (("prev_", prev), ("best_", top)):
        for metric in seal.metrics:
            if f"{prefix}{_column(metric)}" in names and not comparable(metric, seal.measures, measures):
                return f": {metric} was measured differently in round {seal.round}"
    return ""


def _compared(seal: Seal, metrics: Metrics, measures: Measures, prefix: str) -> dict[str, Any]:
    """Return another round's metrics under `prefix`, null where it did not measure them, or differently from this round."""
    names = dict.fromkeys((*seal.metrics, *metrics))
    alike = {name: seal.metrics.get(name) if comparable(name, seal.measures, measures) else None for name in names}
    return _columns(alike, prefix)


def _columns(metrics: Metrics, prefix: str = "") -> dict[str, Any]:
    """Return metrics under the names that SQL can hold."""
    return {f"{prefix}{_column(name)}": value for name, value in metrics.items()}


def _column(metric: str) -> str:
    """Return dev/correct as dev_correct."""
    return metric.replace("/", "_")


# ---- the end of a run ----


def stop_reason(stop: Stop | None, sealed: Sequence[Seal], metrics: Metrics, measures: Measures, index: int, spent: int) -> str:
    """Return why the run ends with round `index`, or ''; `spent` tokens were generated so far.

    Patience counts rounds since the best one of the stop metric, or since the run was given more rounds after it had stopped.
    """
    if stop is None or index == 0:
        return ""
    if _patience_ended(stop, sealed, metrics, measures, index):
        return f"{stop.metric} did not improve for {counted(stop.patience or 0, 'round')}"
    return f"{spent} tokens were generated, budget {stop.tokens}" if stop.tokens and spent >= stop.tokens else ""


def ended_early(stop: Stop | None, sealed: Sequence[Seal], amendments: Sequence[Amendment], spent: int) -> str:
    """Return why a run has ended before `rounds` was reached, or '': judged anew by the recipe in force.

    A run that was given another number of rounds after it had stopped goes on.
    """
    given = next((one.sealed for one in reversed(amendments) if "rounds" in one.changed), 0)
    return "" if given == len(sealed) else standing_stop(stop, sealed, spent)


def standing_stop(stop: Stop | None, sealed: Sequence[Seal], spent: int) -> str:
    """Return why a run that stopped early with its newest sealed round would stop there by the recipe in force too, or ''."""
    if not sealed or not sealed[-1].stop:
        return ""
    last = sealed[-1]
    return stop_reason(stop, sealed[:-1], last.metrics, last.measures, last.round, spent)


def _patience_ended(stop: Stop, sealed: Sequence[Seal], metrics: Metrics, measures: Measures, index: int) -> bool:
    if not stop.patience:
        return False
    best = _best_round(stop, sealed, metrics, measures)
    return best is not None and index - max(best, _given_more(stop, sealed)) >= stop.patience


def larger_patience(stop: Stop, sealed: Sequence[Seal], more: int) -> int | None:
    """Return the patience that lets a run make at least so many `more` rounds; None where it is not patience that has ended it."""
    last = sealed[-1]
    known = sealed[:-1], last.metrics, last.measures
    best = _best_round(stop, *known)
    return last.round - best + more if best is not None and _patience_ended(stop, *known, last.round) else None


def _best_round(stop: Stop, sealed: Sequence[Seal], metrics: Metrics, measures: Measures) -> int | None:
    """Return the first round with the best value of the stop metric, the newest with `metrics`; None where no round has one."""
    if not stop.metric:
        return None
    values = [seal.metrics.get(stop.metric) if comparable(stop.metric, seal.measures, measures) else None for seal in sealed]
    sign = 1 if stop.mode == "max" else -1
    known = [(sign * value, -at) for at, value in enumerate([*values, metrics.get(stop.metric)]) if value is not None]
    return -max(known)[1] if known else None


def _given_more(stop: Stop, sealed: Sequence[Seal]) -> int:
    """Return the newest round at which patience had ended, and would again, but the run was given more rounds; 0 where there is none."""
    stopped = (seal for seal in reversed(sealed) if seal.stop)
    ended = (seal for seal in stopped if _patience_ended(stop, sealed[: seal.round], seal.metrics, seal.measures, seal.round))
    return next((seal.round for seal in ended), 0)
