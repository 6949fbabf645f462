"""What a row teaches in place of the answer as it was written: a template's text, such as only the result, or a part of it. Knows neither rows nor losses."""

from __future__ import annotations

import polars as pl

from selfkd.core import views
from selfkd.core.pool import HEAVY, Pool
from selfkd.steps.context import Render, Row
from selfkd.steps.pairing import differing_step

EMPTY = "nothing is left of it as a completion"


def columns(pool: Pool) -> list[str]:
    """Return what such a template sees of a sample."""
    return [*views.with_scores(pool.samples.clear(), pool).columns, *HEAVY["samples"]]


def reworded(part: pl.DataFrame, pool: Pool, render: Render) -> pl.DataFrame:
    """Return rows (columns chosen and chosen_text) with their texts made anew from prompt and sample.

    A new text has no token ids of an engine's: the trainer makes them. It ends where it ends.
    """
    samples = pool.samples.filter(pl.col("id").is_in(part["chosen"].implode()))
    seen = views.with_heavy(views.with_scores(samples, pool), pool, HEAVY["samples"])
    prompts = pool.scan("prompts").filter(pl.col("id").is_in(part["prompt"].unique().implode())).collect()
    asked = {row["id"]: row for row in prompts.iter_rows(named=True)}
    said = {sample["id"]: _text(render, asked[sample["prompt"]], sample) for sample in seen.iter_rows(named=True)}
    texts = pl.Series([said[name] for name in part["chosen"]], dtype=pl.String)
    return part.with_columns(chosen_text=texts, chosen_ids=pl.lit(None, part.schema["chosen_ids"]), chosen_ended=pl.lit(True))


def to_differing_step(part: pl.DataFrame, end: str) -> pl.DataFrame:
    """Return pairs whose texts reach to the first step in which they differ; `end` is what ends a step.

    No end is learned: most texts go on behind that step, and where one does not its end alone would tell the two apart.
    """
    both = [differing_step(one, other, end) for one, other in part.select("chosen_text", "rejected_text").iter_rows()]
    texts = [pl.Series([pair[at] for pair in both], dtype=pl.String) for at in range(len(views.SIDES))]
    return part.with_columns(
        *(text.alias(f"{side}_text") for side, text in zip(views.SIDES, texts, strict=True)),
        *(pl.lit(None, part.schema[f"{side}_ids"]).alias(f"{side}_ids") for side in views.SIDES),
        *(pl.lit(False).alias(f"{side}_ended") for side in views.SIDES),
    )


def _text(render: Render, prompt: Row, sample: Row) -> str:
    return render(prompt, [{"role": "user", "content": ""}], of=sample)[-1]["content"].strip()
