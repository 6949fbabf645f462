"""Does a recipe make sense as a whole? Columns, streams, rows, models, metrics and splits, each against what exists at that point.

Judges fields against fields and opens no file. What a verb needs and adds it says itself (steps.step.Step); here is only the order
of things. Every finding names the line it is about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from selfkd.core import views
from selfkd.core.wording import did_you_mean
from selfkd.errors import RecipeError
from selfkd.prompts.read import source_problems
from selfkd.recipe.lines import Entry
from selfkd.recipe.schema import Recipe
from selfkd.recipe.yamlfile import Node, Problems, plain
from selfkd.steps import Step
from selfkd.steps.outlook import Outlook

SPLITS = ("train", "dev", "test")
Entries = Mapping[str, Sequence[Entry]]


# ---- prompt sources, before anything is typed ----


def sources(fields: Mapping[str, Node], problems: Problems) -> None:
    given = fields["prompts"].value if "prompts" in fields and isinstance(fields["prompts"].value, dict) else {}
    for split in SPLITS:
        if split in given and isinstance(given[split].value, dict | list | str):
            for problem in source_problems(plain(given[split]), split):
                problems.add(_place_of(given[split], problem), "", problem)


def _place_of(node: Node, problem: str) -> str:
    """Return where the field stands that a problem quotes."""
    quoted = re.findall(r"'(\w+)'", problem)
    return next((node.value[word].where for word in quoted if isinstance(node.value, dict) and word in node.value), node.where)


# ---- the whole ----


def meaning(recipe: Recipe, entries: Entries, fields: Mapping[str, Node], problems: Problems) -> None:
    """Add every finding about a recipe whose fields are all valid."""
    roles = _roles(recipe)
    seen = outlook(recipe)
    for part in ("before", "steps", "after"):
        if part == "steps":
            seen = outlook(recipe)  # round 0 ends where `before` ends
        seen.metrics = {}
        for entry, line in zip(entries[part], getattr(recipe, part), strict=True):
            step = line.at(1)
            _step(step, entry, seen, problems)
            _models(step, entry, recipe, roles, problems)
            step.adds(seen)
        if part == "steps":
            _steering(recipe, list(seen.metrics), fields, problems)
    _copies(entries, problems)


def outlook(recipe: Recipe) -> Outlook:
    """Return what is there when a round begins; an earlier round's steps say what may be replayed."""
    whole_round = Outlook()
    for line in recipe.steps:
        line.at(1).adds(whole_round)
    return Outlook(splits=tuple(recipe.splits()), context=recipe.context, replayable=whole_round)


def _roles(recipe: Recipe) -> list[str]:
    trained = [line.at(1).trained_role() for line in (*recipe.before, *recipe.steps, *recipe.after)]
    return list(dict.fromkeys(["policy", *(role for role in trained if role)]))


# ---- one step against what came before it ----


def _step(step: Step, entry: Entry, seen: Outlook, problems: Problems) -> None:
    for field, problem in step.needs(seen):
        problems.add(entry.at(field), entry.label, problem)
    columns = views.columns_after(seen.scores)
    for field, text, table in step.expressions():
        try:
            views.expression(text, columns[table])
        except RecipeError as error:
            problems.add(entry.at(field), entry.label, f"'{field}': {_in_one_line(error)}")


def _in_one_line(error: RecipeError) -> str:
    """Return the finding, with the list of columns where no spelling is likely."""
    return error.what if "Did you mean" in error.what or not error.fix else f"{error.what} {error.fix}"


def _models(step: Step, entry: Entry, recipe: Recipe, roles: list[str], problems: Problems) -> None:
    for field, reference in step.models().items():
        problem = reference.problem(roles, recipe.rounds, best_is_named=recipe.best is not None)
        if problem:
            problems.add(entry.at(field), entry.label, f"'{field}': {problem}")


def _copies(entries: Entries, problems: Problems) -> None:
    """The copies of a measure step take names of their own; nobody else may have them."""
    taken = {entry.name: entry for part in entries.values() for entry in part}
    for entry in taken.values():
        for copy in (f"{entry.name}-test", f"{entry.name}-warm") if entry.step.outside else ():
            if copy in taken:
                text = f"the name '{copy}' is that of a copy of '{entry.name}'"
                problems.add(taken[copy].at("name"), taken[copy].label, text)


# ---- what steers ----


def _steering(recipe: Recipe, metrics: list[str], fields: Mapping[str, Node], problems: Problems) -> None:
    """best, stop and keep_if see what is measured every round, and never the test split."""
    watched = {"best": recipe.best.metric if recipe.best else None, "stop": recipe.stop.metric if recipe.stop else None}
    own = {name: fields[name] for name in ("best", "stop", "keep_if") if name in fields}
    for name, metric in watched.items():
        node = own[name].value.get("metric") if name in own and isinstance(own[name].value, dict) else None
        if metric and node is not None and (wrong := _metric(metric, metrics)):
            problems.add(node.where, name, f"'metric' {wrong}")
    if recipe.stop and recipe.stop.patience and not recipe.stop.metric:
        problems.add(own["stop"].where, "stop", "patience needs a metric: name one, or write `best`")
    if recipe.keep_if:
        _keep_if(recipe.keep_if, metrics, own["keep_if"].where, problems)


def _metric(metric: str, metrics: Sequence[str]) -> str:
    if metric.startswith("test/"):
        return f"'{metric}' cannot steer: a split that steers is not a test any more. Use dev"
    known = ", ".join(metric for metric in metrics if not metric.endswith("_scored")) or "none: add a measure step"
    return (
        "" if metric in metrics else f"'{metric}' is not measured every round.{did_you_mean(metric, metrics)} Metrics: {known}"
    )


def _keep_if(text: str, metrics: Iterable[str], where: str, problems: Problems) -> None:
    words = [metric.replace("/", "_") for metric in metrics]
    words += [f"{before}_{word}" for before in ("prev", "best") for word in words]
    tested = re.findall(r"\b(?:prev_|best_)?test_\w+", text)
    if tested:
        problems.add(where, "keep_if", f"'{tested[0]}' cannot steer: a split that steers is not a test any more. Use dev")
        return
    try:
        views.expression(text, words)
    except RecipeError as error:
        problems.add(where, "keep_if", _in_one_line(error))
