"""Scores dealt out anew among samples: the control in which a reward says nothing, and keeps as much as before.

A sample's scores move together. They go to a sample of another prompt that ended alike and has as many scored samples, so a selection
keeps as many samples of as many prompts, and a pair is found for as many.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from selfkd.core import digest, views
from selfkd.core.pool import Pool
from selfkd.steps.model_texts import score_rows

UNSCORED_GIVER = "the sample whose score it was dealt has none"
ENDED = pl.col("finish_reason") == "stop"  # most selections ask for it, and a cut answer is seldom right


def dealt_scores(pool: Pool, samples: pl.DataFrame, names: Sequence[str], as_: Sequence[str]) -> list[pl.DataFrame]:
    """Return scores for samples, each with those of another one; a sample that nobody tried to score takes no part."""
    known = pool.scores.filter(pl.col("name").is_in(list(names))).select(id="sample").unique()
    todo = views.with_scores(samples, pool).join(known, on="id", how="semi").sort("id")
    whose, values = dealt(todo), dict(zip(todo["id"], todo.select(names).iter_rows(), strict=True))
    rows = [values[whose[name]] for name in todo["id"]]
    return [
        score_rows(todo["id"].to_list(), score, [(row[at], "" if row[at] is not None else UNSCORED_GIVER) for row in rows])
        for at, score in enumerate(as_)
    ]


def dealt(samples: pl.DataFrame) -> dict[str, str]:
    """Return {sample: the sample whose scores it gets}, a permutation; columns id, prompt, finish_reason, tiebreak.

    The order is hashed from `tiebreak`, which has the run's seed in it, so steps that score the same samples deal alike.
    """
    ended = samples.with_columns(ended=ENDED.fill_null(False))
    drawn = [digest.uniform("dealt", name, tie) for name, tie in ended.select("id", "tiebreak").iter_rows()]
    ordered = ended.with_columns(drawn=pl.Series(drawn, dtype=pl.Float64)).sort("drawn", "id")
    groups: dict[tuple[bool, int], list[list[str]]] = {}
    for key, part in ordered.group_by("prompt", "ended", maintain_order=True):
        groups.setdefault((bool(key[1]), part.height), []).append(part["id"].to_list())
    return {taker: giver for alike in groups.values() for taker, giver in _between(alike)}


def _between(givers: Sequence[list[str]]) -> list[tuple[str, str]]:
    """Return (taker, giver) of groups of one size. Givers stand in a drawn order and takers in that of their ids, which knows no score."""
    takers = sorted(sorted(group) for group in givers)
    return [pair for taker, giver in zip(takers, givers, strict=True) for pair in zip(taker, giver, strict=True)]
