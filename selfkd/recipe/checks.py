"""Does a recipe make sense as a whole? Columns, streams, rows, models, metrics and splits, each against what exists at that point.

Judges fields against fields and opens no file. What a verb needs and adds it says itself (steps.step.Step); here is only the order
of things. Every finding names the line it is about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import polars as pl

from selfkd.core import views
from selfkd.core.pool import Pool
from selfkd.core.wording import did_you_mean
from selfkd.core.yamlfile import Node, Problems, plain
from selfkd.errors import RecipeError
from selfkd.prompts.read import source_problems
from selfkd.prompts.template_fields import Columns
from selfkd.recipe.anchors import look_at_anchors
from selfkd.recipe.chat import owned_words
from selfkd.recipe.gold import look_at_gold
from selfkd.recipe.lines import LISTS
from selfkd.recipe.schema import Recipe, Take
from selfkd.recipe.walk import Prompts, Shown, in_one_line, number, outlook, walk
from selfkd.rewards.find import find_function
from selfkd.steps import VERBS, Step
from selfkd.steps.check import measures
from selfkd.steps.measure import CHANGES, COUNTS

SPLITS = ("train", "dev", "test")


# ---- prompt sources, before anything is typed ----


def sources(fields: Mapping[str, Node], problems: Problems) -> None:
    given = fields["prompts"].value if "prompts" in fields and isinstance(fields["prompts"].value, dict) else {}
    suites = given["held"].value if "held" in given and isinstance(given["held"].value, dict) else {}
    named = {split: given[split] for split in SPLITS if split in given} | suites
    for split, node in named.items():
        if isinstance(node.value, dict | list | str):
            for problem in source_problems(plain(node), split):
                problems.add(_place_of(node, problem), "", problem)


def _place_of(node: Node, problem: str) -> str:
    """Return where the field stands that a problem quotes."""
    quoted = re.findall(r"'(\w+)'", problem)
    return next((node.value[word].where for word in quoted if isinstance(node.value, dict) and word in node.value), node.where)


# ---- the whole ----


def meaning(recipe: Recipe, problems: Problems, prompts: Prompts | None = None) -> Shown:
    """Add every finding about a recipe whose fields are all valid; return the columns after each step.

    Opens no file unless it is given the columns of the `prompts`: then rewards and templates are looked at too.
    """
    shown, metrics = walk(recipe, problems, prompts)
    _take(recipe, prompts, problems)
    _steering(recipe, metrics, problems)
    _inside_updates(recipe, metrics, problems)
    _copies(recipe, problems)
    _no_gold(recipe, problems)
    owned_words(recipe, problems)
    if prompts is not None:
        look_at_gold(recipe, prompts, problems)
    look_at_anchors(recipe, problems, None if prompts is None else lambda reference: find_function(reference, recipe.folders))
    return shown


def refuse(recipe: Recipe, prompts: Mapping[str, pl.DataFrame]) -> None:
    """Raise RecipeError with everything that a round over these prompts would trip over, rewards and templates looked at."""
    problems = Problems()
    meaning(recipe, problems, {split: Columns.of(frame) for split, frame in prompts.items()})
    problems.stop()


def _copies(recipe: Recipe, problems: Problems) -> None:
    """The copies of a measure step take names of their own; nobody else may have them."""
    taken = {line.name: line for part in LISTS for line in getattr(recipe, part)}
    for line in taken.values():
        for copy in (f"{line.name}-test", f"{line.name}-warm") if VERBS[line.verb].outside else ():
            if copy in taken:
                text = f"the name '{copy}' is that of a copy of '{line.name}'"
                problems.add(taken[copy].place("name"), taken[copy].label, text)


def _no_gold(recipe: Recipe, problems: Problems) -> None:
    """A transductive recipe reads its train prompts without gold answers, so there are none to bring in."""
    for line in (line for part in LISTS for line in getattr(recipe, part) if recipe.transductive and line.verb == "gold"):
        problems.add(
            line.where, line.label, "the train prompts of a transductive recipe have no gold answers: leave this step out"
        )


def _take(recipe: Recipe, prompts: Prompts | None, problems: Problems) -> None:
    """What chooses the prompts of a round is a number over the scores of a whole round."""
    take = recipe.prompts.take
    if not isinstance(take, Take):
        return
    place = recipe.places.get("prompts.take", "")
    if not take.by and (take.rounds or take.pick == "weighted"):
        problems.add(place, "prompts.take", "'pick' and 'rounds' say how `by` chooses, and there is no `by`")
    made, known = outlook(recipe).replayable, prompts["train"].kinds if prompts and "train" in prompts else None
    pool = Pool(scores_named=tuple(made.scores) if made else (), prompt_columns=known)
    try:
        number(take.by, pool) if take.by else None
    except RecipeError as error:
        problems.add(place, "prompts.take", f"'by': {in_one_line(error)}")


# ---- what steers ----


def _steering(recipe: Recipe, metrics: list[str], problems: Problems) -> None:
    """best, stop and keep_if see what is measured every round, and never the test split."""
    watched = {"best": recipe.best.metric if recipe.best else None, "stop": recipe.stop.metric if recipe.stop else None}
    for name, metric in watched.items():
        place = recipe.places.get(f"{name}.metric")
        if metric and place and (wrong := _metric(metric, metrics)):
            problems.add(place, name, f"'metric' {wrong}")
    if recipe.stop and recipe.stop.patience and not recipe.stop.metric:
        problems.add(recipe.places.get("stop", ""), "stop", "patience needs a metric: name one, or write `best`")
    if recipe.keep_if:
        _keep_if(recipe.keep_if, metrics, list(_changing(recipe)), recipe.places.get("keep_if", ""), problems)


def _changing(recipe: Recipe) -> Iterator[str]:
    """Yield the metrics whose change against the base is known in each round: the scores that are measured, no counts."""
    for step in recipe.measures(1):
        yield from (
            metric for metric in step.metrics() if metric.partition("/")[2] not in COUNTS and not metric.endswith("_scored")
        )


def _inside_updates(recipe: Recipe, metrics: Sequence[str], problems: Problems) -> None:
    """What an update is checked by is measured every round, of the model that it trains, on prompts that nothing is trained on."""
    for line in (one for part in LISTS for one in getattr(recipe, part) if one.verb == "train"):
        step = line.at(1)
        if (check := getattr(step, "check", None)) and (wrong := _of_check(recipe, check.metric, step, metrics)):
            problems.add(line.place("check"), line.label, f"'check.metric' {wrong}")


def _of_check(recipe: Recipe, metric: str, step: Step, metrics: Sequence[str]) -> str:
    if wrong := _metric(metric, metrics):
        return wrong
    if metric.startswith("train/"):
        return f"'{metric}' is of prompts that are trained on: measure dev"
    role, found = step.trained_role() or "", [one for one in recipe.measures(1) if metric in one.metrics()]
    others = ", ".join(str(one.models()["model"]) for one in found)
    return (
        "" if any(measures(one, role) for one in found) else f"'{metric}' is measured of {others}, and this step trains {role}"
    )


def _metric(metric: str, metrics: Sequence[str]) -> str:
    if metric.startswith("test/"):
        return f"'{metric}' cannot steer: a split that steers is not a test any more. Use dev"
    known = ", ".join(metric for metric in metrics if not metric.endswith("_scored")) or "none: add a measure step"
    return (
        "" if metric in metrics else f"'{metric}' is not measured every round.{did_you_mean(metric, metrics)} Metrics: {known}"
    )


def _keep_if(text: str, metrics: Iterable[str], changing: Iterable[str], where: str, problems: Problems) -> None:
    words = [metric.replace("/", "_") for metric in metrics]
    words += [f"{before}_{word}" for before in ("prev", "best") for word in words]
    words += [f"{metric.replace('/', '_')}_{part}" for metric in changing for part in CHANGES]
    tested = re.findall(r"\b(?:prev_|best_)?test_\w+", text)
    if tested:
        problems.add(where, "keep_if", f"'{tested[0]}' cannot steer: a split that steers is not a test any more. Use dev")
        return
    try:
        views.expression(text, pl.DataFrame(schema=dict.fromkeys(words, pl.Float64)), "condition")
    except RecipeError as error:
        problems.add(where, "keep_if", in_one_line(error))
