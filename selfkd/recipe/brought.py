"""What lint says of the answers that `bring` steps would bring: read as a run would read them, and nothing kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import polars as pl

from selfkd.core.wording import counted
from selfkd.errors import SelfkdError
from selfkd.prompts.brought import passages_shared, read_answers
from selfkd.prompts.read import on_hub, source_words
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.schema import Recipe
from selfkd.steps.bring import BringStep


def look(recipe: Recipe, prompts: Mapping[str, pl.DataFrame], hub: bool) -> tuple[list[str], list[str]]:
    """Return (problems, notes) of what is to be brought; without the train prompts nothing can be matched, and nothing is read."""
    problems: list[str] = []
    notes: list[str] = []
    for line, step in _lines(recipe):
        at = f"{line.place('from')}  {line.label}"
        if (on_hub(source_words(step.from_)) and not hub) or "train" not in prompts:
            notes.append(f"{step.name}: what it brings, or the prompts, lie on a hub, so no answer was read")
            continue
        try:
            found = answers_of(step, recipe, prompts)
        except SelfkdError as error:
            problems.append(f"{at}: {error}")
            continue
        dropped = dict(found["drop"].drop_nulls().value_counts().iter_rows())
        reasons = "".join(f"; {count} dropped: {reason}" for reason, count in sorted(dropped.items()))
        notes.append(f"{step.name}: {found.height} answers, {int(found['ours'].sum())} to train prompts{reasons}")
        notes += _passages(recipe, step, found.filter(pl.col("drop").is_null()), prompts)
        if not found["drop"].null_count():
            problems.append(f"{at}: none of its answers may be used{reasons}")
    return problems, notes


def answers_of(step: BringStep, recipe: Recipe, prompts: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Return what a step has to bring, matched with the prompts: what a run freezes, lint tells and a plan counts."""
    return read_answers(step.from_, recipe.folders, step.scores(), prompts, step.id)


def _passages(recipe: Recipe, step: BringStep, found: pl.DataFrame, prompts: Mapping[str, pl.DataFrame]) -> Iterator[str]:
    """Yield how many answers share a passage with what is held out; generated tasks share their wording with every number in it."""
    for split, held in prompts.items():
        if split != "train" and not source_words(recipe.splits()[split]).get("reasoning_gym"):
            count = passages_shared(found, held)
            if count:
                yield f"{step.name}: {counted(count, 'answer')} {'shares' if count == 1 else 'share'} 13 words in a row with '{split}'"


def counts(recipe: Recipe, prompts: Mapping[str, pl.DataFrame]) -> dict[str, int | None]:
    """Return {step: how many answers it has to bring}; None where they, or the prompts, are not here."""
    found: dict[str, int | None] = {}
    for _, step in _lines(recipe):
        try:
            here = not on_hub(source_words(step.from_)) and "train" in prompts
            found[step.name] = answers_of(step, recipe, prompts).height if here else None
        except SelfkdError:
            found[step.name] = None
    return found


def _lines(recipe: Recipe) -> Iterator[tuple[Line, BringStep]]:
    for line in (line for part in LISTS for line in getattr(recipe, part)):
        step = line.at(1)
        if isinstance(step, BringStep):
            yield line, step
