"""build: training rows from live samples. What the student sees is the prompt, never what the teacher was told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field, model_validator

from selfkd.core import digest, views
from selfkd.core.pool import Addition, Pool, empty, shape
from selfkd.steps.context import Context
from selfkd.steps.step import Step

SLICE = 100_000  # rows whose texts are in memory at once


class Build(Step):
    """`sft` rows: one per live sample. `pair` rows: a chosen and a rejected sample of the same prompt."""

    verb: ClassVar[str] = "build"
    short: ClassVar[str | None] = "kind"

    kind: Literal["sft", "pair"] = Field("sft", description="sft: prompt and completion; pair: prompt, chosen and rejected.")
    of: str | None = Field(None, description="Only samples of this stream (sft).")
    where: str | None = Field(
        None, description="Keep only samples (sft) or pairs (columns chosen_* and rejected_*) for which this holds."
    )
    chosen: str | None = Field(None, description="Which samples may be chosen: an expression, or the name of a stream (pair).")
    rejected: str | None = Field(
        None, description="Which samples may be rejected: an expression, or the name of a stream (pair)."
    )
    by: str | None = Field(None, description="Try samples in falling order of this expression; ties by hash (pair).")
    match: Literal["cycle", "product"] = Field(
        "cycle", description="cycle: walk both lists side by side, starting over at the end; product: all with all."
    )
    per_prompt: int = Field(1, ge=1, description="Most pairs per prompt.")
    weight: str | None = Field(
        None, description="Weight of a row in the loss: an expression over the sample (sft) or the pair."
    )
    view: str | tuple[str, ...] | None = Field(
        None, description="What the student sees in place of the last user message; a list makes one row each."
    )
    role: str = Field("policy", description="Which model the rows are for.")
    as_: str = Field("rows", alias="as", description="Name of the stream of rows.")

    @model_validator(mode="after")
    def _sides(self) -> Build:
        if self.kind == "pair" and not (self.chosen and self.rejected):
            raise ValueError("pairs need 'chosen' and 'rejected'")
        if self.kind == "sft" and (self.chosen or self.rejected):
            raise ValueError("'chosen' and 'rejected' are for kind: pair")
        return self

    def templates(self) -> list[str]:
        return [] if self.view is None else [self.view] if isinstance(self.view, str) else list(self.view)

    def expressions(self) -> list[tuple[str, str, str]]:
        table = "pairs" if self.kind == "pair" else "samples"
        found = [(field, text, table) for field in ("where", "weight") if (text := getattr(self, field))]
        sides = [("chosen", self.chosen), ("rejected", self.rejected), ("by", self.by)]
        return found + [(field, text, "samples") for field, text in sides if text and not text.isidentifier()]

    def run(self, pool: Pool, context: Context) -> Addition:
        pairs = self._pairs(pool) if self.kind == "pair" else self._singles(pool)
        return Addition({"rows": [context.save("rows", part) for part in self._rows(pairs, pool, context)]})

    def _singles(self, pool: Pool) -> pl.DataFrame:
        view = views.sample_view(pool, self.of, self.where, self.weight)
        kept = view.filter(views.expression(self.where, view.columns, self.name)) if self.where else view
        weight = views.expression(self.weight, view.columns, self.name) if self.weight else pl.lit(1.0)
        return kept.select("prompt", chosen="id", rejected=pl.lit(None, pl.String), weight=weight.cast(pl.Float64))

    def _pairs(self, pool: Pool) -> pl.DataFrame:
        """Pairs of one prompt: the i-th is (chosen[i mod n], rejected[i mod m]), or the product in that order; none twice."""
        texts = [text for text in (self.chosen, self.rejected, self.by) if text and not text.isidentifier()]
        view = views.sample_view(pool, self.of, *texts)
        order = views.expression(self.by, view.columns, self.name) if self.by else pl.lit(0.0)
        view = view.with_columns(order.alias("_by")).sort("_by", "u", descending=[True, False], nulls_last=True).drop("_by")
        chosen = _ranked(view.filter(self._side(self.chosen, view)), "chosen")
        rejected = _ranked(view.filter(self._side(self.rejected, view)), "rejected")
        pairs = _combine(chosen, rejected, self.match, self.per_prompt)
        wide = pairs.join(_prefixed(view, "chosen"), on="chosen", how="left").join(
            _prefixed(view, "rejected"), on="rejected", how="left"
        )
        wide = wide.sort("prompt", "_i")
        if self.where:
            wide = wide.filter(views.expression(self.where, wide.columns, self.name))
        weight = views.expression(self.weight, wide.columns, self.name) if self.weight else pl.lit(1.0)
        return wide.with_columns(weight=weight.cast(pl.Float64)).select("prompt", "chosen", "rejected", "weight")

    def _side(self, text: str | None, view: pl.DataFrame) -> pl.Expr:
        """`text` as an expression; a bare word that is no column is the name of a stream."""
        if text and text.isidentifier() and text not in view.columns:
            return pl.col("stream") == text
        return views.expression(text or "", view.columns, self.name)

    def _rows(self, pairs: pl.DataFrame, pool: Pool, context: Context) -> Iterator[pl.DataFrame]:
        views: list[Any] = [context.template(reference) for reference in self.templates()] or [None]
        for start in range(0, pairs.height, SLICE):
            part = self._with_texts(pairs[start : start + SLICE], pool)
            for number, render in enumerate(views):
                yield self._finish(_seen(part, pool, render), number)
        if not pairs.height:
            yield empty("rows")

    def _with_texts(self, pairs: pl.DataFrame, pool: Pool) -> pl.DataFrame:
        for side in ("chosen", "rejected"):
            texts = pool.scan("samples").filter(pl.col("id").is_in(pairs[side].drop_nulls().implode()))
            names = {f"{side}_text": "text", f"{side}_ids": "token_ids"}
            found = texts.select(
                pl.col("id").alias(side), (pl.col("finish") == "stop").alias(f"{side}_ended"), **names
            ).collect()
            pairs = pairs.join(found, on=side, how="left", maintain_order="left")
        return pairs

    def _finish(self, part: pl.DataFrame, number: int) -> pl.DataFrame:
        keys = part.select("chosen", "rejected").iter_rows()
        ids = [digest.of("row", self.name, number, *key)[:16] for key in keys]
        samples = pl.concat_list("chosen", "rejected").list.drop_nulls()
        frame = part.with_columns(
            samples.alias("samples"),
            id=pl.Series(ids, dtype=pl.String),
            kind=pl.lit(self.kind),
            stream=pl.lit(self.as_),
            role=pl.lit(self.role),
        )
        return shape("rows", frame.drop("chosen", "rejected").rename({"chosen_text": "chosen", "rejected_text": "rejected"}))


def _seen(part: pl.DataFrame, pool: Pool, render: Any) -> pl.DataFrame:
    """Adds the student's messages: the prompt's own, or those a view template makes of it."""
    prompts = pool.scan("prompts").filter(pl.col("id").is_in(part["prompt"].unique().implode())).collect()
    if render:
        rows = [render(row, list(row["messages"]), of=None) for row in prompts.iter_rows(named=True)]
        prompts = prompts.with_columns(pl.Series("messages", rows, dtype=prompts.schema["messages"]))
    return part.join(prompts.select(prompt="id", messages="messages"), on="prompt", how="left", maintain_order="left")


def _ranked(samples: pl.DataFrame, side: str) -> pl.DataFrame:
    """(prompt, side = sample id, position in its prompt, how many the prompt has); keeps the order of `samples`."""
    position = pl.int_range(pl.len()).over("prompt").alias(f"_{side}")
    return samples.select("prompt", pl.col("id").alias(side), position, pl.len().over("prompt").alias(f"_n_{side}"))


def _combine(chosen: pl.DataFrame, rejected: pl.DataFrame, match: str, most: int) -> pl.DataFrame:
    pairs = chosen.join(rejected, on="prompt").filter(pl.col("chosen") != pl.col("rejected"))
    if match == "product":
        first, second, width = pl.col("_chosen"), pl.col("_rejected"), pl.col("_n_rejected")
        return pairs.with_columns((first * width + second).alias("_i")).sort("prompt", "_i").filter(_first(most))
    turns = pairs.select("prompt", "_n_chosen", "_n_rejected").unique().with_columns(_i=pl.int_ranges(0, pl.lit(most)))
    turns = turns.explode("_i").with_columns(
        _chosen=pl.col("_i") % pl.col("_n_chosen"), _rejected=pl.col("_i") % pl.col("_n_rejected")
    )
    kept = (
        turns.select("prompt", "_i", "_chosen", "_rejected")
        .join(pairs, on=["prompt", "_chosen", "_rejected"])
        .sort("prompt", "_i")
    )
    return kept.unique(["chosen", "rejected"], keep="first", maintain_order=True)


def _first(most: int) -> pl.Expr:
    return pl.int_range(pl.len()).over("prompt") < most


def _prefixed(view: pl.DataFrame, side: str) -> pl.DataFrame:
    return view.rename({name: f"{side}_{name}" for name in view.columns}).rename({f"{side}_id": side})
