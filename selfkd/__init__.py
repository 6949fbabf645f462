"""selfkd runs self-distillation chains: a model answers, is scored, and learns from what was kept, round after round.

    recipe = selfkd.load("mine.yaml", ["rounds=2"])
    print(selfkd.lint(recipe).text())
    run = selfkd.run(recipe, "runs/mine")
    run.metrics(), run.samples(round=1, where="correct = 0"), run.model("policy@best").path

Names are loaded when they are first asked for: worker processes and the sandbox's warden start through this file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfkd.backend.machine import Machine as Machine
    from selfkd.recipe.lint import lint as lint
    from selfkd.recipe.load import load as load
    from selfkd.recipe.schema import Recipe as Recipe
    from selfkd.report.notebook import Run as Run
    from selfkd.report.notebook import open_run as open
    from selfkd.report.notebook import run as run
    from selfkd.report.verify import verify as verify

__version__ = "0.1.0"
HOMES = {
    "Machine": ("backend.machine", "Machine"),
    "Recipe": ("recipe.schema", "Recipe"),
    "Run": ("report.notebook", "Run"),
    "lint": ("recipe.lint", "lint"),
    "load": ("recipe.load", "load"),
    "open": ("report.notebook", "open_run"),
    "run": ("report.notebook", "run"),
    "verify": ("report.verify", "verify"),
}
__all__ = ["Machine", "Recipe", "Run", "lint", "load", "open", "run", "verify"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = HOMES[name]
    return getattr(import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
