"""average: a checkpoint that is the weighted average of others, such as an exponential moving average over rounds. Trains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Addition, Pool
from selfkd.errors import GuardError
from selfkd.steps.context import Context
from selfkd.steps.forecast import Cost, Forecast
from selfkd.steps.outlook import Outlook
from selfkd.steps.step import Problem, Step


class AverageStep(Step):
    """Make a new checkpoint of `role` as the weighted average of committed ones, computed in float64 and rounded once to fp32.

    `{start: 0.9, now: 0.1}` after a train step is a moving average over rounds; `{now: 0.5, base: 0.5}` goes half of the way back.
    """

    verb: ClassVar[str] = "average"
    short: ClassVar[str | None] = "of"

    of: dict[str, float] = Field(
        description="{model: share} of two models at least, each a time of `role` or role@when, as in `train: {from: …}`; shares are divided by their sum. A negative share goes away from a model.",
    )
    role: str = Field("policy", description="Which model it makes.")

    def models(self) -> dict[str, ModelRef]:
        return {f"of.{text}": ModelRef.parse(text, self.role) for text in self.of}

    def trained_role(self) -> str | None:
        return self.role

    def problems(self) -> Iterator[Problem]:
        if len(self.of) < 2:
            yield "of", "an average is of two models at least, such as {start: 0.9, now: 0.1}"
        elif sum(self.of.values()) <= 0:
            yield "of", f"the shares add up to {sum(self.of.values()):g}, and an average divides by that: it must be above 0"
        if 0 in self.of.values():
            yield "of", "a share of 0 says nothing: leave that model out"

    def needs(self, seen: Outlook) -> Iterator[Problem]:
        for role in sorted({model.role for model in self.models().values()} & seen.adapted):
            said = f"'{role}' is trained as an adapter, and adapters have no average that is one"
            yield "of", f"{said}: train it without lora"

    def cost(self, forecast: Forecast) -> Cost:
        return Cost(self.name, f"an average of {len(self.of)} checkpoints")

    def run(self, pool: Pool, context: Context) -> Addition:
        named = [
            (name, context.model(reference), self.of[name.removeprefix("of.")]) for name, reference in self.models().items()
        ]
        for name, model, _ in named:
            if model.kind != "full":
                fix = "Train it without lora."
                raise GuardError(
                    f"'{name.removeprefix('of.')}' is an adapter, and adapters have no average that is one", context.where, fix
                )
        folder = context.average([(model, share) for _, model, share in named])
        made_of: list[dict[str, Any]] = [
            {"model": name.removeprefix("of."), "path": model.path, "digest": model.digest, "share": share}
            for name, model, share in named
        ]
        return Addition(models={self.role: folder}, notes={"average": made_of})
