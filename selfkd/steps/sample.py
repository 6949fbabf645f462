"""sample: ask a model for answers. The teacher is the same model, told more: a template here, never new code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl
from pydantic import Field

from selfkd.backend.base import REQUESTS, TOO_LONG, Sampling
from selfkd.backend.engine.sampling_options import check_length, check_vllm
from selfkd.core import digest, views
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Addition, Pool, shape
from selfkd.steps.context import Context, Render
from selfkd.steps.forecast import Cost, Forecast, answers, times
from selfkd.steps.outlook import Outlook
from selfkd.steps.question import LONGER, Question
from selfkd.steps.step import Problem, Stage, Step, TextList, several
from selfkd.steps.told import GOLD, of_another


class SampleStep(Step):
    """Ask `model` for `n` answers to every live prompt (or about every live sample of the stream `of`)."""

    verb: ClassVar[str] = "sample"
    short: ClassVar[str | None] = "n"
    per_round: ClassVar[frozenset[str]] = frozenset({"where", "model"})
    stage: ClassVar[Stage] = "generate"
    later: ClassVar[frozenset[str]] = frozenset({"told", "begin"})

    model: str = Field("policy", description="Who answers: role@when, such as policy, policy@base, policy@start.")
    n: int = Field(1, ge=1, description="Answers per prompt.")
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy; vLLM takes at most 2.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: the smallest set of tokens with this much probability.")
    top_k: int = Field(0, ge=0, description="Keep only this many most likely tokens; 0 keeps all.")
    max_tokens: int = Field(256, ge=1, description="Longest answer, in tokens; a cut one has finish_reason = 'length'.")
    stop: TextList = Field((), description="Strings that end an answer; they are not part of it.")
    template: str | None = Field(
        None, description="What the teacher sees in place of the last user message: a .j2 file or inline Jinja."
    )
    system: str | None = Field(None, description="A system message that only the teacher sees.")
    begin: str | None = Field(
        None,
        description="How the answer begins: a template, and the model goes on from what it makes, such as the right steps of another answer (`of`). The beginning is a part of the answer; as nobody drew it, the answer has no log-probability.",
    )
    told: Literal["own", "other"] = Field(
        "own",
        description="Whose gold answer and further columns the template is given. Write told: own where it shows the gold answer. other: those of another prompt of the round with another answer (a control: what a teacher gives that is told something wrong).",
    )
    where: str | None = Field(
        None, description="Ask only about prompts (or, with `of`, samples) for which this expression holds."
    )
    of: str | None = Field(
        None, description="Ask about each live sample of this stream instead of each prompt; it becomes the parent."
    )
    as_: str = Field("sample", alias="as", description="Name of the stream that the answers form.")
    vllm: dict[str, Any] = Field({}, description="Other fields of vLLM's SamplingParams, passed through.")

    def templates(self) -> list[str]:
        return [*several(self.template), *several(self.begin)]

    def models(self) -> dict[str, ModelRef]:
        return {"model": ModelRef.parse(self.model)}

    def question(self) -> Question | None:
        return self._wording()

    def _wording(self) -> Question:
        return Question("train", self.template, self.system, self.max_tokens, bool(self.of))

    def problems(self) -> Iterator[Problem]:
        for name, value in self.vllm.items():
            yield from ((f"vllm.{name}", problem) for problem in check_vllm(name, value))
        yield from (("vllm.min_tokens", problem) for problem in check_length(self.vllm, self.max_tokens))

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        if self.told == "other" and not self.template:
            yield "told", "without a template the teacher is told nothing: write the template that tells it"
        if seen.take and seen.replayed and not self.of:
            asked = (
                f"the prompts that '{seen.replayed[0]}' brings back would be asked again, beside the {seen.take} of this round"
            )
            yield "", f"{asked}: put the replay step behind this one"
        if seen.brought and not self.of:
            asked = f"the prompts that '{seen.brought[0]}' adds would be asked too"
            yield "", f"{asked}: put that step behind this one, or write `others: drop` in it"
        if problem := seen.stream_problem(self.of, needs_samples=False):
            yield "of", problem
        if self.as_ in seen.aside:
            yield "as", f"the stream '{self.as_}' holds judgments, and answers are kept apart from them: name it otherwise (as)"
        if problem := seen.room_problem(self.max_tokens):
            yield "max_tokens", problem

    def adds(self, seen: Outlook) -> None:
        plain = not (self.template or self.system) and (self.as_ not in seen.streams or self.as_ in seen.as_prompted)
        seen.as_prompted = seen.as_prompted | {self.as_} if plain else seen.as_prompted - {self.as_}
        about = seen.most_answers(self.of) if self.of else 1
        seen.add_streams([self.as_], None if about is None else about * self.n)

    def cost(self, forecast: Forecast) -> Cost:
        asked = times(forecast.samples(self.of) if self.of else forecast.prompts, self.n)
        forecast.streams[self.as_] = asked
        forecast.longest = max(forecast.longest, self.max_tokens)
        return answers(self.name, asked, self.max_tokens)

    def run(self, pool: Pool, context: Context) -> Addition:
        sampling = Sampling(self.temperature, self.top_p, self.top_k, self.max_tokens, self.stop, self.vllm)
        model, requests = context.model(ModelRef.parse(self.model)), self.requests(pool, context)
        unmeasured = bool(self.of or self.begin) or self.told == "other"  # how long such a request is, nobody knew before
        files = context.generate(model, requests, sampling, self.as_, about_samples=unmeasured)
        drops = self._not_asked(files) if unmeasured and files else []
        return Addition({"samples": list(files), **({"drops": [shape("drops", drops)]} if drops else {})})

    def _not_asked(self, files: Sequence[Path]) -> list[dict[str, str]]:
        """Return a drop for each request about a sample that did not fit into the context."""
        found = pl.scan_parquet(list(files), glob=False).filter(pl.col("finish_reason") == TOO_LONG).select("id").collect()
        return [{"id": name, "stream": self.as_, "step": self.name, "reason": LONGER} for name in sorted(found["id"])]

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
                        **({"begun": about["begun"]} if self.begin else {}),
                    }
                )
        begun = {"begun": pl.String} if self.begin else {}
        return pl.DataFrame(rows, schema={**REQUESTS, **begun}).sort("prompt", "parents", "number")

    def _about(self, pool: Pool, context: Context) -> list[dict[str, Any]]:
        """What is asked about, and with which messages: one entry per prompt or per parent sample."""
        chosen = views.sample_view(pool, self.of, self.where) if self.of else views.prompt_view(pool, self.where)
        if self.where:
            chosen = chosen.filter(context.expression("where", self.where, chosen, "condition"))
        if self.of:
            named = {name for one in self.templates() for name in context.sample_fields(one)}
            chosen = views.with_shown(chosen, pool, named)
        parents = chosen.iter_rows(named=True) if self.of else [None] * chosen.height
        prompts = self._with_messages(chosen.select(id="prompt") if self.of else chosen, pool)
        prompts = self._telling(prompts, pool, context) if self.told == "other" else prompts
        shown = (*chosen.columns, *views.SHOWN) if self.of else None
        render, begin = (
            context.template(field, reference, shown) if reference else None
            for field, reference in (("template", self.template), ("begin", self.begin))
        )
        rows = zip(prompts.iter_rows(named=True), parents, strict=True)
        say = self._wording().messages
        return [
            {"prompt": row["id"], "of": of, "teacher_messages": say(row, render, of), "begun": _text(begin, row, of)}
            for row, of in rows
        ]

    def _telling(self, prompts: pl.DataFrame, pool: Pool, context: Context) -> pl.DataFrame:
        """Return the prompts with the gold of others; one without an answer has nothing to exchange, and keeps what it has."""
        other = of_another(pool, context.seed("told"), context.where)
        joined = prompts.join(other, on="id", how="left", maintain_order="left", suffix="_other")
        taken = [pl.coalesce(f"{name}_other", name).alias(name) for name in GOLD]
        return joined.with_columns(taken).drop(f"{name}_other" for name in GOLD)

    def _with_messages(self, asked: pl.DataFrame, pool: Pool) -> pl.DataFrame:
        """The prompts of `asked`, in its order, with all that a template may name."""
        heavy = views.with_heavy(views.live_prompts(pool), pool, ["messages", "meta"], "prompts")
        more = [name for name in heavy.columns if name == "id" or name not in asked.columns]
        return asked.join(heavy.select(more), on="id", how="left", maintain_order="left")


def _text(render: Render | None, prompt: dict[str, Any], of: dict[str, Any] | None) -> str:
    """Return what a template makes of a prompt and a sample of it, '' without one."""
    return str(render(prompt, [{"role": "user", "content": ""}], of=of)[-1]["content"]) if render else ""
