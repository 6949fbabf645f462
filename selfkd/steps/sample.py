"""sample: ask a model for answers. The teacher is the same model, told more: a template here, never new code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import polars as pl
from pydantic import Field

from selfkd.backend.base import REQUESTS, Sampling
from selfkd.core import digest, views
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Addition, Pool
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast, answers, times
from selfkd.steps.outlook import Outlook
from selfkd.steps.question import Question
from selfkd.steps.step import Problem, Stage, Step


class SampleStep(Step):
    """Ask `model` for `n` answers to every live prompt (or about every live sample of the stream `of`)."""

    verb: ClassVar[str] = "sample"
    short: ClassVar[str | None] = "n"
    stage: ClassVar[Stage] = "generate"

    model: str = Field("policy", description="Who answers: role@when, such as policy, policy@base, policy@start.")
    n: int = Field(1, ge=1, description="Answers per prompt.")
    temperature: float = Field(1.0, ge=0, description="0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: the smallest set of tokens with this much probability.")
    top_k: int = Field(0, ge=0, description="Keep only this many most likely tokens; 0 keeps all.")
    max_tokens: int = Field(256, ge=1, description="Longest answer, in tokens; a cut one has finish_reason = 'length'.")
    stop: tuple[str, ...] = Field((), description="Strings that end an answer; they are not part of it.")
    template: str | None = Field(
        None, description="What the teacher sees in place of the last user message: a .j2 file or inline Jinja."
    )
    system: str | None = Field(None, description="A system message that only the teacher sees.")
    where: str | None = Field(
        None, description="Ask only about prompts (or, with `of`, samples) for which this expression holds."
    )
    of: str | None = Field(
        None, description="Ask about each live sample of this stream instead of each prompt; it becomes the parent."
    )
    as_: str = Field("sample", alias="as", description="Name of the stream that the answers form.")
    vllm: dict[str, Any] = Field({}, description="Other fields of vLLM's SamplingParams, passed through.")

    def templates(self) -> list[str]:
        return [self.template] if self.template else []

    def expressions(self) -> list[tuple[str, str, str]]:
        return [("where", self.where, "samples" if self.of else "prompts")] if self.where else []

    def models(self) -> dict[str, ModelRef]:
        return {"model": ModelRef.parse(self.model)}

    def question(self) -> Question | None:
        return None if self.of else self._wording()

    def _wording(self) -> Question:
        return Question("train", self.template, self.system, self.max_tokens)

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        if problem := seen.stream_problem(self.of, needs_samples=False):
            yield "of", problem
        if problem := seen.room_problem(self.max_tokens):
            yield "max_tokens", problem

    def adds(self, seen: Outlook) -> None:
        seen.add_streams([self.as_])

    def cost(self, forecast: Forecast) -> Cost:
        asked = times(forecast.samples(self.of) if self.of else forecast.prompts, self.n)
        forecast.streams[self.as_] = asked
        forecast.longest = max(forecast.longest, self.max_tokens)
        return answers(self.name, asked, self.max_tokens)

    def run(self, pool: Pool, context: Context) -> Addition:
        sampling = Sampling(self.temperature, self.top_p, self.top_k, self.max_tokens, self.stop, self.vllm)
        files = context.generate(context.model(ModelRef.parse(self.model)), self.requests(pool, context), sampling, self.as_)
        return Addition({"samples": list(files)})

    def requests(self, pool: Pool, context: Context) -> pl.DataFrame:
        """The sorted request list: one row per answer wanted, seeded by names only (round, step, prompt, number)."""
        rows = []
        for about in self._about(pool, context):
            parents = [about["of"]["id"]] if about["of"] else []
            for number in range(self.n):
                key = (context.index, self.name, about["prompt"], parents, number)
                rows.append(
                    {
                        "id": digest.of("sample", *key)[:16],
                        "prompt": about["prompt"],
                        "number": number,
                        "parents": parents,
                        "seed": context.seed("sample", about["prompt"], parents, number, 0),
                        "tiebreak": digest.uniform(context.seed("tie"), *key),
                        "teacher_messages": about["teacher_messages"],
                    }
                )
        return pl.DataFrame(rows, schema=REQUESTS).sort("prompt", "parents", "number")

    def _about(self, pool: Pool, context: Context) -> list[dict[str, Any]]:
        """What is asked about, and with which messages: one entry per prompt or per parent sample."""
        prompts = views.with_heavy(views.prompt_view(pool), pool, ["messages", "meta"], "prompts")
        parents: list[dict[str, Any] | None] = [None] * prompts.height
        if self.of:
            view = views.sample_view(pool, self.of, self.where)
            chosen = view.filter(views.expression(self.where, view.columns, self.name)) if self.where else view
            chosen = views.with_heavy(chosen, pool, [name for name in ("text",) if name not in chosen.columns])
            parents = list(chosen.iter_rows(named=True))
            prompts = chosen.select(id="prompt").join(prompts, on="id", how="left", maintain_order="left")
        elif self.where:
            prompts = prompts.filter(views.expression(self.where, prompts.columns, self.name))
            parents = [None] * prompts.height
        render = context.template(self.template) if self.template else None
        rows = zip(prompts.iter_rows(named=True), parents, strict=True)
        say = self._wording().messages
        return [{"prompt": row["id"], "of": of, "teacher_messages": say(row, render, of)} for row, of in rows]
