"""score: reward functions, what a model makes of answers, strengths from comparisons, or what is worked out from these. A failure is a null with a reason, never a zero."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field, model_validator

from selfkd.core import views
from selfkd.core.files import reference_parts
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import SCHEMAS, Addition, Function, Pool
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
from selfkd.steps.by_model import BY_ROLE, BY_SCORER, OWNERS, REDUCES, SOURCES, by_model
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast, figure, pairs_of, times
from selfkd.steps.model_texts import Outcome, score_rows
from selfkd.steps.outlook import Outlook
from selfkd.steps.shuffled import dealt_scores
from selfkd.steps.step import Problem, Stage, Step, several
from selfkd.steps.step import Texts as Names

SLICE = 50_000  # samples whose texts are in memory at once
BATCH = 512  # samples per call of a worker
WAYS_OUT = """Fix the reward and repeat the command with --amend: nothing is generated again.
If the prompts or their gold answers are wrong, mend them and begin a new run: --name X (a run keeps the prompts it began with).
Or let more stay unscored: raise max_failed of this step in the recipe, with --amend."""
OTHER_WAYS_OUT = """Change the templates or the model of this step and repeat the command with --amend: nothing is generated again.
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
    later: ClassVar[frozenset[str]] = frozenset(
        {"elo", "value", "shuffled", "entropy", "certainty", "told", *BY_SCORER, *OWNERS} - {"params", "timeout"}
    )

    reward: str | Names | None = Field(None, description="file.py:function, or several of them.")
    logprob: str | None = Field(
        None,
        description="Score by the log-probability of the answer under this model (role@when), or of what `target` makes of it.",
    )
    entropy: str | None = Field(
        None,
        description="Score by the entropy, in nats, of this model's (role@when) distributions over the whole vocabulary from which the answer's tokens were drawn: the mean over them.",
    )
    certainty: str | None = Field(
        None,
        description="Score by how far those distributions are from a uniform one, KL(uniform || model), mean over tokens: self-certainty (Kang et al. 2025, arXiv 2502.18581).",
    )
    classifier: str | None = Field(
        None,
        description="Score by a reward model or classifier: a folder of safetensors, or a hub id (Org/model@revision). It reads prompt and answer in its own chat template, or as two texts where it has none; one class gives its number, several the probability of `label`.",
    )
    pairwise: str | None = Field(
        None,
        description="Compare the answers of a prompt two by two by a classifier of two texts, in both orders: its probability that the first is the better one (`label`), as comparisons for elo; the score is their mean.",
    )
    per_step: str | None = Field(
        None,
        description="Score by a process reward model, a classifier of tokens or a language model: the chance of `label` behind each step, put together by `reduce`.",
    )
    elo: str | None = Field(
        None,
        description="Score by strength within the prompt, on the scale of Elo, from the comparisons that a judge step (pairwise) gave under this name: Bradley-Terry by maximum likelihood, a tie being half a win for each.",
    )
    shuffled: str | Names | None = Field(
        None,
        description="Score by scores of these names, dealt out anew among the live samples: what a reward says is gone, and as much is kept (a control). Samples that ended alike change with samples of prompts that have as many.",
    )
    value: str | None = Field(
        None,
        description="Score by an expression over the samples, such as a difference of two scores or a rank within the prompt: it becomes a column like any score, also of pairs. It needs `as`.",
    )
    template: str | None = Field(None, description="What the model sees in place of the last user message.")
    told: Literal["own"] = Field(
        "own",
        description="Write told: own where `template` or `given` shows the prompt's gold answer to the model that scores.",
    )
    target: str | None = Field(
        None,
        description="Template of the text whose log-probability counts, in place of the answer (logprob); it may show the gold answer. Its end is not counted.",
    )
    given: str | None = Field(
        None, description="Template of how that text begins: what the model has said already, which is not counted (logprob)."
    )
    text: str | None = Field(
        None,
        description="Template of what a classifier reads, instead of prompt and answer. Default of pairwise: {{ of.text }}.",
    )
    second: str | None = Field(
        None, description="Template of its second text, where it reads two. Default of pairwise: {{ other.text }}."
    )
    label: str | int | None = Field(
        None,
        description="Which class counts, by its name in the model's config.json, or its number from 0: {label: entailment}; needed where there are several.",
    )
    pairs: int | None = Field(
        None, ge=1, description="Most comparisons per prompt, spread evenly over its answers; default: all with all (pairwise)."
    )
    step: str | None = Field(None, description="What ends a step of an answer; default: a line break (per_step).")
    mark: str | None = Field(
        None,
        description="What the model reads behind each step, and at whose last token it says what it thinks; default: what ends a step (per_step).",
    )
    good: str | None = Field(None, description="The token by which a language model calls a step good, such as '+' (per_step).")
    bad: str | None = Field(None, description="The token by which it calls one bad, such as '-' (per_step).")
    reduce: Literal["sum", "mean", "probability", "min", "product", "last"] | None = Field(
        None,
        description="How one score is made of many. logprob: sum, mean (per token), or probability, the mean of the tokens' probabilities (RLPR); default: sum. per_step: min, product, last or mean; default: min.",
    )
    of: str | None = Field(None, description="Only samples of this stream.")
    as_: str | Names | None = Field(
        None,
        alias="as",
        description="Name of the score, or a list of one name per reward; default: the function's name, 'shuffled_' before the other name, or 'logprob_of', 'entropy', 'certainty', 'rating' (classifier), 'wins' (pairwise), 'steps' (per_step), 'elo'.",
    )
    params: dict[str, Any] = Field({}, description="Fixed arguments of the reward function.")
    max_failed: float = Field(0.01, ge=0, le=1, description=f"Share of samples that may stay unscored{ONE_MAY}")
    timeout: float = Field(10.0, gt=0, description="Seconds one sample (or one prompt's group) may take.")

    @model_validator(mode="after")
    def _one_source(self) -> ScoreStep:
        if sum(bool(getattr(self, name)) for name in SOURCES) != 1:
            raise ValueError(f"give one of {', '.join(repr(name) for name in SOURCES[:-1])} and '{SOURCES[-1]}'")
        if self.value and not self.as_:
            raise ValueError("a score that is worked out needs a name: write as")
        return self

    @property
    def source(self) -> str:
        """Return the field that says what gives the score."""
        return next(name for name in SOURCES if getattr(self, name))

    def functions(self) -> list[str]:
        return several(self.reward)

    def scores(self) -> list[str]:
        usual = {**BY_ROLE, **{name: default for name, (_, default) in BY_SCORER.items()}, "elo": "elo"}
        own = [usual[self.source]] if self.source in usual else function_names(self.functions())
        return several(self.as_) or [f"shuffled_{name}" for name in several(self.shuffled)] or own

    def _origins(self) -> dict[str, str]:
        """Return {score: what gives it}: with other words, it would be another score."""
        if self.source in BY_ROLE:
            return {self.scores()[0]: f"{self.source} {self.models()[self.source]}{self._said()}"}
        if self.source in BY_SCORER:
            return {self.scores()[0]: f"{self.source} {getattr(self, self.source)}{self._said()}"}
        if self.elo:
            return {self.scores()[0]: f"elo of '{self.elo}'"}
        if self.value:
            return {self.scores()[0]: f"value '{self.value}'"}
        if self.shuffled:
            return {name: f"'{of}', shuffled" for name, of in zip(self.scores(), several(self.shuffled), strict=False)}
        params = f" with {self.params}" if self.params else ""
        return {name: f"{reference}{params}" for name, reference in zip(self.scores(), self.functions(), strict=False)}

    def models(self) -> dict[str, ModelRef]:
        return {self.source: ModelRef.parse(getattr(self, self.source))} if self.source in BY_ROLE else {}

    def _said(self) -> str:
        """Return the words that make this score another one than that of the same model without them."""
        given = {name: getattr(self, name) for name in OWNERS if name in self.later and name != "pairs"}
        said = {name: value for name, value in given.items() if value != type(self).model_fields[name].default}
        return f" with {said}" if said else ""

    def scorers(self) -> list[str]:
        return [getattr(self, self.source)] if self.source in BY_SCORER else []

    def templates(self) -> list[str]:
        return [one for one in (self.template, self.target, self.given, self.text, self.second) if one]

    def problems(self) -> Iterator[Problem]:
        for name, owners in OWNERS.items():
            if self.source not in owners and getattr(self, name) != type(self).model_fields[name].default:
                yield name, f"'{name}' belongs to {' and '.join(owners)}, and this is scored by {self.source}"
        allowed = REDUCES.get(self.source, ())
        if self.reduce and allowed and self.reduce not in allowed:
            yield "reduce", f"'{self.reduce}' does not reduce {self.source}: {', '.join(allowed)} do"
        if self.second and not self.text and self.source == "classifier":
            yield "second", "there is a second text only where there is a first: write text"
        if self.template and self.text:
            yield "template", "the model reads what `text` says, so nothing would read `template`: leave out one of the two"
        if bool(self.good) != bool(self.bad):
            yield "good" if self.good else "bad", "a language model calls steps good or bad by two tokens: write both"

    def scored_split(self) -> str | None:
        return "train"

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        if problem := seen.stream_problem(self.of, needs_samples=True):
            yield "of", problem
        if self.elo and self.elo not in seen.compared:
            known = ", ".join(dict.fromkeys(seen.compared)) or "none: a judge step with pairwise comes first"
            yield "elo", f"no comparisons '{self.elo}' here.{did_you_mean(self.elo, seen.compared)} Comparisons: {known}"
        for name in several(self.shuffled):
            if name not in seen.scores:
                known = ", ".join(seen.scores) or "none: a step that scores comes first"
                yield "shuffled", f"no score '{name}' here.{did_you_mean(name, seen.scores)} Scores: {known}"
        yield from name_problems(self.scores(), len(self.functions()) or len(several(self.shuffled)) or 1, self.as_)
        for said in seen.taken(self._origins()):
            yield "reward", f"{said}: give this one another name (as)"

    def adds(self, seen: Outlook) -> None:
        seen.add_scores(self._origins())
        seen.compared += self.scores() if self.pairwise else []

    def doubts(self, seen: Outlook) -> Iterator[Problem]:
        if self.pairwise and seen.most_answers(self.of) == 1:
            yield "pairwise", "each prompt has one answer here, so nothing is compared: raise n of the sample step"

    def cost(self, forecast: Forecast) -> Cost:
        if self.source not in (*BY_ROLE, *BY_SCORER):
            return Cost(self.name)
        count = forecast.samples(self.of)
        count = times(pairs_of(forecast.prompts, count, self.pairs), 2) if self.pairwise else count
        tokens = times(count, forecast.row_tokens)
        reader = str(getattr(self, self.source))
        said = f"{figure(count)} texts read by {reader}, {figure(tokens)} tokens"
        apart = None if self.source == "logprob" else reader  # a log-probability is taken by the engine that is there
        return Cost(self.name, said, read=tokens, reader=apart)

    def run(self, pool: Pool, context: Context) -> Addition:
        parts: list[Any] = []
        found: dict[str, Any] = {}
        if self.source in (*BY_ROLE, *BY_SCORER):
            parts.append(by_model(self, pool, context))
        if self.elo:
            parts.append(self._by_comparison(pool))
        if self.shuffled:
            parts += dealt_scores(pool, self.unscored(pool, self.scores()[0]), several(self.shuffled), self.scores())
        if self.value:
            parts.append(self._by_expression(self.value, pool, context))
        for reference, name in zip(self.functions(), self.scores(), strict=False):
            function = context.function(reference, self.params)
            scored = [context.save("scores", part) for part in self._by_function(pool, context, function, name)]
            found |= {name: said} if scored and (said := read_notes(function)) else {}
            parts += scored
        return Addition({"scores": parts}, notes={"rewards": found} if found else {})

    def unscored(self, pool: Pool, name: str) -> pl.DataFrame:
        done = pool.scores.filter(pl.col("name") == name).select(id="sample")
        return views.live(pool, self.of).join(done, on="id", how="anti").sort("prompt", "id")

    def _by_comparison(self, pool: Pool) -> pl.DataFrame:
        """Return the strength of each sample among those of its prompt that it was compared with, also those dropped since."""
        todo = self.unscored(pool, self.scores()[0])
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
        return score_rows(todo["id"].to_list(), self.scores()[0], found)

    def _by_expression(self, text: str, pool: Pool, context: Context) -> pl.DataFrame:
        """Return the value of the expression for each sample; a window of it sees the samples that have their score already, too."""
        view = views.sample_view(pool, self.of, text)
        found = view.select("id", value=context.expression("value", text, view, "number").cast(pl.Float64))
        todo = found.join(self.unscored(pool, self.scores()[0]).select("id"), on="id", how="semi", maintain_order="left")
        values = [value if value is not None and math.isfinite(value) else None for value in todo["value"]]
        whys = [_why_none(value) for value in todo["value"]]
        return score_rows(todo["id"].to_list(), self.scores()[0], list(zip(values, whys, strict=True)))

    def _by_function(self, pool: Pool, context: Context, function: Function, name: str) -> Iterator[pl.DataFrame]:
        todo = self.unscored(pool, name)
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
                self.check(done, failed, todo.height, outcomes, context, function)
                context.progress(done, todo.height, "samples")
            yield score_rows(part.filter(new)["id"].to_list(), name, outcomes)

    def rows_ahead(self, pool: Pool, function: Function, name: str) -> tuple[list[str], list[dict[str, Any]]]:
        """Return (ids, rows) that `run` will give the function for these samples; none where it sees a prompt's whole group."""
        if signature(function).grouped:
            return [], []
        todo = self.unscored(pool, name)
        return todo["id"].to_list(), rows_for_reward(todo, pool, wants(function))

    def _whole_prompts(self, pool: Pool, todo: pl.DataFrame) -> pl.DataFrame:
        """Return all samples of the prompts that have one to score: a vote counts those, too, that have their score already.

        Column `new` says which ones are to be scored.
        """
        found = views.live(pool, self.of).join(todo, on="prompt", how="semi").sort("prompt", "id")
        return found.with_columns(new=pl.col("id").is_in(todo["id"].implode()))

    def check(
        self,
        done: int,
        failed: int,
        total: int,
        outcomes: Sequence[Outcome],
        context: Context,
        function: Function | None = None,
    ) -> None:
        """Stop at once when all of the first ones fail, or as soon as more have failed than may fail in all."""
        broken = done >= min(FIRST, total) and failed == done and failed > 0
        if broken or failed > may_fail(self.max_failed, total):
            why = next(why for value, why in outcomes if unscored(value, why))
            advice = way_out(why, str(function.path), function.environment) if function else ""
            said = told(function.name, why) if function else why
            raise RewardError(
                f"{failed} of {done} samples ({failed / done:.1%}) could not be scored, limit {self.max_failed:.0%}. First: {said}",
                context.where,
                f"{advice}\n{WAYS_OUT if function else OTHER_WAYS_OUT}".strip(),
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
