"""The tables that recipe expressions see, made from a pool: samples with their scores, prompts with their aggregates.

Expressions are Polars SQL. Row order is never left to a group-by: everything is sorted by id or by the hashed number `tiebreak`.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from selfkd.core.pool import HEAVY, SCHEMAS, Pool, light_columns
from selfkd.core.wording import did_you_mean
from selfkd.errors import RecipeError


def expression(text: str, known: Sequence[str], where: str = "") -> pl.Expr:
    """`text` as a Polars SQL expression over the columns `known`; RecipeError names a column that is not there."""
    try:
        parsed = pl.sql_expr(text)
    except pl.exceptions.PolarsError as error:
        raise RecipeError(f"cannot read the expression '{text}': {error}", where) from error
    unknown = [name for name in parsed.meta.root_names() if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known)
        raise RecipeError(f"no column '{unknown[0]}' in '{text}'.{hint}", where, "Columns: " + ", ".join(known))
    return parsed


def live(pool: Pool, stream: str | None = None) -> pl.DataFrame:
    """Samples (light columns, sorted by id) that no step dropped, whose prompt no step dropped; of one stream if named."""
    samples = pool.samples if stream is None else pool.samples.filter(pl.col("stream") == stream)
    gone = pool.drops.filter(pl.col("stream").is_not_null()).select("id")
    prompts = pool.drops.filter(pl.col("stream").is_null()).select(prompt="id")
    return samples.join(gone, on="id", how="anti").join(prompts, on="prompt", how="anti").sort("id")


def live_prompts(pool: Pool) -> pl.DataFrame:
    gone = pool.drops.filter(pl.col("stream").is_null()).select("id")
    return pool.prompts.join(gone, on="id", how="anti").sort("id")


def score_names(pool: Pool) -> list[str]:
    return sorted(pool.scores["name"].unique().to_list())


def with_scores(samples: pl.DataFrame, pool: Pool) -> pl.DataFrame:
    """One column per score, the mean of its draws; null where a sample has none or could not be scored."""
    for name in score_names(pool):
        means = pool.scores.filter((pl.col("name") == name) & pl.col("value").is_not_null())
        means = means.group_by("sample").agg(pl.col("value").mean().alias(name)).rename({"sample": "id"})
        samples = samples.join(means, on="id", how="left")
    return samples.sort("id")


def with_heavy(samples: pl.DataFrame, pool: Pool, names: Sequence[str], table: str = "samples") -> pl.DataFrame:
    """`samples` (or prompts) with heavy columns read from disk for just these rows, in the same order."""
    wanted = [name for name in names if name in HEAVY[table]]
    if not wanted:
        return samples
    found = pool.scan(table).select("id", *wanted).filter(pl.col("id").is_in(samples["id"].implode())).collect()
    return samples.join(found, on="id", how="left", maintain_order="left")


def sample_view(pool: Pool, stream: str | None, *texts: str | None) -> pl.DataFrame:
    """The live samples as expressions see them: scores as columns, and a heavy column where one of `texts` names it."""
    names = {name for text in texts if text for name in pl.sql_expr(text).meta.root_names()}
    return with_heavy(with_scores(live(pool, stream), pool), pool, sorted(names))


def prompt_view(pool: Pool) -> pl.DataFrame:
    """The live prompts with `n` (samples so far) and, per score, `<score>_max`, `<score>_mean` and `<score>_n`."""
    scored = with_scores(pool.samples, pool)
    stats = [pl.len().alias("n")]
    for name in score_names(pool):
        column = pl.col(name)
        stats += [column.max().alias(f"{name}_max"), column.mean().alias(f"{name}_mean"), column.count().alias(f"{name}_n")]
    grouped = scored.group_by("prompt").agg(stats).rename({"prompt": "id"})
    counts = [pl.col(column).fill_null(0) for column in grouped.columns if column == "n" or column.endswith("_n")]
    return live_prompts(pool).join(grouped, on="id", how="left").with_columns(counts).sort("id")


def columns_after(scores: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns that expressions may use once `scores` exist, by table: samples, prompts and pairs."""
    samples = [*SCHEMAS["samples"], *scores]
    prompts = [*light_columns("prompts"), "n", *(f"{score}_{stat}" for score in scores for stat in ("max", "mean", "n"))]
    pairs = [f"{side}_{name}" for side in ("chosen", "rejected") for name in samples]
    return {"samples": samples, "prompts": prompts, "pairs": pairs}


def funnel(pool: Pool) -> list[tuple[str, int]]:
    """What became of the samples: (stage or reason, count), from made to kept."""
    rows = [("prompts", pool.prompts.height), ("samples", pool.samples.height)]
    dropped = pool.drops.group_by("step", "reason").len().sort("step", "reason")
    rows += [(f"dropped by {step}: {reason}", count) for step, reason, count in dropped.iter_rows()]
    return [*rows, ("kept", live(pool).height)]


def funnel_text(pool: Pool) -> str:
    stages = funnel(pool)
    width = max(len(stage) for stage, _ in stages)
    return "\n".join(f"{stage.ljust(width)}  {count}" for stage, count in stages)
