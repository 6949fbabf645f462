"""bring: answers that exist already, as samples of a stream. They were read when the run was created, and are not read again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field

from selfkd.core import digest, drawing, views
from selfkd.core.pool import Addition, Pool, shape
from selfkd.prompts import brought
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast, figure, least
from selfkd.steps.outlook import Outlook
from selfkd.steps.score import name_problem
from selfkd.steps.step import Problem, Step, TextList

MODEL = "brought"  # who made them is not known
NOT_ASKED = "not a prompt of this round"
NO_SCORE = "its row has none"


class BringStep(Step):
    """Bring answers, pairs or conversations of a data set in as samples, with their scores.

    An answer whose conversation is that of a train prompt, but for case and white space, is an answer to that prompt; one whose prompt stands
    in dev or test is dropped. Of a conversation the assistant's last message is the answer, and the rest its prompt.
    """

    verb: ClassVar[str] = "bring"
    short: ClassVar[str | None] = "from"
    DATA: ClassVar[str] = "data:"  # before the step's name, among the code that a run keeps

    from_: str | dict[str, Any] | list[Any] = Field(
        alias="from",
        description="Where the answers come from: a prompt source, such as {file: chat.jsonl} or {hub: NAME, split: train}, with its fields. What is the gold answer there is the answer here; `completion` and `response` are read too. "
        "Several may stand in a list; `chosen` and `rejected` are two answers with the score `preferred`, 1 and 0.",
    )
    id: str | None = Field(
        None, description="Which column holds the id of the train prompt that is answered; the row then needs no prompt."
    )
    scores_: TextList = Field(
        (),
        alias="scores",
        description="Which columns hold scores, under whose names expressions see them; `preferred` is that of pairs.",
    )
    licence: str | None = Field(None, description="The licence of the data, as its source names it; it stands in run.json.")
    others: Literal["add", "drop"] = Field(
        "add", description="Answers to prompts that this round does not ask: add their prompts, or drop them."
    )
    n: int | None = Field(
        None, ge=1, description="Only so many answers per round, on through the set in an order by hash; default: all of them."
    )
    as_: str = Field("brought", alias="as", description="Name of the stream.")

    def scores(self) -> list[str]:
        return list(self.scores_)

    def data(self) -> str:
        """Return the name under which a run keeps what was read."""
        return f"{self.DATA}{self.name}"

    def reading(self) -> dict[str, Any]:
        """Return the words that decide what is read."""
        return {"from": self.from_, "id": self.id, "scores": list(self.scores_)}

    def identity(self) -> dict[str, Any]:
        """Without where it was read: the digest of what was read stands among its code."""
        return {name: value for name, value in super().identity().items() if name not in ("from", "licence")}

    def problems(self) -> Iterator[Problem]:
        yield from (("from", problem) for problem in brought.problems(self.from_, "from"))
        for name in self.scores_:
            if problem := name_problem(name):
                yield "scores", problem

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        for said in seen.taken(self._origins()):
            yield "scores", f"{said}: rename its column (map)"
        if self.as_ in seen.aside:
            yield "as", f"the stream '{self.as_}' holds judgments, and answers are kept apart from them: name it otherwise (as)"

    def doubts(self, seen: Outlook) -> Iterator[Problem]:
        if not self.licence:
            yield "from", "no `licence` is stated, so run.json cannot name it: write the one that the data came with"

    def _origins(self) -> dict[str, str]:
        return {name: f"column '{name}' of the data of {self.name}" for name in self.scores_}

    def adds(self, seen: Outlook) -> None:
        seen.add_streams([self.as_])
        seen.add_scores(self._origins())
        if self.others == "add":
            seen.brought.append(self.name)

    def cost(self, forecast: Forecast) -> Cost:
        there = forecast.sizes.get(self.name)
        rows = there if self.n is None else least(self.n, there)
        forecast.streams[self.as_] = rows
        return Cost(self.name, f"{figure(rows)} answers brought")

    def run(self, pool: Pool, context: Context) -> Addition:
        rows = self.of_round(context.data(self.data()), context.index)
        new = self._new_prompts(rows, pool)
        there = {*views.live_prompts(pool)["id"], *(new["id"] if self.others == "add" else ())}
        drops = [
            {"id": row["sample"], "stream": self.as_, "step": self.name, "reason": row["drop"] or NOT_ASKED}
            for row in rows.select("sample", "prompt", "drop").iter_rows(named=True)
            if row["drop"] or row["prompt"] not in there
        ]
        tables: dict[str, Any] = {"samples": [context.save("samples", self._samples(rows, context))]}
        tables |= {"prompts": [new]} if self.others == "add" and new.height else {}
        tables |= {"scores": [self._scores(rows)]} if self.scores_ else {}
        return Addition({**tables, **({"drops": [shape("drops", drops)]} if drops else {})})

    def of_round(self, rows: pl.DataFrame, index: int) -> pl.DataFrame:
        """Return the answers of a round, in the order of their ids, with those of the samples that they become."""
        if self.n is not None and rows.height:
            keys = pl.Series([digest.uniform("bring", self.name, one) for one in rows["id"]], dtype=pl.Float64)
            ordered = rows.with_columns(_key=keys).sort("_key", "id").drop("_key")
            rows = drawing.next_of(ordered, self.n, max(index, 1))
        rows = rows.sort("id")
        names = [digest.of("brought", index, self.name, one)[:16] for one in rows["id"]]
        return rows.with_columns(sample=pl.Series(names, dtype=pl.String))

    def _new_prompts(self, rows: pl.DataFrame, pool: Pool) -> pl.DataFrame:
        """Return the prompts of usable answers that this round does not have; those of the train split as they stand there."""
        usable = rows.filter(pl.col("drop").is_null()).unique("prompt", keep="first", maintain_order=True)
        missing = usable.filter(~pl.col("prompt").is_in(pool.prompts["id"].implode())).sort("prompt")
        known = pool.scan("prompts").filter(pl.col("id").is_in(missing["prompt"].implode())).collect()
        foreign = missing.filter(~pl.col("prompt").is_in(known["id"].implode()))
        made = shape("prompts", foreign.select(id="prompt", source=pl.lit(self.name), messages="messages", meta=pl.lit("{}")))
        return pl.concat([known.sort("id"), made])

    def _samples(self, rows: pl.DataFrame, context: Context) -> pl.DataFrame:
        ties = [digest.uniform(context.seed("tie"), one) for one in rows["sample"]]
        return shape(
            "samples",
            rows.select(
                pl.lit(self.as_).alias("stream"),
                pl.lit([], pl.List(pl.String)).alias("parents"),
                pl.lit(MODEL).alias("model"),
                pl.lit("stop").alias("finish_reason"),
                pl.col("completion").str.len_chars().alias("chars"),
                pl.Series("tiebreak", ties, dtype=pl.Float64),
                (pl.col("id").cum_count().over("prompt") - 1).alias("number"),
                id="sample",
                prompt="prompt",
                teacher_messages="messages",
                text="completion",
            ),
        )

    def _scores(self, rows: pl.DataFrame) -> pl.DataFrame:
        why = pl.when(pl.col("value").is_null()).then(pl.lit(NO_SCORE)).otherwise(None)
        parts = [rows.select(sample="sample", value=name).with_columns(name=pl.lit(name)) for name in self.scores_]
        return shape("scores", pl.concat(parts).with_columns(why=why, draw=pl.lit(0), weight=pl.lit(1.0)))
