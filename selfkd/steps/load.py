"""load: the root of a chain. Not a verb of recipes: every run begins with it, once, in round 0."""

from __future__ import annotations

from typing import Any, ClassVar

from selfkd.core.pool import Addition, Pool
from selfkd.steps.context import Context
from selfkd.steps.step import Step


class LoadStep(Step):
    """Bring the model in as fp32 masters, dithered once so that later small updates survive the engine's bf16 cast."""

    verb: ClassVar[str] = "load"
    role: str = "policy"
    source: dict[str, Any]
    dither: bool = True

    def run(self, pool: Pool, context: Context) -> Addition:
        seed = context.seed("dither") if self.dither else None
        folder, notes = context.load(self.source, seed)
        return Addition(models={self.role: folder}, notes=notes)

    def identity(self) -> dict[str, Any]:
        """Without the place the model came from: its weights digest, which the commit holds, says what it is."""
        return {"verb": self.verb, "name": self.name, "role": self.role, "dither": self.dither}
