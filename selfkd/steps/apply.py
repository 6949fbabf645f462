"""apply: a function of your own over whole tables, where no other verb says it. What it returns is checked and committed like anything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import polars as pl
from pydantic import Field

from selfkd.core import digest, views
from selfkd.core.pool import Addition, Pool, shape
from selfkd.errors import RewardError
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast
from selfkd.steps.outlook import Outlook
from selfkd.steps.score import name_problem
from selfkd.steps.step import Problem, Stage, Step, TextList

MODEL = "applied"  # who made its samples
COLUMNS = {"scores": ("sample", "value"), "drops": ("id", "reason"), "samples": ("prompt", "text")}


class ApplyStep(Step):
    """Give a pure function the live prompts, samples and scores as Polars frames; it returns new scores, marks or samples.

    It is frozen and hashed like a reward, runs in a worker process, and is called twice, the second time with all rows in another order:
    what is not the same then is refused. It returns a frame `sample, value` (and `name`, `why`), or a mapping of frames:
    `scores`, of which samples that have one keep it; `drops` with `id` of a sample or prompt and `reason`; `samples` with `prompt` and `text`, and `parents` where it has some.
    """

    verb: ClassVar[str] = "apply"
    short: ClassVar[str | None] = "function"
    stage: ClassVar[Stage] = "score"

    function: str = Field(
        description="file.py:function; of the tables prompts, samples and scores it is given those that it names."
    )
    of: str | None = Field(None, description="Only samples of this stream.")
    scores_: TextList = Field(
        (), alias="scores", description="Names of the scores that it returns; one without a column `name` is the first."
    )
    as_: str | None = Field(
        None, alias="as", description="Name of the stream of the samples that it returns; default: it returns none."
    )
    params: dict[str, Any] = Field({}, description="Fixed arguments of the function.")
    timeout: float = Field(600.0, gt=0, description="Seconds that one call may take.")

    def functions(self) -> list[str]:
        return [self.function]

    def applied(self) -> list[str]:
        return [self.function]

    def scores(self) -> list[str]:
        return list(self.scores_)

    def _origins(self) -> dict[str, str]:
        params = f" with {self.params}" if self.params else ""
        return {name: f"{self.function}{params}" for name in self.scores_}

    def problems(self) -> Iterator[Problem]:
        for name in self.scores_:
            if problem := name_problem(name):
                yield "scores", problem

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        if problem := seen.stream_problem(self.of, needs_samples=False):
            yield "of", problem
        for said in seen.taken(self._origins()):
            yield "scores", f"{said}: give this one another name"

    def adds(self, seen: Outlook) -> None:
        seen.add_scores(self._origins())
        if self.as_:
            seen.add_streams([self.as_])

    def cost(self, forecast: Forecast) -> Cost:
        if self.as_:
            forecast.streams[self.as_] = None
        return Cost(self.name)

    def run(self, pool: Pool, context: Context) -> Addition:
        tables = self._given(pool)
        made = context.apply(self.function, self.params, tables, self.timeout)
        self._refuse(made, tables, context)
        found: dict[str, Any] = {}
        if "samples" in made:
            found["samples"] = [self._samples(made["samples"], pool, context)]
        if "scores" in made:
            found["scores"] = [self._scores(made["scores"], pool)]
        if "drops" in made and made["drops"].height:
            found["drops"] = [self._drops(made["drops"], tables)]
        return Addition(found)

    def _given(self, pool: Pool) -> dict[str, pl.DataFrame]:
        """Return the live tables in one order: by their keys."""
        samples = views.with_heavy(views.live(pool, self.of), pool, ["text"])
        scores = pool.scores.join(samples.select(sample="id"), on="sample", how="semi")
        prompts = views.with_heavy(views.live_prompts(pool), pool, ["messages", "meta"], "prompts")
        return {"prompts": prompts, "samples": samples, "scores": scores.sort("sample", "name", "draw", "versus")}

    # ---- what comes back ----

    def _refuse(self, made: Mapping[str, pl.DataFrame], given: Mapping[str, pl.DataFrame], context: Context) -> None:
        for wrong in self._wrong(made, given):
            raise RewardError(f"{self.function} {wrong}", context.where, "Mend it and repeat the command with --amend.")

    def _wrong(self, made: Mapping[str, pl.DataFrame], given: Mapping[str, pl.DataFrame]) -> Iterator[str]:
        """Yield what is wrong with what the function returned."""
        for table, frame in made.items():
            for column in COLUMNS[table]:
                if column not in frame.columns:
                    yield f"returns {table} without the column '{column}'"
        samples, prompts = set(given["samples"]["id"]), set(given["prompts"]["id"])
        known = {"scores": ("sample", samples), "drops": ("id", samples | prompts), "samples": ("prompt", prompts)}
        for table, frame in made.items():
            column, there = known[table]
            if unknown := sorted(set(map(str, frame[column])) - there):
                yield f"returns {table} of '{unknown[0]}', which it was not given"
        if "samples" in made and not self.as_:
            yield "returns samples, and the step has no name for their stream: write `as`"
        if "scores" in made:
            yield from self._wrong_scores(made["scores"])
        if "samples" in made and "parents" in made["samples"].columns:
            yield from _wrong_parents(made["samples"]["parents"], samples)
        for table, column in (("drops", "reason"), ("samples", "text")):
            if (
                table in made
                and (made[table].schema[column] != pl.String or made[table][column].null_count())
                and made[table].height
            ):
                yield f"returns {table} whose column '{column}' is not text throughout"

    def _wrong_scores(self, scores: pl.DataFrame) -> Iterator[str]:
        if not self.scores_:
            yield "returns scores, and the step names none: write `scores: [NAME]`"
            return
        if not (scores.schema["value"].is_numeric() or scores.schema["value"] in (pl.Boolean, pl.Null)):
            yield "returns scores whose value is no number"
        names = set(scores["name"]) if "name" in scores.columns else set()
        if unknown := sorted(names - set(self.scores_)):
            yield f"returns the score '{unknown[0]}', which the step does not name: {', '.join(self.scores_)}"
        keys = ["sample", *(["name"] if "name" in scores.columns else [])]
        if scores.select(keys).is_duplicated().any():
            yield "returns two scores of one sample under one name"

    def _scores(self, scores: pl.DataFrame, pool: Pool) -> pl.DataFrame:
        """Return the score rows of samples that do not have the score yet: what was replayed keeps its own."""
        name = pl.col("name") if "name" in scores.columns else pl.lit(self.scores_[0])
        value = pl.col("value").cast(pl.Float64)
        finite = pl.when(value.is_finite()).then(value).otherwise(None)
        said = pl.col("why").cast(pl.String) if "why" in scores.columns else pl.lit(None, pl.String)
        why = pl.when(finite.is_null()).then(said.fill_null("the function gave none")).otherwise(None)
        rows = scores.select("sample", name=name, value=finite, why=why, draw=pl.lit(0), weight=pl.lit(1.0))
        new = rows.join(pool.scores.select("sample", "name"), on=["sample", "name"], how="anti")
        return shape("scores", new.sort("sample", "name"))

    def _drops(self, drops: pl.DataFrame, given: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
        streams = given["samples"].select("id", "stream")
        rows = drops.select("id", "reason").unique("id", keep="first", maintain_order=True).join(streams, on="id", how="left")
        return shape("drops", rows.with_columns(step=pl.lit(self.name)).sort("id"))

    def _samples(self, samples: pl.DataFrame, pool: Pool, context: Context) -> pl.DataFrame:
        if "parents" not in samples.columns:
            samples = samples.with_columns(parents=pl.lit([], pl.List(pl.String)))
        rows: list[dict[str, Any]] = []
        seen: Counter[str] = Counter()
        for prompt, text, parents in sorted(samples.select("prompt", "text", "parents").iter_rows(), key=repr):
            seen[prompt] += 1
            key = (context.index, self.name, prompt, text, list(parents or []), seen[prompt])
            rows.append(
                {
                    "id": digest.of("applied", *key)[:16],
                    "prompt": prompt,
                    "stream": self.as_,
                    "number": seen[prompt] - 1,
                    "parents": list(parents or []),
                    "model": MODEL,
                    "finish_reason": "stop",
                    "chars": len(text),
                    "tiebreak": digest.uniform(context.seed("tie"), *key),
                    "text": text,
                }
            )
        frame = shape("samples", rows).drop("teacher_messages")
        prompts = views.with_heavy(pool.prompts, pool, ["messages"], "prompts").select(prompt="id", teacher_messages="messages")
        return shape("samples", frame.join(prompts, on="prompt", how="left", maintain_order="left"))


def _wrong_parents(parents: pl.Series, given: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with the parents of new samples: only what the function was given can be what it made them from."""
    if parents.dtype not in (pl.List(pl.String), pl.List(pl.Null), pl.Null):
        yield f"returns samples whose column 'parents' is no list of ids: {parents.dtype}"
        return
    named = {name for names in parents.drop_nulls() for name in names}
    if None in named:
        yield "returns samples with a parent that is no id"
    if unknown := sorted(named - {None, *given}):
        yield f"returns samples with the parent '{unknown[0]}', which it was not given"
