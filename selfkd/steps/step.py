"""What every verb shares: a step's config *is* the step. No torch, ray, vllm or trl, and no path of a run, below here."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from selfkd.core.pool import Addition, Pool
from selfkd.steps.context import Context


class Step(BaseModel):
    """One line of a recipe. `short` is the field that a bare value fills: `- score: reward/math.py:correct`."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
    verb: ClassVar[str]
    short: ClassVar[str | None] = None
    outside: ClassVar[bool] = False  # True: tables are stored with the step but stay out of the pool (measure)

    name: str = Field(
        "", description="Unique name of the step; enters seeds, commits and overrides. Default: the verb, then verb-2, …"
    )

    def run(self, pool: Pool, context: Context) -> Addition:
        """What this step adds to `pool`. Must be a pure function of the pool, its own words, and what `context` answers."""
        raise AssertionError(f"verb '{self.verb}' lacks a run method")

    def identity(self) -> dict[str, Any]:
        """The words that make this step this step, every default spelled out."""
        return {"verb": self.verb, **self.model_dump(mode="json", by_alias=True)}

    def functions(self) -> list[str]:
        """References `file.py:function` whose code belongs to the identity."""
        return []

    def templates(self) -> list[str]:
        """References of templates whose text belongs to the identity."""
        return []

    def expressions(self) -> list[tuple[str, str, str]]:
        """(field, text, table whose columns it may use: samples, prompts or pairs), for lint."""
        return []

    def scores(self) -> list[str]:
        """Names of the scores this step adds as columns, for lint."""
        return []
