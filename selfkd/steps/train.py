"""train: update a model on rows. Where it starts, what it is held against, and which rows it sees are three separate words."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field, model_validator

from selfkd.backend.base import TrainSpec
from selfkd.core import views
from selfkd.core.pool import Addition, Pool, shape
from selfkd.errors import GuardError
from selfkd.steps.build import Build
from selfkd.steps.context import Context
from selfkd.steps.step import Step


class Train(Step):
    """Make a new checkpoint of `role` from the rows of its stream; without a build step before it, from plain SFT rows of the live samples."""

    verb: ClassVar[str] = "train"
    short: ClassVar[str | None] = "loss"

    loss: Literal["sft", "dpo"] = Field(
        "sft", description="sft: negative log-likelihood of completions; dpo: a preference loss of TRL."
    )
    role: str = Field("policy", description="Which model is trained.")
    from_: str = Field(
        "now", alias="from", description="Where training starts: base, warm, start, now, best, round-K, or role@when."
    )
    reference: str | None = Field(None, description="Reference model of a preference loss; default for dpo: start.")
    of: str = Field("rows", description="Which stream of rows.")
    beta: float = Field(0.1, gt=0, description="Strength of the tie to the reference model (dpo).")
    nll: float = Field(
        0.0, ge=0, description="Add this multiple of the chosen answers' negative log-likelihood per token (dpo; IRPO uses 1)."
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Compute: bf16 autocast over fp32 masters, or fp32 throughout."
    )
    min_rows: int = Field(1, ge=1, description="Stop before the trainer loads when there are fewer rows.")
    trl: dict[str, Any] = Field({}, description="Options of TRL's SFTConfig or DPOConfig, checked and passed through.")

    @model_validator(mode="after")
    def _fits(self) -> Train:
        if self.loss == "sft" and (self.reference or self.nll or self.beta != type(self).model_fields["beta"].default):
            raise ValueError("'reference', 'beta' and 'nll' belong to loss: dpo")
        return self

    def run(self, pool: Pool, context: Context) -> Addition:
        made = Addition()
        rows = self._rows(pool)
        if rows.height == 0 and self.loss == "sft" and pool.rows.height == 0:
            made = Build(name=self.name, role=self.role, **{"as": self.of}).run(pool, context)
            rows = made.whole("rows").sort("id")
        self._enough(rows, pool, context)
        spec = TrainSpec(
            self.loss,
            context.seed("train"),
            self.beta,
            self.nll,
            context.recipe.context,
            precision=self.precision,
            trl=self.trl,
        )
        start = context.model(self._of_role(self.from_))
        reference = context.model(self._of_role(self.reference or "start")) if self.loss == "dpo" else None
        trained = context.train(start, reference, rows, spec)
        drops = [{"id": row, "stream": self.of, "step": self.name, "reason": why} for row, why in sorted(trained.drops.items())]
        tables_made: dict[str, Any] = {**made.tables, **({"drops": [shape("drops", drops)]} if drops else {})}
        return Addition(tables_made, {self.role: trained.folder}, {}, {"train": dict(trained.metrics)})

    def _rows(self, pool: Pool) -> pl.DataFrame:
        return pool.scan("rows").filter((pl.col("stream") == self.of) & (pl.col("role") == self.role)).collect().sort("id")

    def _of_role(self, when: str) -> str:
        return when if "@" in when else f"{self.role}@{when}"

    def _enough(self, rows: pl.DataFrame, pool: Pool, context: Context) -> None:
        if rows.height < self.min_rows:
            raise GuardError(
                f"{rows.height} training rows, at least {self.min_rows} wanted\n{views.funnel_text(pool)}",
                f"round-{context.index:03d}/{self.name}",
                "Sample more (sample.n), loosen the selection, or start from a model that solves some of the prompts.",
            )
