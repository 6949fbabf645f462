"""The teacher's side of rows: in which words a teacher is shown what the student is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from selfkd.core import views
from selfkd.core.pool import MESSAGES, Pool
from selfkd.steps.context import Context, Messages, Render
from selfkd.steps.question import Question


@dataclass(frozen=True)
class Told:
    """What a teacher is shown: what the sampler saw, or with words of its own what `render` and `system` make of prompt and completion.

    `view` is the completions with their scores, which a template sees as `of`.
    """

    view: pl.DataFrame
    render: Render | None
    system: str | None
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # {prompt: what it is told in place of its own gold}

    def with_gold(self, others: pl.DataFrame) -> Told:
        """Return the same that tells a prompt the gold of another one; columns id, answer, meta."""
        return replace(self, others={row.pop("id"): row for row in others.to_dicts()})

    @classmethod
    def by(cls, template: str | None, system: str | None, pool: Pool, stream: str | None, context: Context) -> Told:
        """Return what the words of a step say, held against the columns that there are."""
        view = views.sample_view(pool, stream)
        render = context.template("teacher", template, [*view.columns, "text"]) if template else None
        return cls(view, render, system)

    def added(self, part: pl.DataFrame, pool: Pool) -> pl.DataFrame:
        """Add to rows what their teacher is shown, and the log-probability of the completion under who sampled it."""
        heavy = ["teacher_messages", *(["text"] if self.render else [])]
        samples = views.with_heavy(self.view.filter(pl.col("id").is_in(part["chosen"].implode())), pool, heavy)
        if self.render or self.system:
            samples = samples.with_columns(pl.Series("teacher_messages", self._messages(samples, pool), MESSAGES))
        found = samples.select("teacher_messages", chosen="id", chosen_logprob="logprob")
        return part.join(found, on="chosen", how="left", maintain_order="left")

    def _messages(self, samples: pl.DataFrame, pool: Pool) -> list[Messages]:
        asked = pool.scan("prompts").filter(pl.col("id").is_in(samples["prompt"].unique().implode())).collect()
        prompts = {row["id"]: {**row, **self.others.get(row["id"], {})} for row in asked.iter_rows(named=True)}
        say = Question("train", None, self.system, 0, about_samples=True).messages
        return [say(prompts[row["prompt"]], self.render, row) for row in samples.iter_rows(named=True)]
