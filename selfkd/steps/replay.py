"""replay: what earlier rounds of this chain made. The kept samples by default; never reference log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import polars as pl
from pydantic import Field

from selfkd.core import views
from selfkd.core.pool import Addition, Pool, shape
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast
from selfkd.steps.outlook import Outlook
from selfkd.steps.step import Problem, Step


class ReplayStep(Step):
    """Add the kept samples of earlier rounds, with their prompts and scores; later rounds win where ids repeat."""

    verb: ClassVar[str] = "replay"
    short: ClassVar[str | None] = "rounds"
    copies: ClassVar[bool] = True
    later: ClassVar[frozenset[str]] = frozenset({"before"})

    rounds: int | None = Field(
        None, ge=1, description="What so many rounds back made themselves (1 = the last one); default: all of them."
    )
    before: bool = Field(False, description="Only what the steps of `before` made in round 0.")
    of: str | None = Field(None, description="Only samples of this stream.")
    kept: bool = Field(True, description="Only samples that their own round kept; false brings the dropped ones back too.")
    as_: str | None = Field(None, alias="as", description="Stream for the replayed samples; default: the stream they had.")

    def _source(self, seen: Outlook) -> Outlook | None:
        return seen.opening if self.before else seen.replayable

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        source = self._source(seen)
        if source and (problem := source.stream_problem(self.of, needs_samples=self.before)):
            yield "of" if self.of else "before", problem
        if self.before and self.rounds:
            yield "rounds", "`before` made its samples once, in round 0: leave out rounds, or before"

    def adds(self, seen: Outlook) -> None:
        seen.replayed.append(self.name)
        seen.all_rounds += [self.name] if self.rounds is None else []
        if (source := self._source(seen)) is not None:
            seen.add_scores(source.origins)
            seen.compared += source.compared
            if self.of in source.aside:
                seen.add_aside([self.as_ or self.of])
            else:
                seen.add_streams([self.as_] if self.as_ else source.streams)

    def cost(self, forecast: Forecast) -> Cost:
        forecast.streams[self.as_ or "replayed"] = None
        return Cost(self.name)

    def run(self, pool: Pool, context: Context) -> Addition:
        """Return a copy, so that a round needs no other when older rounds are pruned."""
        have, prompts = set(pool.samples["id"]), set(pool.prompts["id"])
        parts: dict[str, list[Any]] = {"prompts": [], "samples": [], "scores": []}
        for _, earlier in context.earlier(0 if self.before else self.rounds):
            chosen = views.live(earlier, self.of) if self.kept else views.answers(earlier, self.of)
            chosen = chosen.filter(~pl.col("id").is_in(list(have)))
            have |= set(chosen["id"])
            samples = earlier.scan("samples").filter(pl.col("id").is_in(chosen["id"].implode())).collect()
            parts["samples"].append(shape("samples", samples.with_columns(stream=pl.lit(self.as_)) if self.as_ else samples))
            parts["scores"].append(earlier.scores.join(chosen.select(sample="id"), on="sample", how="semi"))
            missing = set(chosen["prompt"]) - prompts
            prompts |= missing
            parts["prompts"].append(earlier.scan("prompts").filter(pl.col("id").is_in(sorted(missing))).collect())
        return Addition({name: [pl.concat(frames)] for name, frames in parts.items() if frames})
