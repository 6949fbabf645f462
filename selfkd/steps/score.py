"""score: reward functions, a model's log-probability, strengths from comparisons, or what is worked out from these. A failure is a null with a reason, never a zero."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any, ClassVar

import polars as pl
from pydantic import Field, model_validator

from selfkd.core import views
from selfkd.core.files import reference_parts
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import SCHEMAS, Addition, Function, Pool, shape
from selfkd.core.ratings import elo
from selfkd.core.wording import did_you_mean
from selfkd.errors import RewardError
from selfkd.prompts.templates import text_of
from selfkd.rewards.advice import way_out
from selfkd.rewards.check import read_notes, signature
from selfkd.rewards.contract import failed as unscored
from selfkd.rewards.contract import told
from selfkd.rewards.find import wants
from selfkd.rewards.pool import cut
from selfkd.steps.context import Context
from selfkd.steps.outlook import Outlook
from selfkd.steps.step import Problem, Stage, Step, Texts, several

Outcome = tuple[float | None, str]

SLICE = 50_000  # samples whose texts are in memory at once
BATCH = 512  # samples per call of a worker
WAYS_OUT = """Fix the reward and repeat the command with --amend: nothing is generated again.
If the prompts or their gold answers are wrong, mend them and begin a new run: --name X (a run keeps the prompts it began with).
Or let more stay unscored: raise max_failed of this step in the recipe, with --amend."""
NOT_COMPARED = "no comparison of it counts"
NO_VALUE = "its value is null"
FIRST = 32  # if all of the first ones fail, the reward is broken: stop at once


ONE_MAY = " before the round stops; one always may, however few there are, unless this is 0 or it is the only one."


class ScoreStep(Step):
    """Add one score per reward to the live samples that do not have it yet."""

    verb: ClassVar[str] = "score"
    short: ClassVar[str | None] = "reward"
    per_round: ClassVar[frozenset[str]] = frozenset({"logprob", "value"})
    stage: ClassVar[Stage] = "score"
    later: ClassVar[frozenset[str]] = frozenset({"elo", "value"})

    reward: str | Texts | None = Field(None, description="file.py:function, or several of them.")
    logprob: str | None = Field(
        None, description="Score by the log-probability under this model (role@when), summed over tokens."
    )
    elo: str | None = Field(
        None,
        description="Score by strength within the prompt, on the scale of Elo, from the comparisons that a judge step (pairwise) gave under this name: Bradley-Terry by maximum likelihood, a tie being half a win for each.",
    )
    value: str | None = Field(
        None,
        description="Score by an expression over the samples, such as a difference of two scores or a rank within the prompt: it becomes a column like any score, also of pairs. It needs `as`.",
    )
    of: str | None = Field(None, description="Only samples of this stream.")
    as_: str | Texts | None = Field(
        None,
        alias="as",
        description="Name of the score, or a list of one name per reward; default: the function's name, 'logprob_of', or 'elo'.",
    )
    params: dict[str, Any] = Field({}, description="Fixed arguments of the reward function.")
    max_failed: float = Field(0.01, ge=0, le=1, description=f"Share of samples that may stay unscored{ONE_MAY}")
    timeout: float = Field(10.0, gt=0, description="Seconds one sample (or one prompt's group) may take.")

    @model_validator(mode="after")
    def _one_source(self) -> ScoreStep:
        if sum(map(bool, (self.reward, self.logprob, self.elo, self.value))) != 1:
            raise ValueError("give one of 'reward', 'logprob', 'elo' and 'value'")
        if self.value and not self.as_:
            raise ValueError("a score that is worked out needs a name: write as")
        return self

    def functions(self) -> list[str]:
        return several(self.reward)

    def scores(self) -> list[str]:
        own = ["logprob_of"] if self.logprob else ["elo"] if self.elo else function_names(self.functions())
        return several(self.as_) or own

    def _origins(self) -> dict[str, str]:
        """Return {score: what gives it}: with other words, it would be another score."""
        if self.logprob:
            return {self.scores()[0]: f"logprob {self.models()['logprob']}"}
        if self.elo:
            return {self.scores()[0]: f"elo of '{self.elo}'"}
        if self.value:
            return {self.scores()[0]: f"value '{self.value}'"}
        params = f" with {self.params}" if self.params else ""
        return {name: f"{reference}{params}" for name, reference in zip(self.scores(), self.functions(), strict=False)}

    def models(self) -> dict[str, ModelRef]:
        return {"logprob": ModelRef.parse(self.logprob)} if self.logprob else {}

    def scored_split(self) -> str | None:
        return "train"

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        if problem := seen.stream_problem(self.of, needs_samples=True):
            yield "of", problem
        if self.elo and self.elo not in seen.compared:
            known = ", ".join(dict.fromkeys(seen.compared)) or "none: a judge step with pairwise comes first"
            yield "elo", f"no comparisons '{self.elo}' here.{did_you_mean(self.elo, seen.compared)} Comparisons: {known}"
        yield from name_problems(self.scores(), max(1, len(self.functions())), self.as_)
        for name, origin in self._origins().items():
            if seen.origins.get(name, origin) != origin:
                yield "reward", f"the score '{name}' is that of {seen.origins[name]} already: give this one another name (as)"

    def adds(self, seen: Outlook) -> None:
        seen.add_scores(self._origins())

    def run(self, pool: Pool, context: Context) -> Addition:
        parts: list[Any] = []
        found: dict[str, Any] = {}
        if self.logprob:
            parts.append(self._by_model(pool, context))
        if self.elo:
            parts.append(self._by_comparison(pool))
        if self.value:
            parts.append(self._by_expression(self.value, pool, context))
        for reference, name in zip(self.functions(), self.scores(), strict=False):
            function = context.function(reference, self.params)
            scored = [context.save("scores", part) for part in self._by_function(pool, context, function, name)]
            found |= {name: said} if scored and (said := read_notes(function)) else {}
            parts += scored
        return Addition({"scores": parts}, notes={"rewards": found} if found else {})

    def _unscored(self, pool: Pool, name: str) -> pl.DataFrame:
        done = pool.scores.filter(pl.col("name") == name).select(id="sample")
        return views.live(pool, self.of).join(done, on="id", how="anti").sort("prompt", "id")

    def _by_model(self, pool: Pool, context: Context) -> pl.DataFrame:
        samples = views.with_heavy(self._unscored(pool, self.scores()[0]), pool, ["text", "token_ids"])
        messages = views.with_heavy(pool.prompts, pool, ["messages"], "prompts").select(prompt="id", messages="messages")
        rows = samples.join(messages, on="prompt", how="left", maintain_order="left")
        found = context.logprobs(context.model(self.models()["logprob"]), rows)
        known = [(sample, value, "" if math.isfinite(value) else f"log-probability {value}") for sample, value, _ in found]
        return _score_rows(
            [one[0] for one in known], self.scores()[0], [(None if why else value, why) for _, value, why in known]
        )

    def _by_comparison(self, pool: Pool) -> pl.DataFrame:
        """Return the strength of each sample among those of its prompt that it was compared with, also those dropped since."""
        todo = self._unscored(pool, self.scores()[0])
        games = pool.scores.filter(
            (pl.col("name") == self.elo) & pl.col("versus").is_not_null() & pl.col("value").is_not_null()
        )
        turned = pl.col("sample") > pl.col("versus")
        value = pl.when(turned).then(1 - pl.col("value")).otherwise(pl.col("value"))
        sides = [pl.min_horizontal("sample", "versus").alias("one"), pl.max_horizontal("sample", "versus").alias("other")]
        once = games.with_columns(*sides, value=value).unique(["one", "other", "draw"])  # it stands there from both sides
        of_prompts = once.join(pool.samples.select(sample="id", prompt="prompt"), on="sample").sort("prompt")
        columns = ("one", "other", "value", "weight")
        strengths: dict[str, float] = {}
        for _, part in of_prompts.group_by("prompt", maintain_order=True):
            strengths |= elo(part.select(columns).iter_rows())
        found = [(strengths.get(name), "" if name in strengths else NOT_COMPARED) for name in todo["id"]]
        return _score_rows(todo["id"].to_list(), self.scores()[0], found)

    def _by_expression(self, text: str, pool: Pool, context: Context) -> pl.DataFrame:
        """Return the value of the expression for each sample; a window of it sees the samples that have their score already, too."""
        view = views.sample_view(pool, self.of, text)
        found = view.select("id", value=context.expression("value", text, view, "number").cast(pl.Float64))
        todo = found.join(self._unscored(pool, self.scores()[0]).select("id"), on="id", how="semi", maintain_order="left")
        values = [value if value is not None and math.isfinite(value) else None for value in todo["value"]]
        whys = [_why_none(value) for value in todo["value"]]
        return _score_rows(todo["id"].to_list(), self.scores()[0], list(zip(values, whys, strict=True)))

    def _by_function(self, pool: Pool, context: Context, function: Function, name: str) -> Iterator[pl.DataFrame]:
        todo = self._unscored(pool, name)
        if not todo.height:
            return
        wanted = wants(function)
        asked = self._whole_prompts(pool, todo) if signature(function).grouped else todo.with_columns(new=True)
        done = failed = 0
        for part in _whole_groups(asked, SLICE):
            new, part = part["new"], part.drop("new")
            rows = rows_for_reward(part, pool, wanted)
            outcomes: list[Outcome] = []
            flags = iter(new.to_list())
            for batch in context.map(function, cut(rows, BATCH), part["id"], self.timeout):
                of_new = list(compress(batch, flags))
                outcomes += of_new
                failed += sum(unscored(value, why) for value, why in of_new)
                done += len(of_new)
                self._check(done, failed, todo.height, outcomes, context, function)
                context.progress(done, todo.height, "samples")
            yield _score_rows(part.filter(new)["id"].to_list(), name, outcomes)

    def rows_ahead(self, pool: Pool, function: Function, name: str) -> tuple[list[str], list[dict[str, Any]]]:
        """Return (ids, rows) that `run` will give the function for these samples; none where it sees a prompt's whole group."""
        if signature(function).grouped:
            return [], []
        todo = self._unscored(pool, name)
        return todo["id"].to_list(), rows_for_reward(todo, pool, wants(function))

    def _whole_prompts(self, pool: Pool, todo: pl.DataFrame) -> pl.DataFrame:
        """Return all samples of the prompts that have one to score: a vote counts those, too, that have their score already.

        Column `new` says which ones are to be scored.
        """
        found = views.live(pool, self.of).join(todo, on="prompt", how="semi").sort("prompt", "id")
        return found.with_columns(new=pl.col("id").is_in(todo["id"].implode()))

    def _check(self, done: int, failed: int, total: int, outcomes: list[Outcome], context: Context, function: Function) -> None:
        """Stop at once when all of the first ones fail, or as soon as more have failed than may fail in all."""
        broken = done >= min(FIRST, total) and failed == done and failed > 0
        if broken or failed > may_fail(self.max_failed, total):
            why = next(why for value, why in outcomes if unscored(value, why))
            advice = way_out(why, str(function.path), function.environment)
            raise RewardError(
                f"{failed} of {done} samples ({failed / done:.1%}) could not be scored, limit {self.max_failed:.0%}. First: {told(function.name, why)}",
                context.where,
                f"{advice}\n{WAYS_OUT}".strip(),
            )


def _why_none(value: float | None) -> str:
    return NO_VALUE if value is None else "" if math.isfinite(value) else f"its value is {value}"


def may_fail(share: float, total: int) -> float:
    """Return how many of `total` may fail. A share of few is less than one, and one odd answer is no broken reward."""
    return max(1.0, share * total) if share else 0.0


def function_names(references: Sequence[str]) -> list[str]:
    return [reference_parts(reference)[1] for reference in references]


def name_problems(names: Sequence[str], rewards: int, given: str | tuple[str, ...] | None) -> Iterator[Problem]:
    """Yield what is wrong with the names that a step gives to the scores of so many rewards."""
    field = "as" if given else "reward"
    if len(names) != rewards:
        yield "as", f"'as' needs one name per reward: {rewards}, not {len(names)}"
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield field, f"two scores are called '{name}', and none could be told from the other: name them apart (as)"
        if problem := name_problem(name):
            yield field, f"{problem} (as)"


def name_problem(name: str) -> str:
    """Return why no score can have this name, or ''."""
    if name in SCHEMAS["samples"]:
        return f"a score cannot be called '{name}': that is a column of samples. Give it another name"
    if name.startswith("_") or not name.isidentifier():
        return f"a score cannot be called '{name}': write letters, digits and '_', a letter first"
    if not views.names_a_column(name):
        return f"a score cannot be called '{name}': expressions read that as a word of SQL. Give it another name"
    return ""


def rows_for_reward(samples: pl.DataFrame, pool: Pool, wanted: frozenset[str] | None) -> list[dict[str, Any]]:
    """One dict per sample: group, prompt, messages, answer, meta, and of completion, token_ids and sample what is `wanted`."""
    heavy = {"completion": "text", "token_ids": "token_ids"}
    names = {key: column for key, column in heavy.items() if wanted is None or key in wanted}
    view = views.with_heavy(samples, pool, list(names.values()))
    prompts = pool.scan("prompts").filter(pl.col("id").is_in(samples["prompt"].unique().implode())).collect()
    known = {row["id"]: _prompt_fields(row) for row in prompts.iter_rows(named=True)}
    keys = list(names)
    rows = [
        {**known[prompt], **dict(zip(keys, cells, strict=True))}
        for prompt, *cells in view.select("prompt", *names.values()).iter_rows()
    ]
    if wanted is None or "sample" in wanted:
        for row, sample in zip(rows, samples.iter_rows(named=True), strict=True):
            row["sample"] = sample
    return rows


def _prompt_fields(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "group": row["id"],
        "prompt": text_of(row["messages"]),
        "messages": row["messages"],
        "answer": row["answer"],
        "meta": json.loads(row["meta"] or "{}"),
    }


def _whole_groups(frame: pl.DataFrame, size: int) -> Iterator[pl.DataFrame]:
    """Slices of about `size` rows that never cut a prompt's group in two; `frame` is sorted by prompt."""
    start = 0
    prompts = frame["prompt"]
    while start < frame.height:
        end = min(frame.height, start + size)
        while end < frame.height and prompts[end] == prompts[end - 1]:
            end += 1
        yield frame[start:end]
        start = end


def _score_rows(ids: list[str], name: str, outcomes: list[tuple[float | None, str]]) -> pl.DataFrame:
    values, whys = zip(*outcomes, strict=True) if outcomes else ((), ())
    frame = pl.DataFrame(
        {"sample": ids, "value": values, "why": [str(why) for why in whys]},
        schema={"sample": pl.String, "value": pl.Float64, "why": pl.String},
    )
    why = pl.when(pl.col("why") == "").then(None).otherwise(pl.col("why"))
    return shape("scores", frame.with_columns(why.alias("why"), name=pl.lit(name), draw=pl.lit(0), weight=pl.lit(1.0)))
