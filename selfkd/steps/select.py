"""select: mark what is not used further, with the reason. Nothing is deleted; the funnel is a count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import polars as pl
from pydantic import Field

from selfkd.core import drawing, views
from selfkd.core.drawing import Pick
from selfkd.core.pool import Addition, Pool, shape
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast, figure, least, times
from selfkd.steps.outlook import Outlook
from selfkd.steps.step import Problem, Step


class SelectStep(Step):
    """Filter, drop repeats, cap per prompt, then cap in all: in this order, on the live samples (or prompts)."""

    verb: ClassVar[str] = "select"
    short: ClassVar[str | None] = "where"
    per_round: ClassVar[frozenset[str]] = frozenset({"where", "dedup", "by"})
    later: ClassVar[frozenset[str]] = frozenset({"pick"})

    of: str | None = Field(None, description="A stream, or 'prompts'; default: all live samples.")
    where: str | None = Field(None, description="Keep rows for which this holds; a null drops with the reason 'unscored'.")
    dedup: str | None = Field(None, description="Keep one row per value of this expression within a prompt (such as `text`).")
    per_prompt: int | None = Field(None, ge=1, description="Keep at most this many samples of each prompt.")
    limit: int | None = Field(None, ge=1, description="Keep at most this many rows in all.")
    by: str | None = Field(
        None, description="Which to prefer under a cap: the greatest value of this expression; ties by hash."
    )
    pick: Pick = Field(
        "top",
        description="top: the greatest values of `by` under a cap; weighted: drawn with chances by it, and rows at 0 or below are dropped.",
    )

    def problems(self) -> Iterator[Problem]:
        if self.pick == "weighted" and not self.by:
            yield "pick", "'weighted' draws by a number: write it as `by`"

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        if self.of != "prompts" and (problem := seen.stream_problem(self.of, needs_samples=True)):
            yield "of", problem

    def cost(self, forecast: Forecast) -> Cost:
        """A cap bounds every stream by itself, which is more than it does to all of them together: an upper bound still."""
        if self.of == "prompts":
            forecast.prompts = least(forecast.prompts, self.limit)
            return Cost(self.name, f"at most {figure(forecast.prompts)} prompts" if self.limit else "")
        most = least(times(forecast.prompts, self.per_prompt) if self.per_prompt else None, self.limit)
        left = least(forecast.samples(), most)
        forecast.streams = {stream: least(made, most) for stream, made in forecast.streams.items()}
        if self.of is None and len(forecast.streams) > 1 and most is not None:
            forecast.streams = {"kept": left}
        return Cost(self.name, f"at most {figure(left)} samples kept" if most is not None else "")

    def run(self, pool: Pool, context: Context) -> Addition:
        rows = self._view(pool)
        tests = self._tests(rows, context)
        rows = self._preferred(rows, context)
        dropped = []
        for reason, keep in tests:
            kept = rows.with_columns(keep.alias("_keep"))
            out = kept.filter(~pl.col("_keep").fill_null(False))
            why = pl.when(pl.col("_keep").is_null()).then(pl.lit("unscored")).otherwise(pl.lit(reason))
            dropped.append(out.select("id", "stream", step=pl.lit(self.name), reason=why))
            rows = kept.filter(pl.col("_keep").fill_null(False)).drop("_keep")
        drops = pl.concat(dropped) if dropped else pl.DataFrame(schema={"id": pl.String})
        return Addition({"drops": [shape("drops", drops.sort("id"))]})

    def _view(self, pool: Pool) -> pl.DataFrame:
        if self.of != "prompts":
            return views.sample_view(pool, self.of, self.where, self.dedup, self.by)
        prompts = views.prompt_view(pool, self.where, self.dedup, self.by)
        order = pl.col("id").alias("tiebreak")  # a content hash: as good as random, and the same everywhere
        return prompts.with_columns(order, stream=pl.lit(None, pl.String), prompt=pl.lit("all"))

    def _preferred(self, rows: pl.DataFrame, context: Context) -> pl.DataFrame:
        """Return the rows in the order in which a cap keeps them, with that order as `_by`."""
        weighted = self.pick == "weighted"
        order = context.expression("by", self.by, rows, "number" if weighted else "order") if self.by else pl.lit(0.0)
        rows = rows.with_columns(order.alias("_by"))
        if weighted:
            rows = rows.with_columns(drawing.order(rows["_by"], rows["id"], self.pick, context.seed("pick")).alias("_by"))
        return rows.sort("_by", "tiebreak", descending=[True, False], nulls_last=True)

    def _tests(self, rows: pl.DataFrame, context: Context) -> list[tuple[str, pl.Expr]]:
        """(reason, expression that keeps a row), in the order they apply; rows are sorted by preference."""
        found: list[tuple[str, pl.Expr]] = []
        if self.where:
            found.append((f"not {self.where}", context.expression("where", self.where, rows, "condition")))
        if self.pick == "weighted":
            found.append((f"no chance: {self.by} is not above 0", pl.col("_by").is_not_null()))
        if self.dedup:
            value = context.expression("dedup", self.dedup, rows, "value")
            found.append(("repeat", pl.struct(pl.col("prompt"), value.alias("_value")).is_first_distinct()))
        if self.per_prompt:
            found.append(
                (f"more than {self.per_prompt} per prompt", pl.col("prompt").cum_count().over("prompt") <= self.per_prompt)
            )
        if self.limit:
            found.append((f"over the limit of {self.limit}", pl.int_range(pl.len()) < self.limit))
        return found
