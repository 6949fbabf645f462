"""The prompts of a round that earlier rounds' answers speak for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import polars as pl

from selfkd.core import digest, drawing, views
from selfkd.core.pool import Pool
from selfkd.errors import GuardError
from selfkd.recipe.schema import Take

Made = Callable[[int | None], Iterable[tuple[int, Pool]]]


def chosen(train: Pool, take: Take, by: str, index: int, seed: int, earlier: Made, scores: Iterable[str]) -> pl.DataFrame:
    """Return the `take.n` prompts that `by` speaks for, in the order of the set.

    Those of which it says nothing, as of prompts that nobody asked yet, come before all others: the least asked first, in the order of the
    set. `train` has the prompts that may be asked, `earlier` yields what earlier rounds made, `scores` are the names that they may give.
    """
    view = views.prompt_view(_answered(train, earlier(take.rounds), scores), by)
    where = f"prompts.take 'by' in round {index}"
    found = view.select("id", "n", value=views.expression(by, view, "number", where))
    found = train.prompts.select("id").with_row_index("place").join(found, on="id", how="left", maintain_order="left")
    key = drawing.order(found["value"], found["id"], take.pick, seed, "take", index)
    tie = pl.Series([digest.uniform(seed, "take", index, name, "tie") for name in found["id"]], dtype=pl.Float64)
    found = found.with_columns(key=key, tie=tie)
    unknown = found.filter(pl.col("value").cast(pl.Float64).fill_nan(None).is_null()).sort("n", "place")
    known = found.filter(pl.col("key").is_not_null()).sort("key", "tie", descending=[True, False])
    places = [*unknown["place"], *known["place"]][: take.n]
    if not places:
        raise GuardError(f"no prompt has a chance: '{by}' is 0 or less of all {train.prompts.height}", where, "Change take.by.")
    return train.prompts[sorted(places)]


def _answered(train: Pool, rounds: Iterable[tuple[int, Pool]], scores: Iterable[str]) -> Pool:
    """Return the prompts with the samples and scores of these rounds."""
    pool = Pool({"prompts": train.prompts}, {"prompts": train.files.get("prompts", ())}, scores_named=tuple(scores))
    for _, made in rounds:
        kept = ("samples", "scores")
        pool += Pool(
            {name: made.tables[name] for name in kept if name in made.tables},
            {name: made.files.get(name, ()) for name in kept},
            scores_named=made.scores_named,
        )
    return pool
