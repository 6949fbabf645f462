"""Which method a recipe is, apart from its model, its data and its sizes: two recipes of one method learn by the same rule.

Nothing here runs anything. What is left out on purpose: how many answers, templates' words, filters on form, temperatures, learning rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from selfkd.core.pool import Function
from selfkd.errors import SelfkdError
from selfkd.recipe.lines import LISTS
from selfkd.recipe.schema import Recipe
from selfkd.rewards.contract import PLURAL
from selfkd.rewards.find import definition, find_function, parameters
from selfkd.steps import Step
from selfkd.steps.replay import ReplayStep
from selfkd.steps.train import TrainStep

GOLD = {"answer", "answers"}


@dataclass(frozen=True)
class Method:
    """Who answers and is told what, who says what is good, what is trained from what against what, and on which rounds' rows."""

    asked: tuple[str, ...]
    judged: frozenset[str]
    updates: tuple[tuple[str, ...], ...]
    replayed: tuple[int | None, ...]


def method(recipe: Recipe) -> Method:
    """Return the method of a recipe, by its steps of the second round, in which every time that a model can be named is there."""
    steps = [step for part in LISTS for line in getattr(recipe, part) if not (step := line.at(2)).outside]
    return Method(
        tuple(_asked(steps)),
        frozenset(said for step in steps for said in _judged(step, lambda name: find_function(name, recipe.folders))),
        tuple(_updates([step for step in steps if isinstance(step, TrainStep)], recipe)),
        tuple(step.rounds for step in steps if isinstance(step, ReplayStep)),
    )


def _asked(steps: list[Step]) -> Iterator[str]:
    """Yield who makes the samples, the gold answers included, and whether they are asked about the samples of others."""
    for step in steps:
        if step.verb in ("sample", "gold", "bring"):
            yield " ".join(
                [step.verb, *map(str, step.models().values()), *(["about samples"] if getattr(step, "of", None) else [])]
            )


def _judged(step: Step, find: Callable[[str], Function]) -> Iterator[str]:
    """Yield who gives a step's scores: a gold answer, a vote among answers, or a model."""
    if step.scores() and (step.models() or step.scorers()):
        yield "model"
    for name in step.functions() if step.verb == "score" else ():
        with suppress(SelfkdError):
            node = definition(find(name))
            named = set(parameters(node)) if node else set()
            yield from ["gold"] if named & GOLD else ["vote"] if named & set(PLURAL) else []


def _updates(steps: list[TrainStep], recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Yield the loss, and the models from which, against which and of which it learns; what enters the only round is the base."""
    enters = "base" if recipe.rounds == 1 and not recipe.before else "start"
    for number, step in enumerate(steps):
        same = {"start": enters, **({"now": enters} if number == 0 else {})}
        models = [f"{field} {model.role}@{same.get(model.when, model.when)}" for field, model in step.models().items()]
        yield "".join(step.losses()) or step.loss, *models
