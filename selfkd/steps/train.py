"""train: update a model on rows. Where it starts, what it is held against, and which rows it sees are three separate words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import polars as pl
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from selfkd.backend.adapters import RANKS
from selfkd.backend.base import TrainSpec
from selfkd.backend.trainer.loss_kinds import (
    LOSSES,
    OF_FUNCTIONS,
    OF_TEACHERS,
    PREFERENCES,
    LossKind,
    is_function,
    kind_of,
    texts,
)
from selfkd.backend.trainer.trl_options import check_trl, lacking_trl
from selfkd.core import views
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Addition, Function, Pool, shape
from selfkd.core.wording import did_you_mean
from selfkd.errors import GuardError
from selfkd.steps import mix
from selfkd.steps.build import BuildStep
from selfkd.steps.check import Check
from selfkd.steps.context import Context
from selfkd.steps.divergence import LIVE, Divergence, kind_alone
from selfkd.steps.forecast import Cost, Forecast, figure, least, times, total
from selfkd.steps.lora import Lora
from selfkd.steps.outlook import Outlook
from selfkd.steps.step import Problem, Stage, Step


def _known_loss(name: Any) -> Any:
    if not isinstance(name, str) or not (name in LOSSES or is_function(name)):
        named = [f"'{known}'" for known, kind in LOSSES.items() if not kind.loss_type]
        choices = f"{', '.join(named)}, a loss type of TRL or file.py:function"
        hint = did_you_mean(name, LOSSES) if isinstance(name, str) else ""
        said = {"choices": choices, "name": repr(name), "hint": f".{hint}" if hint else ""}
        raise PydanticCustomError("unknown_loss", "should be {choices}, not {name}{hint}", said)
    return name


LEAST_CARRIED = 0.5  # of what was learned over 4 bits; less is said
FUNCTION_FIELDS = ("rows", *OF_FUNCTIONS, *OF_TEACHERS)
SAME = "teacher and student are the same model and see the same words, so the loss is 0: give the teacher words of its own (`teacher` or `teacher_system` in build, `template` or `system` in sample), or name another model"


def _rank_alone(given: Any) -> Any:
    """Refuse a rank without its name: `lora: 8` says too little, and what it says is plain."""
    if isinstance(given, int):
        raise ValueError(f"is a mapping: write lora: {{r: {8 if isinstance(given, bool) else given}}}")
    return given


class TrainStep(Step):
    """Make a new checkpoint of `role` from the rows of its stream; without a build step before it, from plain SFT rows of the live samples."""

    verb: ClassVar[str] = "train"
    short: ClassVar[str | None] = "loss"
    per_round: ClassVar[frozenset[str]] = frozenset({"from", "reference"})
    stage: ClassVar[Stage] = "train"
    later: ClassVar[frozenset[str]] = frozenset(
        {"lora", "continue_", "optimiser", "check", "rows", "params", "average", "mix", "by", *OF_TEACHERS}
    )

    loss: Annotated[str, BeforeValidator(_known_loss)] = Field(
        "sft",
        description=f"{texts()}; file.py:function: a loss of your own (docs/losses.md).",
    )
    role: str = Field("policy", description="Which model is trained.")
    from_: str = Field(
        "now", alias="from", description="Where training starts: base, warm, start, now, best, round-K, or role@when."
    )
    reference: str | None = Field(
        None,
        description="Reference model of a loss that is held against one; default: start, for a function of your own: none.",
    )
    teacher: str | None = Field(
        None,
        description="Whom the model is compared with at each token, under a prompt of its own: a model as in `from`, or live, which is the model itself as it is at each step; default: start (kd).",
    )
    divergence: Annotated[Divergence | None, BeforeValidator(kind_alone)] = Field(
        None, description="How far from the teacher: forward, reverse, jsd, or a mapping; its fields are below (kd)."
    )
    rows: Literal["sft", "pair", "label", "rank", "kd"] | None = Field(
        None, description="Which kind of rows a function wants; default: sft (file.py:function)."
    )
    params: dict[str, Any] = Field({}, description="Fixed arguments of a loss that is a function.")
    average: Literal["rows", "tokens"] = Field(
        "rows",
        description="Over what the values of an optimiser step are averaged, each with its row's weight: rows, or the tokens that are learned (file.py:function).",
    )
    of: str = Field("rows", description="Which stream of rows.")
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="Rows of several streams in these shares instead of one stream: {own: 0.8, chat: 0.2}. The stream that runs out first is used whole, the others are cut to match by hash; the commit says what was mixed.",
    )
    by: Literal["rows", "tokens"] = Field(
        "rows", description="What the shares of a mix are of: rows, or the tokens of their answers."
    )
    beta: float = Field(0.1, gt=0, description="Strength of the tie to the reference model (dpo and its kin).")
    nll: float = Field(
        0.0, ge=0, description="Add this multiple of the chosen answers' negative log-likelihood per token (dpo; IRPO uses 1)."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="Compute: bf16 autocast over fp32 masters, or fp32 throughout; auto: bf16 where the hardware has it and the engine is not in float32.",
    )
    min_rows: int = Field(1, ge=1, description="Stop before the trainer loads when there are fewer rows.")
    lora: Annotated[Lora | None, BeforeValidator(_rank_alone)] = Field(
        None,
        description="Train an adapter instead of all weights: {r: 16}; its fields are below. Its default learning rate is ten times the usual: 1e-4, for dpo 5e-6.",
    )
    continue_: bool = Field(
        False,
        alias="continue",
        description="Where training starts from an adapter: go on with it. Else a new one is laid over it, and both are committed as one, whose rank, memory and bytes on disk grow by r in each round.",
    )
    check: Check | None = Field(
        None,
        description="Measure the model inside the update, stop early, or choose: {every: 100, metric: dev/correct, patience: 3, pick: best}; its fields are below.",
    )
    optimiser: Literal["fresh", "continue"] = Field(
        "fresh",
        description="fresh: each update begins with an empty optimiser; continue: with the moments of the one that made the weights where training starts, committed beside them (AdamW's are twice their size). "
        "A schedule without an end (constant_with_warmup, inverse_sqrt) goes on at its place; one that ends with the update, such as cosine, begins anew.",
    )
    trl: dict[str, Any] = Field({}, description="Options of TRL's SFTConfig or DPOConfig, checked and passed through.")

    @model_validator(mode="after")
    def _fits(self) -> TrainStep:
        """Fields of other losses must keep their defaults."""
        homes = {name: kind.fields for name, kind in LOSSES.items()} | {"file.py:function": FUNCTION_FIELDS}
        for field in dict.fromkeys(field for fields in homes.values() for field in fields if field not in self.kind.fields):
            if getattr(self, field) != type(self).model_fields[field].default:
                known = ", ".join(name for name, fields in homes.items() if field in fields and name not in PREFERENCES)
                raise ValueError(f"'{field}' belongs to loss: {known}")
        if self.mix and self.of != type(self).model_fields["of"].default:
            raise ValueError("'mix' names the streams: leave out 'of'")
        if self.mix is None and self.by != "rows":
            raise ValueError("'by' is of a mix, and there is none")
        if self.continue_ and self.lora is None:
            raise ValueError("continue goes on with an adapter, and there is none without lora: {r: 16}")
        return self

    def identity(self) -> dict[str, Any]:
        """`auto` stands as bf16, the default it took the place of: a chain keeps its keys, and the numerics say what it came to."""
        words = super().identity()
        return {**words, "precision": "bf16"} if self.precision == "auto" else words

    @property
    def kind(self) -> LossKind:
        return kind_of(self.loss, self.rows, self.reference is not None)

    def functions(self) -> list[str]:
        return self.losses()

    def losses(self) -> list[str]:
        return [self.kind.function] if self.kind.function else []

    def models(self) -> dict[str, ModelRef]:
        named = {"from": self.from_, **({"reference": self.reference or "start"} if self.kind.reference else {})}
        named |= {"teacher": self.teacher or "start"} if self.kind.teacher and self.teacher != LIVE else {}
        return {field: ModelRef.parse(text, self.role) for field, text in named.items()}

    def trained_role(self) -> str | None:
        return self.role

    def problems(self) -> Iterator[Problem]:
        if self.mix is not None and (wrong := mix.problem(self.mix)):
            yield "mix", f"'mix' {wrong}"
        for name, value in self.trl.items():
            yield from ((f"trl.{name}", problem) for problem in check_trl(self.loss, {name: value}))
        if lacking := lacking_trl(self.loss, self.trl):
            yield "loss", lacking
        if self.continue_ and self.from_ == "base":
            yield (
                "continue",
                "'continue' goes on with the adapter where training starts, and the base has none: leave out one of the two",
            )
        if self.optimiser == "continue" and self.models()["from"].when == "base":
            yield (
                "optimiser",
                "'optimiser: continue' goes on with the optimiser that made the weights where training starts, and none made the base: leave out one of the two",
            )
        if self.optimiser == "continue" and self.lora and not self.continue_:
            yield (
                "optimiser",
                "'optimiser: continue' goes on with an adapter's own optimiser, and without `continue: true` each update makes a new adapter",
            )
        if self.lora and self.lora.serve == "adapter" and self.lora.r > RANKS[-1]:
            said = f"vLLM has room for ranks up to {RANKS[-1]}, and r is {self.lora.r}: write serve: merged, or leave it out"
            yield "lora.serve", said
        if self.lora and self.lora.dropout and self.kind.reference and self.trl.get("disable_dropout", True):
            way = "leave it out" if self.kind.function else "write trl: {disable_dropout: false}, or leave it out"
            yield "lora.dropout", f"loss {self.loss} switches dropout off, also the adapter's: {way}"

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        """Rows of its stream and kind; without any rows, plain SFT makes its own from samples."""
        for stream in self.streams:
            yield from self._needs_rows(stream, seen)

    @property
    def streams(self) -> tuple[str, ...]:
        """Return the streams of rows that it learns from."""
        return tuple(self.mix) if self.mix else (self.of,)

    def doubts(self, seen: Outlook) -> Iterator[Problem]:
        if seen.all_rounds and self.models()["from"].when in ("now", "start"):
            said = f"'{seen.all_rounds[0]}' brings all rounds back while training goes on from the newest model, so old rows are learned again in every round"
            yield "from", f"{said}: train from base, or replay fewer rounds, if that is not meant"

    def _needs_rows(self, stream: str, seen: Outlook) -> Iterator[Problem]:
        made, wanted = seen.rows.get((stream, self.role)), self.kind.rows
        need = f"loss {self.loss} needs rows of kind {wanted}"
        if made is None and self.builds_itself(bool(seen.rows)):
            if not seen.streams:
                yield "", "there is nothing to train on yet: a sample, gold or replay step comes first"
        elif made is None:
            known = ", ".join(f"'{one}' for {role}" for one, role in seen.rows) or "none"
            put = f"put `build: {{kind: {wanted}, ...}}` before it (rows built so far: {known})"
            yield "mix" if self.mix else "", f"{need} in stream '{stream}' for {self.role}: {put}"
        elif made != wanted:
            way = f": write `rows: {made}`" if self.kind.function == self.loss and self.rows is None else ""
            yield "loss", f"{need}; '{stream}' holds {made} rows{way}"
        elif self.kind.teacher and not seen.told.get((stream, self.role), True) and self._teaches_itself(seen):
            yield "teacher", SAME

    def _teaches_itself(self, seen: Outlook) -> bool:
        """Whether the teacher's weights are those that training starts from."""
        named, untouched = self.models(), {"now", "start"} if self.role not in seen.trained else set()
        if "teacher" not in named:
            return True
        begin, teacher = named["from"], named["teacher"]
        return begin == teacher or (begin.role == teacher.role and {begin.when, teacher.when} <= untouched)

    def copies_teacher(self) -> bool:
        """Whether a teacher has weights of its own while the model learns: it is neither that model nor the one beneath its adapter."""
        named = self.models()
        if "teacher" not in named:
            return False
        begin, teacher = named["from"], named["teacher"]
        beneath = ModelRef(begin.role, "base") if self.continue_ else begin
        same = teacher == beneath or (teacher.role == beneath.role and {teacher.when, beneath.when} <= {"now", "start"})
        return not (self.lora and same)

    def adds(self, seen: Outlook) -> None:
        seen.trained.add(self.role)
        if self.lora:
            seen.adapted.add(self.role)

    def cost(self, forecast: Forecast) -> Cost:
        rows = forecast.rows.get(self.of, forecast.samples())
        if self.mix:
            rows = total(forecast.rows.get(stream) for stream in self.mix)
        epochs, most = float(self.trl.get("num_train_epochs", 1)), int(self.trl.get("max_steps", 0))
        read = None if rows is None else math.ceil(rows * epochs)
        if most > 0:
            batch = self.trl.get("per_device_train_batch_size", 8) * self.trl.get("gradient_accumulation_steps", 1)
            read = least(read, most * batch) if "num_train_epochs" in self.trl else most * batch
        tokens = times(read, forecast.row_tokens * max(forecast.answers.get(one, self.kind.sequences) for one in self.streams))
        checked = f"; {self.check.metric} measured every {self.check.every} steps, not counted here" if self.check else ""
        said = f"{figure(rows)} rows, {figure(read)} read in all, {figure(tokens)} tokens{checked}"
        return Cost(self.name, said, learned=tokens)

    def run(self, pool: Pool, context: Context) -> Addition:
        function = context.loss(self.kind.function, self.params) if self.kind.function else None
        made = Addition()
        rows = self.rows_of(pool)
        if rows.height == 0 and self.builds_itself(pool.rows.height > 0):
            made = BuildStep(name=self.name, role=self.role, as_=self.of).run(pool, context)
            rows = made.whole("rows").sort("id")
        left_out: list[dict[str, str]] = []
        told: dict[str, Any] = {}
        if self.mix:
            rows, left_out, told = self._mixed(rows, self.mix, context)
        self._enough(rows, pool + Pool({"drops": made.whole("drops")}), context)
        models = {field: context.model(reference) for field, reference in self.models().items()}
        beside = models.get("reference", models.get("teacher"))
        trained = context.train(models["from"], beside, rows, self._spec(context, function), self.check)
        streams = dict(rows.select("id", "stream").iter_rows())
        refused = sorted(trained.drops.items())
        drops = [{"id": row, "stream": streams.get(row, self.of), "step": self.name, "reason": why} for row, why in refused]
        drops = [*left_out, *drops]
        tables: dict[str, Any] = {**made.tables}
        if drops:
            tables["drops"] = [*made.tables.get("drops", ()), shape("drops", drops)]
        start = models["from"]
        bases = {self.role: start.base or start.path} if self.lora else {}
        states = {self.role: trained.state} if trained.state else {}
        notes: dict[str, Any] = {"train": dict(trained.metrics), **told}
        if warning := self._little_served(trained.metrics.get("lora", {}).get("carried"), context):
            context.say(warning)
            notes["warnings"] = [warning]
        return Addition(tables, {self.role: trained.folder}, {}, notes, bases, states, trained.checks)

    def _little_served(self, carried: float | None, context: Context) -> str:
        """Return a warning where most of what an adapter learned over 4 bits is not there over the full weights that are served, or ''."""
        if carried is None or carried >= LEAST_CARRIED:
            return ""
        what = f"{context.where}: only {carried:.0%} of what the adapter learned over 4 bits shows over the full weights, which are served"
        return f"{what}. Leave out `quantise`, or let it learn more: trl.learning_rate, r."

    def builds_itself(self, rows_are_there: bool) -> bool:
        """Whether it makes plain rows from the live samples: where nothing was built and its loss learns from such rows."""
        return self.kind.rows == "sft" and not rows_are_there and not self.mix

    def _spec(self, context: Context, function: Function | None) -> TrainSpec:
        return TrainSpec(
            self.loss,
            context.seed("train"),
            self.beta,
            self.nll,
            context.max_length,
            precision=self.precision,
            trl=self.trl,
            lora=self.lora.spec(self.continue_) if self.lora else None,
            keeps_state=self.optimiser == "continue",
            function=function,
            rows=self.kind.rows if function else "",
            average=self.average,
            divergence=(self.divergence or Divergence()).spec() if self.kind.teacher else None,
        )

    def rows_of(self, pool: Pool) -> pl.DataFrame:
        mine = pl.col("stream").is_in(self.streams) & (pl.col("role") == self.role)
        return pool.scan("rows").filter(mine).collect().sort("id")

    def _mixed(
        self, rows: pl.DataFrame, shares: dict[str, float], context: Context
    ) -> tuple[pl.DataFrame, list[dict[str, str]], dict[str, Any]]:
        """Return the rows of the mix, a drop for each other one, and notes of what was mixed."""
        counts = context.lengths(context.model(self.models()["from"]), rows) if self.by == "tokens" else [1] * rows.height
        sized = rows.select("id", "stream", size=pl.Series(counts, dtype=pl.Int64))
        sizes = {name: sized.filter(pl.col("stream") == name) for name in shares}
        for name, frame in sizes.items():
            if not frame["size"].sum():
                fix = "Look at what builds it, or leave it out of the mix."
                raise GuardError(
                    f"the stream '{name}' has nothing to learn from, and a mix with it has neither", context.where, fix
                )
        found = mix.mixed(sizes, shares, context.seed("mix"))
        if warning := found.warning(shares):
            context.say(f"{context.where}: {warning}")
        used = rows["id"].is_in([one for ids in found.chosen.values() for one in ids])
        out = rows.filter(~used).select("id", "stream")
        drops = [{"id": one, "stream": name, "step": self.name, "reason": mix.LEFT_OUT} for one, name in out.iter_rows()]
        return rows.filter(used), drops, {"mix": mix.notes(found, self.by)}

    def _enough(self, rows: pl.DataFrame, pool: Pool, context: Context) -> None:
        if rows.height < self.min_rows:
            raise GuardError(
                f"{rows.height} training rows, at least {self.min_rows} wanted\n{views.funnel_text(pool)}",
                context.where,
                "Sample more (sample.n), loosen the selection, or start from a model that solves some of the prompts.",
            )
