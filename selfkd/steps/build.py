"""build: training rows from live samples. What the student sees is the prompt, not what the teacher was told, unless `sees` says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field, model_validator

from selfkd.backend.trainer.loss_kinds import ARGUMENTS, WEIGHT
from selfkd.core import digest, views
from selfkd.core.pool import NUMBERS, RANKED, Addition, Part, Pool, empty, shape
from selfkd.core.wording import did_you_mean
from selfkd.steps import completions, pairing
from selfkd.steps.context import Context, Render
from selfkd.steps.forecast import Cost, Forecast, figure, times
from selfkd.steps.outlook import Outlook
from selfkd.steps.step import Problem, Step, Texts, several
from selfkd.steps.taught import Told
from selfkd.steps.told import of_another

NOT_ENDED = (
    pl.when(pl.col("finish_reason") == "length")
    .then(pl.lit("cut at max_tokens"))
    .otherwise(pl.format("did not end by itself: {}", "finish_reason"))
)
ASKED_APART = "its answers were given to different messages"
NUMBERLESS = "its label or a column of it is no number"
ROW_NUMBERS = ("weight", "label", "columns")  # columns of a row that are worked out from its samples
GIVEN = {WEIGHT, *(name for names in ARGUMENTS.values() for name in names)}
TELLING = 8  # pairs from which on it is no accident that one side was always cut
SLICE = 100_000  # rows whose texts are in memory at once


class BuildStep(Step):
    """`sft` rows: one per live sample. `pair` rows: a chosen and a rejected sample of the same prompt. `label` rows: one per live sample, with a label. `rank` rows: several samples of a prompt, the best first. `kd` rows: one per live sample, with what a teacher is shown."""

    verb: ClassVar[str] = "build"
    short: ClassVar[str | None] = "kind"
    per_round: ClassVar[frozenset[str]] = frozenset({"where", "chosen", "rejected", "by", "label", "weight"})
    later: ClassVar[frozenset[str]] = frozenset(
        {"cut", "label", "columns", "answers", "teacher", "teacher_system", "told", "sees", "completion", "step"}
    )

    kind: Literal["sft", "pair", "label", "rank", "kd"] = Field(
        "sft",
        description="sft: prompt and completion; pair: prompt, chosen and rejected; label: prompt, completion and label; rank: prompt and completions with their scores; kd: prompt, prompt of the teacher, and completion.",
    )
    of: str | None = Field(None, description="Only samples of this stream (sft, label, rank, kd).")
    where: str | None = Field(
        None,
        description="Keep only samples (sft, label, rank, kd) or pairs (columns chosen_* and rejected_*) for which this holds.",
    )
    chosen: str | None = Field(None, description="Which samples may be chosen: an expression, or the name of a stream (pair).")
    rejected: str | None = Field(
        None, description="Which samples may be rejected: an expression, or the name of a stream (pair)."
    )
    by: str | None = Field(
        None,
        description="Try samples in falling order of this expression; ties by hash (pair). The scores that answers are ranked by (rank).",
    )
    answers: int = Field(
        4, ge=2, description="Most answers of a row, the best ones; a prompt with a single one makes none (rank)."
    )
    match: pairing.Match = Field(
        "cycle",
        description="cycle: walk both lists side by side, starting over at the end; spread: on through all with all, each answer as often as any other; product: the first with all, then the next; parent: each rejected answer with the first chosen one that was made from it (pair).",
    )
    step: str | None = Field(
        None,
        description="Learn only the first step in which the two answers of a pair differ, behind those that they share, which count in neither; what ends a step, such as a line break. What follows it is left out, and no end is learned (pair).",
    )
    per_prompt: int = Field(1, ge=1, description="Most pairs per prompt.")
    label: str | None = Field(
        None,
        description="How good a completion is, such as 1 for right and 0 for wrong: an expression over the sample (label).",
    )
    weight: str | None = Field(
        None,
        description="Weight of a row in the loss: an expression over the sample (sft, label, kd), the pair, or the best answer (rank).",
    )
    columns: dict[str, str] = Field(
        {},
        description="Numbers of each row for a loss that asks for them by name: {name: expression}, over the sample (sft, label, kd), the pair, or the best answer (rank).",
    )
    view: str | Texts | None = Field(
        None, description="What the student sees in place of the last user message; a list makes one row each."
    )
    sees: Literal["prompt", "asked"] = Field(
        "prompt",
        description="What the student sees where there is no view: the prompt, or what the sampler was asked, template and system included, such as the answer and the rubric that a judge saw. Answers of one row that were asked in different words make no row.",
    )
    teacher: str | None = Field(
        None,
        description="What the teacher sees in place of the last user message: a template, which sees the completion as `of`; default: what the sampler saw (kd).",
    )
    teacher_system: str | None = Field(None, description="A system message that only the teacher sees (kd).")
    completion: str | None = Field(
        None,
        description="What is learned in place of the answer as it was written: a template that sees the answer as `of`, such as {{ of.text.rpartition('####')[2] }} (sft, label).",
    )
    told: Literal["own", "other"] = Field(
        "own",
        description="Whose gold answer and further columns `teacher` is given. Write told: own where it shows the gold answer, or where the student does (view, completion, sees: asked). other: those of another prompt of the round with another answer (a control) (kd).",
    )
    cut: Literal["drop", "keep"] = Field(
        "drop",
        description="Answers that did not end (finish_reason is not 'stop') as what is to be learned: drop or keep; as rejected they stay.",
    )
    role: str = Field("policy", description="Which model the rows are for.")
    as_: str = Field("rows", alias="as", description="Name of the stream of rows.")

    @model_validator(mode="after")
    def _sides(self) -> BuildStep:
        if self.kind == "pair" and not (self.chosen and self.rejected):
            raise ValueError("pairs need 'chosen' and 'rejected'")
        if self.kind != "pair" and (self.chosen or self.rejected):
            raise ValueError("'chosen' and 'rejected' are for kind: pair")
        if (self.kind == "label") != (self.label is not None):
            raise ValueError("'label' and kind: label belong together")
        if self.kind == "rank" and not self.by:
            raise ValueError("kind: rank needs 'by', the score of an answer")
        if self.kind != "rank" and self.answers != type(self).model_fields["answers"].default:
            raise ValueError("'answers' is for kind: rank")
        for name in ("teacher", "teacher_system"):
            if self.kind != "kd" and getattr(self, name) is not None:
                raise ValueError(f"'{name}' is for kind: kd")
        if self.kind != "pair" and self.step is not None:
            raise ValueError("'step' is for kind: pair")
        if self.told == "other" and not self.teacher:
            raise ValueError("'told' needs 'teacher', the template that tells it")
        if self.sees == "asked" and self.view is not None:
            raise ValueError(
                "'sees: asked' shows what the sampler was asked, and a view shows something else: leave out one of the two"
            )
        if self.completion is not None and self.kind not in ("sft", "label"):
            raise ValueError("'completion' is for kind: sft and kind: label")
        return self

    def problems(self) -> Iterator[Problem]:
        for name in self.columns:
            if not name.isidentifier() or name.startswith("_"):
                yield "columns", f"a column cannot be called '{name}': write letters, digits and '_', a letter first"
            elif name in GIVEN:
                yield f"columns.{name}", f"a column cannot be called '{name}': that is what a loss is given beside the columns"

    def templates(self) -> list[str]:
        return [*several(self.view), *several(self.teacher), *several(self.completion)]

    def student_views(self) -> list[str]:
        return several(self.view)

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        if problem := seen.stream_problem(self.of, needs_samples=True):
            yield "of", problem
        if self.chosen is not None and _words(self.chosen) == _words(self.rejected):
            yield (
                "rejected",
                "'chosen' and 'rejected' are the same, so an answer would be compared with itself: change one of them",
            )
        columns = seen.columns()["samples"]
        for side, text in (("chosen", self.chosen), ("rejected", self.rejected)):
            if text in seen.streams and text in columns:
                yield side, f"'{text}' is a stream and a column: write \"stream = '{text}'\", or an expression over the column"
            elif text and text.isidentifier() and text not in (*seen.streams, *columns):
                hint = did_you_mean(text, [*seen.streams, *columns])
                yield side, f"'{side}' names neither a stream nor a column: '{text}'.{hint}"
        kind = seen.rows.get((self.as_, self.role), self.kind)
        if kind != self.kind:
            yield "as", f"the stream '{self.as_}' holds rows of kind {kind} already: give this one another name (as)"

    def doubts(self, seen: Outlook) -> Iterator[Problem]:
        if self.of in seen.aside and self.sees == "prompt":
            said = f"'{self.of}' holds judgments, and a student that sees the prompt alone learns to answer it with one"
            yield "of", f"{said}: write sees: asked to show it what the judge saw"

    def adds(self, seen: Outlook) -> None:
        seen.rows[self.as_, self.role] = self.kind
        if self.kind == "kd":
            others_told = seen.told.get((self.as_, self.role), False)
            seen.told[self.as_, self.role] = others_told or self._tells_more(seen)
        others = seen.row_columns.get((self.as_, self.role), self.columns)
        seen.row_columns[self.as_, self.role] = tuple(name for name in self.columns if name in others)

    def _tells_more(self, seen: Outlook) -> bool:
        """Whether a teacher may see other words than the student, as far as the fields say."""
        own = bool(self.teacher or self.teacher_system)
        return own or self.view is not None or (self.sees == "prompt" and seen.asked_otherwise(self.of))

    def cost(self, forecast: Forecast) -> Cost:
        if self.kind in ("pair", "rank"):
            rows = times(forecast.prompts, self.per_prompt if self.kind == "pair" else 1)
        else:
            known = self.of in forecast.streams or self.of in forecast.aside
            rows = times(forecast.samples(self.of if known else None), max(1, len(self.student_views())))
        before = forecast.rows.get(self.as_, 0)
        forecast.rows[self.as_] = None if rows is None or before is None else before + rows
        if self.kind == "rank":
            forecast.answers[self.as_] = self.answers
        return Cost(self.name, f"{figure(rows)} rows")

    def run(self, pool: Pool, context: Context) -> Addition:
        make = {"pair": self._pairs, "rank": self._rankings}.get(self.kind, self._singles)
        pairs, cut = make(pool, context)
        rows: list[Part] = []
        drops = [cut.select("id", "stream", reason=NOT_ENDED)]
        for part in self._rows(pairs, pool, context):
            same = (part["chosen"] == part["rejected"]).fill_null(False)  # a difference of nothing teaches nothing
            drops.append(part.filter(same).select("id", "stream", reason=pl.lit("chosen equals rejected")))
            apart = ~same & part["messages"].is_null()
            drops.append(part.filter(apart).select("id", "stream", reason=pl.lit(ASKED_APART)))
            part, numberless = self._numbered(part.filter(~same & ~apart))
            empty_ones = pl.col("chosen") == "" if self.completion else pl.lit(False)
            drops += [numberless, part.filter(empty_ones).select("id", "stream", reason=pl.lit(completions.EMPTY))]
            part = part.filter(~empty_ones)
            rows.append(context.save("rows", part))
        dropped = pl.concat(drops).with_columns(step=pl.lit(self.name)).sort("id")
        return Addition({"rows": rows, **({"drops": [shape("drops", dropped)]} if dropped.height else {})})

    def _singles(self, pool: Pool, context: Context) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return what becomes a row, and the samples that do not because they did not end."""
        kept, cut = self._whole(self._kept(views.sample_view(pool, self.of, *self._numbers()), context))
        rows = self._weighed(kept, context)
        return rows.select("prompt", *ROW_NUMBERS, chosen="id", rejected=pl.lit(None, pl.String)), cut

    def _rankings(self, pool: Pool, context: Context) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return a row per prompt that has two answers with a score: the ids and the scores of its best ones, in falling order.

        Beside them the samples that are no answer because they did not end.
        """
        view = self._kept(views.sample_view(pool, self.of, self.by, *self._numbers()), context)
        kept, cut = self._whole(view)
        score = context.expression("by", str(self.by), kept, "number").cast(pl.Float64)
        scored = self._weighed(kept.with_columns(_score=score), context).filter(pl.col("_score").is_finite())
        best = scored.sort("prompt", "_score", "tiebreak", descending=[False, True, False])
        first = [pl.col(name).first() for name in ROW_NUMBERS]
        lists = [pl.col("id").head(self.answers).alias("ranking"), pl.col("_score").head(self.answers).alias("scores")]
        rows = best.group_by("prompt", maintain_order=True).agg(*first, *lists).filter(pl.col("ranking").list.len() > 1)
        sides = {"chosen": pl.col("ranking").list.first(), "rejected": pl.lit(None, pl.String)}
        return rows.with_columns(**sides), cut

    def _numbers(self) -> list[str | None]:
        """Return the expressions over a sample or a pair."""
        return [self.where, self.weight, self.label, *self.columns.values()]

    def _kept(self, view: pl.DataFrame, context: Context) -> pl.DataFrame:
        """Return the samples or pairs for which `where` holds."""
        return view.filter(context.expression("where", self.where, view, "condition")) if self.where else view

    def _weighed(self, view: pl.DataFrame, context: Context) -> pl.DataFrame:
        """Return samples or pairs with the numbers that become the row's: its weight, its label, its columns."""

        def number(field: str, text: str) -> pl.Expr:
            return context.expression(field, text, view, "number").cast(pl.Float64)

        weight = number("weight", self.weight) if self.weight else pl.lit(1.0)
        label = number("label", self.label) if self.label else pl.lit(None, pl.Float64)
        named = [
            pl.struct(pl.lit(name).alias("name"), number(f"columns.{name}", text).alias("value"))
            for name, text in self.columns.items()
        ]
        columns = pl.concat_list(named) if named else pl.lit(None, NUMBERS)
        return (
            view.with_columns(_weight=weight, _label=label, _columns=columns.cast(NUMBERS))
            .drop(ROW_NUMBERS, strict=False)
            .rename({f"_{name}": name for name in ROW_NUMBERS})
        )

    def _numbered(self, part: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return the rows that have every number which a loss may ask for, and drops of the others: null, NaN and infinite are none."""
        values = pl.col("columns").list.eval(pl.element().struct.field("value"))
        whole = values.list.eval(pl.element().is_finite().fill_null(False)).list.all().fill_null(True)
        if self.label:
            whole = whole & pl.col("label").is_finite().fill_null(False)
        return part.filter(whole), part.filter(~whole).select("id", "stream", reason=pl.lit(NUMBERLESS))

    def _whole(self, samples: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return the samples that may be learned, and those that did not end: a model that learns these learns never to stop."""
        ended = pl.lit(True) if self.cut == "keep" else pl.col("finish_reason") == "stop"
        return samples.filter(ended), samples.filter(~ended)

    def _pairs(self, pool: Pool, context: Context) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return chosen and rejected of each prompt, in the order of `by`, as `matched` puts them together.

        Beside them those that were to be chosen and did not end, unless they serve as rejected.
        """
        view = views.sample_view(pool, self.of, self.chosen, self.rejected, self.by)
        order = context.expression("by", self.by, view, "order") if self.by else pl.lit(0.0)
        view = (
            view.with_columns(order.alias("_by")).sort("_by", "tiebreak", descending=[True, False], nulls_last=True).drop("_by")
        )
        whole, cut = self._whole(view.filter(self._side("chosen", view, context)))
        chosen, rejected = _by_prompt(whole), _by_prompt(view.filter(self._side("rejected", view, context)))
        parents = dict(whole.select("id", "parents").iter_rows()) if self.match == "parent" else {}
        pairs = [
            (prompt, *pair)
            for prompt in sorted(chosen.keys() & rejected.keys())
            for pair in pairing.matched(chosen[prompt], rejected[prompt], self.match, self.per_prompt, parents)
        ]
        frame = pl.DataFrame(pairs, {"prompt": pl.String, "chosen": pl.String, "rejected": pl.String}, orient="row")
        kept = self._kept(views.pair_view(frame, view, pool, *self._numbers()), context)
        rows = self._weighed(kept, context).select("prompt", *ROW_NUMBERS, *views.SIDES)
        for side in views.SIDES:
            self._warn_of_cuts(side, rows, view, context)
        return rows, cut.filter(~pl.col("id").is_in(rows["rejected"].implode()))

    def _warn_of_cuts(self, side: str, rows: pl.DataFrame, view: pl.DataFrame, context: Context) -> None:
        """Say where all answers of one side were cut at the limit, and none of the other's: a model then learns how long they are."""
        cut = {one: view.filter(pl.col("id").is_in(rows[one].implode()))["finish_reason"] == "length" for one in views.SIDES}
        [other] = [one for one in views.SIDES if one != side]
        if rows.height >= TELLING and cut[side].all() and not cut[other].any():
            said = f"all {rows.height} pairs have a {side} answer that was cut at max_tokens, and no {other} one was: length alone tells them apart"
            context.say(
                f"{context.where}: {said}. Raise max_tokens, or leave such pairs out (where: {side}_finish_reason = 'stop')"
            )

    def _side(self, side: str, view: pl.DataFrame, context: Context) -> pl.Expr:
        """A side as an expression; a bare word that is not a column is the name of a stream."""
        text = str(getattr(self, side))
        if text.isidentifier() and text not in view.columns:
            return pl.col("stream") == text
        return context.expression(side, text, view, "condition")

    def _rows(self, pairs: pl.DataFrame, pool: Pool, context: Context) -> Iterator[pl.DataFrame]:
        renders: list[Render | None] = [context.template("view", reference) for reference in self.student_views()] or [None]
        told = self._told(pool, context) if self.kind == "kd" else None
        anew = context.template("completion", self.completion, completions.columns(pool)) if self.completion else None
        for start in range(0, pairs.height, SLICE):
            part = self._with_texts(pairs[start : start + SLICE], pool)
            part = told.added(part, pool) if told else part
            part = completions.reworded(part, pool, anew) if anew else part
            part = completions.to_differing_step(part, self.step) if self.step else part
            for number, render in enumerate(renders):
                rows = self._finish(_seen(part, pool, render), number)
                yield _asked(rows, pool) if self.sees == "asked" else rows
        if not pairs.height:
            yield empty("rows")

    def _told(self, pool: Pool, context: Context) -> Told:
        told = Told.by(self.teacher, self.teacher_system, pool, self.of, context)
        return told.with_gold(of_another(pool, context.seed("told"), context.where)) if self.told == "other" else told

    def _with_texts(self, pairs: pl.DataFrame, pool: Pool) -> pl.DataFrame:
        for side in views.SIDES:
            texts = pool.scan("samples").filter(pl.col("id").is_in(pairs[side].drop_nulls().implode()))
            names = {f"{side}_text": "text", f"{side}_ids": "token_ids"}
            found = texts.select(
                pl.col("id").alias(side), (pl.col("finish_reason") == "stop").alias(f"{side}_ended"), **names
            ).collect()
            pairs = pairs.join(found, on=side, how="left", maintain_order="left")
        return _with_ranked(pairs, pool) if self.kind == "rank" else pairs

    def _finish(self, part: pl.DataFrame, number: int) -> pl.DataFrame:
        if self.kind == "rank":
            keys: Iterator[tuple[Any, ...]] = (tuple(ids) for ids in part["ranking"].to_list())
            samples = pl.col("ranking")
        else:
            keys, samples = (
                part.select("chosen", "rejected").iter_rows(),
                pl.concat_list("chosen", "rejected").list.drop_nulls(),
            )
        ids = [digest.of("row", self.name, number, *key)[:16] for key in keys]
        frame = part.with_columns(
            samples.alias("samples"),
            id=pl.Series(ids, dtype=pl.String),
            kind=pl.lit(self.kind),
            stream=pl.lit(self.as_),
            role=pl.lit(self.role),
        )
        return shape("rows", frame.drop("chosen", "rejected").rename({"chosen_text": "chosen", "rejected_text": "rejected"}))


def _with_ranked(part: pl.DataFrame, pool: Pool) -> pl.DataFrame:
    """Adds the answers of each ranking, with their scores."""
    long = part.select("prompt", "ranking", "scores").explode("ranking", "scores")
    texts = pool.scan("samples").filter(pl.col("id").is_in(long["ranking"].implode()))
    fields = [pl.col("text"), pl.col("token_ids").alias("ids"), (pl.col("finish_reason") == "stop").alias("ended")]
    found = long.join(texts.select(*fields, ranking="id").collect(), on="ranking", how="left", maintain_order="left")
    answers = found.select("prompt", answer=pl.struct("text", "ids", "ended", score="scores").cast(RANKED.inner))
    grouped = answers.group_by("prompt", maintain_order=True).agg(ranked="answer")
    return part.join(grouped, on="prompt", how="left", maintain_order="left")


def _words(text: str | None) -> list[str]:
    return (text or "").split()


def _asked(rows: pl.DataFrame, pool: Pool) -> pl.DataFrame:
    """Replaces the messages by those that the models which answered were shown; null where the answers of a row were shown different ones."""
    asked = pool.scan("samples").filter(pl.col("id").is_in(rows["samples"].explode().implode()))
    shown = dict(asked.select("id", "teacher_messages").collect().iter_rows())
    told = [[shown[sample] for sample in samples] for samples in rows["samples"].to_list()]
    messages = [first if all(other == first for other in others) else None for first, *others in told]
    return rows.with_columns(pl.Series("messages", messages, dtype=rows.schema["messages"]))


def _seen(part: pl.DataFrame, pool: Pool, render: Any) -> pl.DataFrame:
    """Adds the student's messages: the prompt's own, or those a view template makes of it."""
    prompts = pool.scan("prompts").filter(pl.col("id").is_in(part["prompt"].unique().implode())).collect()
    if render:
        rows = [render(row, list(row["messages"]), of=None) for row in prompts.iter_rows(named=True)]
        prompts = prompts.with_columns(pl.Series("messages", rows, dtype=prompts.schema["messages"]))
    return part.join(prompts.select(prompt="id", messages="messages"), on="prompt", how="left", maintain_order="left")


def _by_prompt(samples: pl.DataFrame) -> dict[str, list[str]]:
    """Return {prompt: ids of its samples}, in the order of `samples`."""
    return dict(samples.group_by("prompt", maintain_order=True).agg("id").iter_rows())
