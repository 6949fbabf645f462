"""measure: sample and score held-out prompts, outside the pool: nothing measured can be trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import polars as pl
from pydantic import Field

from selfkd.core import views
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import SCHEMAS, Addition, Pool, light
from selfkd.core.stats import mean, pass_at
from selfkd.core.votes import plurality
from selfkd.core.wording import did_you_mean
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast, answers, figure, least, times
from selfkd.steps.model_texts import score_rows
from selfkd.steps.outlook import Outlook
from selfkd.steps.question import Question
from selfkd.steps.sample import SampleStep
from selfkd.steps.score import ONE_MAY, ScoreStep, function_names, name_problem, name_problems
from selfkd.steps.step import Problem, Stage, Step, TextList, Texts, several

CHANGES = ("change", "change_low", "change_high")  # of a measurement against the base, and the bounds of its interval
COUNTS = ("prompts", "samples", "tokens", "chars", "cut")  # what is counted beside the scores

SCORING = ("reward", "as", "params", "max_failed", "timeout", "pass_at", "vote", "key", "logprobs", "pick")
VOTE = "vote"  # the score by which the answers to a prompt are voted on
KEY = "key"  # the score that is equal where answers agree
PICK = "pick"  # the score by which one answer to each prompt is picked
PARSED = "parsed"  # the metric that says how many answers have a key
Way = Literal["mean", "pass", "vote", "key", "pick"]
MARKS = {"vote": VOTE, "key": KEY, "pick": PICK}  # what a figure is made of beside the scores


class Figure(NamedTuple):
    """How a figure is made of a reward's scores: their mean, pass@k, what wins a vote or is picked, or what most of k answers say."""

    reward: str
    way: Way = "mean"
    k: int = 1


class MeasureStep(Step):
    """Answer the prompts of a split with the current model and score the answers. Greedy by default."""

    verb: ClassVar[str] = "measure"
    short: ClassVar[str | None] = "reward"
    per_round: ClassVar[frozenset[str]] = frozenset({"model"})
    stage: ClassVar[Stage] = "measure"
    outside: ClassVar[bool] = True

    later: ClassVar[frozenset[str]] = frozenset(
        {"as_", "top_k", "stop", "system", "vllm", "pass_at", "vote", "key", "told", "logprobs", "pick"}
    )

    reward: str | Texts = Field(description="file.py:function, or several; the first is the one that tables show.")
    as_: str | Texts | None = Field(
        None, alias="as", description="Name of the metric, or a list of one name per reward; default: the function's name."
    )
    split: str = Field("dev", description="Which prompts. `test` is measured at round 0 and after the last round by itself.")
    model: str = Field("policy", description="Who answers: role@when.")
    n: int = Field(1, ge=1, description="Answers per prompt.")
    pass_at: int | None = Field(
        None,
        ge=2,
        description="Also measure <score>_pass_<k>: the chance that one of k of the n answers has a score of 1 (pass@k, unbiased).",
    )
    vote: str | None = Field(
        None,
        description="Also measure <score>_maj_<n>, what a vote among the n answers gets (maj@n): file.py:function, such as reward/vote.py:share, gives the answers that win the highest mark, and the mean score of these counts.",
    )
    key: str | None = Field(
        None,
        description="Also measure parsed, the share of answers that can be read, and of several answers <score>_maj_<k>, what most of k of them say gets (maj@k, unbiased), for k of n and of pass_at: file.py:function, such as reward/agree.py:answer, gives answers that agree one number, and None where there is none.",
    )
    logprobs: dict[str, str] = Field(
        {},
        description="Log-probabilities of the answers, behind their prompts as they stand, under other models: {name: role@when}. They are columns that `pick` may name.",
    )
    pick: str | None = Field(
        None,
        description="Also measure <score>_best_<n>, what picking one of the n answers gets (best-of-n): an expression over the answers gives the picked one its highest value, and its score counts. Null while a model of `logprobs` is not made yet.",
    )
    temperature: float = Field(0.0, ge=0, le=2, description="0 is greedy; vLLM takes at most 2.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus, where temperature is above 0.")
    top_k: int = Field(0, ge=0, description="Keep only this many most likely tokens; 0 keeps all.")
    max_tokens: int = Field(256, ge=1, description="Longest answer, in tokens.")
    stop: TextList = Field((), description="Strings that end an answer; they are not part of it.")
    template: str | None = Field(None, description="What the model sees in place of the last user message.")
    system: str | None = Field(None, description="A system message for the model that answers.")
    told: Literal["own"] = Field(
        "own",
        description="Write told: own where the template shows the prompt's gold answer: what is measured then is a teacher.",
    )
    limit: int | None = Field(None, ge=1, description="Only the first so many prompts of the split.")
    vllm: dict[str, Any] = Field({}, description="Other fields of vLLM's SamplingParams, passed through.")
    params: dict[str, Any] = Field({}, description="Fixed arguments of the reward functions.")
    max_failed: float = Field(0.01, ge=0, le=1, description=f"Share of answers that may stay unscored{ONE_MAY}")
    timeout: float = Field(10.0, gt=0, description="Seconds one answer may take to be scored.")

    def generation(self) -> dict[str, Any]:
        """Return its identity without what only scores the answers: a mended reward scores those that are there."""
        return {name: value for name, value in self.identity().items() if name not in SCORING}

    def functions(self) -> list[str]:
        return [*several(self.reward), *several(self.vote), *several(self.key)]

    def templates(self) -> list[str]:
        return [self.template] if self.template else []

    def models(self) -> dict[str, ModelRef]:
        others = {f"logprobs.{name}": ModelRef.parse(text) for name, text in self.logprobs.items()}
        return {"model": ModelRef.parse(self.model), **others}

    def may_lack(self) -> frozenset[str]:
        return frozenset(self.models()) - {"model"}

    def question(self) -> Question | None:
        return Question(self.split, self.template, self.system, self.max_tokens)

    def split_asked(self) -> str:
        return self.split

    def scored_split(self) -> str | None:
        return self.split

    def scores(self) -> list[str]:
        return several(self.as_) or function_names(several(self.reward))

    def metrics(self) -> list[str]:
        """Return the names of what it measures, the rewards first."""
        more = [name for name in self._figures() if name not in self.scores()]
        parsed = [PARSED] if self.key else []
        names = [*self.scores(), *more, *(f"{name}_scored" for name in self.scores()), *parsed, *COUNTS]
        return [f"{self.split}/{name}" for name in names]

    def _figures(self) -> dict[str, Figure]:
        voting = {"n": self.n, "pass_at": self.pass_at, "vote": self.vote, "key": self.key, "pick": self.pick}
        return figures(self.scores(), voting)

    def _asking(self) -> SampleStep:
        """Return the step that asks: the same words mean the same in both."""
        words = {name: getattr(self, name) for name in SampleStep.model_fields if name in type(self).model_fields}
        return SampleStep(**{**words, "as_": self.split})

    def problems(self) -> Iterator[Problem]:
        yield from self._asking().problems()
        if self.pass_at and self.pass_at > self.n:
            yield (
                "pass_at",
                f"{self.pass_at} answers cannot be drawn of {self.n}: raise n, to {4 * self.pass_at} for a steady figure",
            )
        elif self.pass_at and not self.temperature:
            yield "pass_at", "at temperature 0 the answers to a prompt are all the same: write a temperature"
        if self.vote and (self.n < 2 or not self.temperature):
            yield "vote", "a vote needs several answers that may differ: write n, and a temperature"
        if self.key and self.vote:
            yield "key", "'key' counts the answers that agree, which is a vote: leave out 'vote'"
        if self.key and self.n > 1 and not self.temperature:
            yield "key", "at temperature 0 the answers to a prompt are all the same: write a temperature"
        if self.pick and (self.n < 2 or not self.temperature):
            yield "pick", "there is one to pick only of several answers that may differ: write n, and a temperature"
        if self.logprobs and not self.pick:
            yield "logprobs", "nothing reads them without `pick`: write pick, such as pick: " + next(iter(self.logprobs))
        yield from ((f"logprobs.{name}", problem) for name in self.logprobs if (problem := name_problem(name)))

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        yield from name_problems(self.scores(), len(several(self.reward)), self.as_)
        for name in self._voting():
            if name in self.scores():
                yield "as", f"'{name}' is what the {name} is called: name this score otherwise (as)"
        for name in sorted({*self.logprobs, *([PICK] if self.pick else [])} & {*self.scores(), *self._voting()}):
            yield "as", f"'{name}' is a column that `pick` has: name this score otherwise (as)"
        for name in self.scores():
            taken = self.metrics().count(f"{self.split}/{name}") > self.scores().count(name)
            if taken and name not in SCHEMAS["samples"]:
                yield "as" if self.as_ else "reward", f"'{name}' is a number of every measure step: name it otherwise (as)"
        if self.split == "test":
            yield "split", "leave the test split alone: it is measured by itself at round 0 and after the last round"
        elif self.split not in seen.splits:
            what = f"there are no prompts for the split '{self.split}'{did_you_mean(self.split, seen.splits) or '.'}"
            yield "split", f"{what} Splits: {', '.join(seen.splits)}; add prompts.{self.split}"
        taken_already = [metric for metric in self.metrics()[: -len(COUNTS)] if metric in seen.metrics]
        for metric in taken_already[:1]:
            yield "", f"{seen.metrics[metric]} measures {metric} already: name this one otherwise (as), or use another split"
        if problem := seen.room_problem(self.max_tokens):
            yield "max_tokens", problem

    def adds(self, seen: Outlook) -> None:
        seen.metrics |= dict.fromkeys(self.metrics(), self.name)

    def cost(self, forecast: Forecast) -> Cost:
        asked = times(least(forecast.sizes.get(self.split), self.limit), self.n)
        made = answers(self.name, asked, self.max_tokens)
        if not self.logprobs:
            return made
        longest = min(forecast.context, (forecast.prompt_tokens or forecast.context) + self.max_tokens)
        read = times(asked, longest * len(self.logprobs))
        others = ", ".join(dict.fromkeys(self.logprobs.values()))
        return replace(made, what=f"{made.what}; {figure(read)} tokens read by {others}", read=read)

    def run(self, pool: Pool, context: Context) -> Addition:
        held = context.split(self.split)
        if self.limit:
            held = Pool({"prompts": held.prompts.head(self.limit)}, held.files)
        held = held + Pool(models=pool.models)
        asked = self._asking().run(held, context)
        files = tuple(part for part in asked.tables["samples"] if isinstance(part, Path))
        held = held + Pool({"samples": light("samples", asked.whole("samples"))}, {"samples": files})
        scored = self._scoring().run(held, context)
        held = held + Pool({"scores": scored.whole("scores")}, scores_named=tuple(self.scores()))
        picked = self._picked(held, context) if self.pick else []
        held = held + Pool({"scores": pl.concat(picked)}) if picked else held
        scores = {"scores": [*scored.tables["scores"], *picked]} if picked else {}
        return Addition({**asked.tables, **scored.tables, **scores}, metrics=self._summary(held), notes=scored.notes)

    def _picked(self, held: Pool, context: Context) -> list[pl.DataFrame]:
        """Return the scores by which one answer to each prompt is picked; none while a model that they need is not there."""
        if not all(context.there(self.models()[name]) for name in self.may_lack()):
            return []
        found = []
        for name, model in self.logprobs.items():
            reading = ScoreStep(name=self.name, logprob=model, as_=name, max_failed=self.max_failed)
            scores = reading.run(held, context).whole("scores")
            held = held + Pool({"scores": scores}, scores_named=(name,))
            found.append(scores)
        view = views.sample_view(held, None, str(self.pick))
        values = view.select("id", value=context.expression(PICK, str(self.pick), view, "number").cast(pl.Float64))
        outcomes = [(value if value is not None and math.isfinite(value) else None, "") for value in values["value"]]
        return [*found, score_rows(values["id"].to_list(), PICK, outcomes)]

    def _voting(self) -> list[str]:
        """Return what the scores are called that only vote."""
        return [name for name, given in ((VOTE, self.vote), (KEY, self.key)) if given]

    def _scoring(self) -> ScoreStep:
        """Return the step that scores, the vote included."""
        rewards, names = self.reward, self.as_
        if self._voting():
            rewards, names = tuple(self.functions()), (*self.scores(), *self._voting())
        return ScoreStep(
            name=self.name, reward=rewards, params=self.params, max_failed=self.max_failed, timeout=self.timeout, as_=names
        )

    def _summary(self, held: Pool) -> dict[str, Any]:
        """Means over prompts of each prompt's mean score, so that a prompt counts once whatever `n` is.

        A prompt without a scored answer counts nowhere, so `<score>_scored` says how many did; the mean of none is null.
        """
        view = views.with_scores(held.samples, held)
        found: dict[str, Any] = {"prompts": held.prompts.height, "samples": view.height, "tokens": int(view["tokens"].sum())}
        found["chars"], found["cut"] = view.select(pl.col("chars").mean(), (pl.col("finish_reason") == "length").mean()).row(0)
        for name, how in self._figures().items():
            means = by_prompt(view, how)
            found[name] = mean(means)
            if how.way == "mean":
                found[f"{name}_scored"] = len(means)
        if self.key:
            found[PARSED] = mean(_parsed(view))
        place = "warm" if self.name.endswith("-warm") else self.split  # after a warm-up; the base's own numbers stay dev/…
        return {f"{place}/{name}": value for name, value in found.items()}


def by_prompt(view: pl.DataFrame, how: Figure) -> dict[str, float]:
    """Return {prompt: a figure of its scored answers}; a prompt that has too few is left out, and an answer without a mark has no part in a vote or a pick.

    Added up in one order: a last digit must not depend on the number of threads.
    """
    mark = MARKS.get(how.way)
    needed = [how.reward, *([mark] if mark in (VOTE, PICK) else [])]
    if not set(needed) <= set(view.columns):
        return {}
    known = view.filter(pl.all_horizontal(pl.col(name).is_finite() for name in needed)).sort("prompt", "id")
    shown = [how.reward, *([mark] if mark in view.columns else [])]  # where no answer could be read, nobody has a key
    groups = known.group_by("prompt", maintain_order=True).agg(shown).iter_rows()
    return {prompt: _figure(how, *cells) for prompt, *cells in groups if len(cells[0]) >= how.k}


def _figure(how: Figure, values: list[float], marks: Sequence[Any] = ()) -> float:
    if how.way == "pass":
        return pass_at(values, how.k)
    if how.way in ("vote", "pick"):
        return of_highest(values, marks)
    if how.way == "key":
        return plurality(values, marks or [None] * len(values), how.k)
    return math.fsum(values) / len(values)


def _parsed(view: pl.DataFrame) -> dict[str, float]:
    """Return {prompt: share of its answers that have a key}."""
    read = pl.col(KEY).is_finite().fill_null(False) if KEY in view.columns else pl.lit(False)
    groups = view.group_by("prompt").agg((read.sum() / pl.len()).alias(PARSED)).sort("prompt")
    return dict(groups.iter_rows())


def figures(scores: Sequence[str], words: Mapping[str, Any]) -> dict[str, Figure]:
    """Return {name: how it is made} of all figures of a measure step with these words and scores, the scores themselves first."""
    k, n = words.get("pass_at"), words.get("n", 1)
    found = {name: Figure(name) for name in scores}
    found |= {pass_name(name, k): Figure(name, "pass", k) for name in scores if k}
    found |= {maj_name(name, n): Figure(name, "vote") for name in scores if words.get("vote")}
    found |= {best_name(name, n): Figure(name, "pick") for name in scores if words.get("pick")}
    sizes = sorted({k or n, n}) if words.get("key") and n > 1 else []
    return found | {maj_name(name, size): Figure(name, "key", size) for name in scores for size in sizes}


def of_highest(values: Sequence[float], marks: Sequence[float]) -> float:
    """Return the mean value of those with the highest mark, such as the most votes: answers that tie share the prompt.

    >>> of_highest([1, 1, 0], [2, 2, 1]), of_highest([1, 0], [1, 1])
    (1.0, 0.5)
    """
    highest = max(marks)
    won = [value for value, mark in zip(values, marks, strict=True) if mark == highest]
    return math.fsum(won) / len(won)


def pass_name(score: str, k: int) -> str:
    """Return what a score's pass@k is called, as an expression may name it."""
    return f"{score}_pass_{k}"


def maj_name(score: str, n: int) -> str:
    """Return what a score is called that a vote among so many answers gets."""
    return f"{score}_maj_{n}"


def best_name(score: str, n: int) -> str:
    """Return what a score is called that picking one of n answers gets."""
    return f"{score}_best_{n}"
