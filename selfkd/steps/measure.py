"""measure: sample and score held-out prompts, outside the pool: nothing measured can be trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field

from selfkd.core import views
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import SCHEMAS, Addition, Pool, light
from selfkd.core.stats import mean, pass_at
from selfkd.core.wording import did_you_mean
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast, answers, least, times
from selfkd.steps.outlook import Outlook
from selfkd.steps.question import Question
from selfkd.steps.sample import SampleStep
from selfkd.steps.score import ONE_MAY, ScoreStep, function_names, name_problems
from selfkd.steps.step import Problem, Stage, Step, TextList, Texts, several

CHANGES = ("change", "change_low", "change_high")  # of a measurement against the base, and the bounds of its interval
COUNTS = ("prompts", "samples", "tokens", "chars", "cut")  # what is counted beside the scores

SCORING = ("reward", "as", "params", "max_failed", "timeout", "pass_at", "vote")
VOTE = "vote"  # the score by which the answers to a prompt are voted on
VOTED = 0  # stands where a pass@k has its k


class MeasureStep(Step):
    """Answer the prompts of a split with the current model and score the answers. Greedy by default."""

    verb: ClassVar[str] = "measure"
    short: ClassVar[str | None] = "reward"
    per_round: ClassVar[frozenset[str]] = frozenset({"model"})
    stage: ClassVar[Stage] = "measure"
    outside: ClassVar[bool] = True

    later: ClassVar[frozenset[str]] = frozenset({"as_", "top_k", "stop", "system", "vllm", "pass_at", "vote", "told"})

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
        return [*several(self.reward), *several(self.vote)]

    def templates(self) -> list[str]:
        return [self.template] if self.template else []

    def models(self) -> dict[str, ModelRef]:
        return {"model": ModelRef.parse(self.model)}

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
        names = [*self.scores(), *self._passes(), *(f"{name}_scored" for name in self.scores()), *COUNTS]
        return [f"{self.split}/{name}" for name in names]

    def _passes(self) -> list[str]:
        passes = [pass_name(name, self.pass_at) for name in self.scores()] if self.pass_at else []
        return [*passes, *(maj_name(name, self.n) for name in self.scores() if self.vote)]

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

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        yield from name_problems(self.scores(), len(several(self.reward)), self.as_)
        if self.vote and VOTE in self.scores():
            yield "as", f"'{VOTE}' is what the vote is called: name this score otherwise (as)"
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
        return answers(self.name, asked, self.max_tokens)

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
        return Addition({**asked.tables, **scored.tables}, metrics=self._summary(held), notes=scored.notes)

    def _scoring(self) -> ScoreStep:
        """Return the step that scores, the vote included."""
        rewards, names = self.reward, self.as_
        if self.vote:
            rewards, names = tuple(self.functions()), (*self.scores(), VOTE)
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
        for name in self.scores():
            means = _by_prompt(view, name)
            found[name], found[f"{name}_scored"] = mean(means), len(means)
            if self.pass_at:
                found[pass_name(name, self.pass_at)] = mean(_by_prompt(view, name, self.pass_at))
            if self.vote:
                found[maj_name(name, self.n)] = mean(_by_vote(view, name))
        place = "warm" if self.name.endswith("-warm") else self.split  # after a warm-up; the base's own numbers stay dev/…
        return {f"{place}/{name}": value for name, value in found.items()}


def _by_prompt(view: pl.DataFrame, score: str, k: int = 1) -> dict[str, float]:
    """Return {prompt: mean of its scored answers}, or above 1 its pass@k; a prompt with fewer than k of them is left out.

    Added up in one order: a last digit must not depend on the number of threads.
    """
    if score not in view.columns:
        return {}
    scored = view.filter(pl.col(score).is_finite()).sort("prompt", "id")
    groups = scored.group_by("prompt", maintain_order=True).agg(score).iter_rows()
    return of_prompts(dict(groups), k)


def _by_vote(view: pl.DataFrame, score: str) -> dict[str, float]:
    """Return {prompt: mean score of the answers that win the vote}; an answer that lacks a score or a mark takes no part."""
    if not {score, VOTE} <= set(view.columns):
        return {}
    known = view.filter(pl.col(score).is_finite() & pl.col(VOTE).is_finite()).sort("prompt", "id")
    groups = known.group_by("prompt", maintain_order=True).agg(score, VOTE)
    return {prompt: of_vote(values, votes) for prompt, values, votes in groups.select("prompt", score, VOTE).iter_rows()}


def of_vote(values: Sequence[float], votes: Sequence[float]) -> float:
    """Return the mean value of those with the most votes: answers that tie share the prompt.

    >>> of_vote([1, 1, 0], [2, 2, 1]), of_vote([1, 0], [1, 1])
    (1.0, 0.5)
    """
    won = [value for value, vote in zip(values, votes, strict=True) if vote == max(votes)]
    return math.fsum(won) / len(won)


def of_prompts(answers: Mapping[str, list[float]], k: int = 1) -> dict[str, float]:
    """Return {prompt: mean of its scores}, or above 1 its pass@k."""
    if k == 1:
        return {prompt: math.fsum(values) / len(values) for prompt, values in answers.items()}
    return {prompt: pass_at(values, k) for prompt, values in answers.items() if len(values) >= k}


def pass_name(score: str, k: int) -> str:
    """Return what a score's pass@k is called, as an expression may name it."""
    return f"{score}_pass_{k}"


def maj_name(score: str, n: int) -> str:
    """Return what a score is called that a vote among n answers gets."""
    return f"{score}_maj_{n}"
