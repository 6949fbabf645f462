"""gold: each prompt's gold answer as a sample in a stream of its own, to be chosen, mixed in or trained on."""

from __future__ import annotations

from typing import ClassVar

import polars as pl
from pydantic import Field

from selfkd.core import digest, views
from selfkd.core.pool import Addition, Pool, shape
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast
from selfkd.steps.outlook import Outlook
from selfkd.steps.step import Step


class GoldStep(Step):
    """One sample per live prompt that has a gold answer; `text` may say it in full (a worked solution from meta)."""

    verb: ClassVar[str] = "gold"
    short: ClassVar[str | None] = "text"
    later: ClassVar[frozenset[str]] = frozenset({"where"})

    text: str = Field("{{ prompt.answer }}", description="Template of the answer's text: inline Jinja or a .j2 file.")
    where: str | None = Field(
        None, description="Only of prompts for which this expression holds, such as `prompt.level < 4` or `count(*) = 0`."
    )
    as_: str = Field("gold", alias="as", description="Name of the stream.")

    def templates(self) -> list[str]:
        return [self.text]

    def adds(self, seen: Outlook) -> None:
        if self.as_ not in seen.streams:
            seen.as_prompted.add(self.as_)
        seen.add_streams([self.as_], 1)

    def cost(self, forecast: Forecast) -> Cost:
        forecast.streams[self.as_] = forecast.prompts
        return Cost(self.name)

    def _chosen(self, pool: Pool, context: Context) -> pl.DataFrame:
        if not self.where:
            return views.live_prompts(pool)
        seen = views.prompt_view(pool, self.where)
        held = seen.filter(context.expression("where", self.where, seen, "condition"))
        return views.live_prompts(pool).join(held.select("id"), on="id", how="semi", maintain_order="left")

    def run(self, pool: Pool, context: Context) -> Addition:
        render = context.template("text", self.text)
        prompts = views.with_heavy(self._chosen(pool, context), pool, ["messages", "meta"], "prompts")
        rows = []
        for prompt in prompts.filter(pl.col("answer").is_not_null()).iter_rows(named=True):
            text = render(prompt, [{"role": "user", "content": ""}], of=None)[-1]["content"].strip()
            key = (context.index, self.name, prompt["id"])
            rows.append(
                {
                    "id": digest.of("gold", *key)[:16],
                    "prompt": prompt["id"],
                    "stream": self.as_,
                    "number": 0,
                    "parents": [],
                    "model": "gold",
                    "finish_reason": "stop",
                    "chars": len(text),
                    "tiebreak": digest.uniform(context.seed("tie"), *key),
                    "teacher_messages": prompt["messages"],
                    "text": text,
                }
            )
        return Addition({"samples": [shape("samples", rows)]})
