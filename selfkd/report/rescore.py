"""A trial without a run: stored samples of a round scored by another function, and what the round would have kept by it.

Nothing is written. The steps behind the score are those of the round itself, walked again over its tables (`chain.again`).
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from selfkd.chain import contents, filtering
from selfkd.chain.again import Walk
from selfkd.chain.run import Run
from selfkd.core import views
from selfkd.core.hardware import usable_cores
from selfkd.core.pool import Function, Pool
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError
from selfkd.rewards.find import wants
from selfkd.rewards.pool import cut, spread
from selfkd.steps.apply import ApplyStep
from selfkd.steps.model_texts import score_rows
from selfkd.steps.score import rows_for_reward

BATCH, TIMEOUT = 32, 60.0  # rows of one call; seconds of one


@dataclass(frozen=True)
class Rescored:
    """A round as it was scored, and as it would have been. `rows` has id, prompt, was, now, why, kept_was, kept_now, one row each sample.

    `as_it_was` are steps that may have chosen by the score and were not run again: functions over tables, and those that could not be.
    """

    name: str
    function: str
    index: int
    rows: pl.DataFrame
    as_it_was: tuple[str, ...] = ()

    def mean(self, column: str) -> float | None:
        found = self.rows[column].mean()
        return float(found) if isinstance(found, int | float) else None

    @property
    def changed(self) -> pl.DataFrame:
        return self.rows.filter(~pl.col("was").eq_missing(pl.col("now")))

    @property
    def moved(self) -> pl.DataFrame:
        """Return the samples that would have been kept and were not, or were kept and would not have been."""
        return self.rows.filter(pl.col("kept_was") != pl.col("kept_now"))


def rescore(run: Run, function: Function, name: str, index: int | None = None) -> Rescored:
    """Score the samples of a round (default: the newest that has some) that have the score `name` by `function` instead.

    UsageError where no sample of that round has such a score, or where it is not sealed: what would be kept is not decided yet.
    """
    index = _round(run, index)
    was = Walk(run, index)
    for _ in was:
        pass
    scored = was.pool.scores.filter((pl.col("name") == name) & pl.col("versus").is_null())
    if not scored.height:
        known = views.score_names(was.pool)
        fix = f"Scores there: {', '.join(known) or 'none'}. Say which one this is instead of: --as NAME"
        raise UsageError(f"no sample of round {index} has a score '{name}'.{did_you_mean(name, known)}", str(run.folder), fix)
    samples = was.pool.samples.filter(pl.col("id").is_in(scored["sample"].implode())).sort("prompt", "id")
    results = _results(function, samples, was.pool)
    would = Walk(run, index, {name: score_rows(samples["id"].to_list(), name, results)})
    blind = tuple(one.made.step for one in would if one.why or one.made.verb == ApplyStep.verb)
    return Rescored(name, function.name, index, _rows(samples, name, results, was.pool, would.pool), blind)


def _round(run: Run, index: int | None) -> int:
    sealed = len(run.sealed())
    if index is None:
        index = contents.samples(run.paths).index
        index = index if index < sealed else sealed - 1
    if not 1 <= index < sealed:
        rounds = f"Sealed rounds: 1 to {sealed - 1}" if sealed > 1 else "No round is sealed yet."
        raise UsageError(f"what round {index} keeps is not decided", str(run.folder), rounds)
    return index


def _results(function: Function, samples: pl.DataFrame, pool: Pool) -> list[tuple[float | None, str]]:
    rows = rows_for_reward(samples, pool, wants(function))
    return [one for batch in spread(function, cut(rows, BATCH), usable_cores(), TIMEOUT) for one in batch]


def _rows(samples: pl.DataFrame, name: str, results: list[tuple[float | None, str]], was: Pool, would: Pool) -> pl.DataFrame:
    before = views.with_scores(samples, was).select("id", was=name)
    now = pl.DataFrame({"id": samples["id"], "now": [value for value, _ in results], "why": [why for _, why in results]})
    learned = bool(was.rows.height or would.rows.height)
    kept = [
        pl.col("id").is_in(_kept(pool, learned).implode()).alias(f"kept_{when}")
        for when, pool in (("was", was), ("now", would))
    ]
    joined = samples.select("id", "prompt", "stream").join(before, on="id").join(now.cast({"now": pl.Float64}), on="id")
    return joined.with_columns(kept).sort("prompt", "id")


def _kept(pool: Pool, learned: bool) -> pl.Series:
    """Return the samples that are learned as good ones; where nothing is ever learned, those that no step dropped."""
    return filtering.kept(pool) if pool.rows.height or not learned else pool.samples["id"].clear()
