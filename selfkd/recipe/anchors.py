"""Who says that a round is good? Lint's remarks on recipes in which the model that is trained also judges, with nothing beside it.

A score that comes from a model (a judge's mark, a log-probability) or from nothing but the answers themselves (a vote) rises when answers get
longer, when the judge gets easier to please, and when they all agree on the same mistake. Only what the model did not write can tell: a
measure step whose reward reads a gold answer, or another column of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from selfkd.core.pool import Function
from selfkd.core.yamlfile import Problems
from selfkd.errors import SelfkdError
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.schema import Recipe
from selfkd.rewards.contract import PLURAL, SINGULAR
from selfkd.rewards.find import Definition, definition, parameters
from selfkd.steps import Step

Find = Callable[[str], Function]
WRITTEN = {
    "prompt",
    "completion",
    "sample",
    "prompts",
    "completions",
    "samples",
    "completion_ids",
}  # a reward may see these of any recipe
AS_ALIVE = ("now", "start", "best")  # a model at these times is the one that is trained
UNSEEN = "longer answers, a judge that is easier to please, mistakes that all answers share, and what is forgotten elsewhere would look like progress"
WAY = "Add an anchor: `measure` with a reward that reads gold answers, on dev prompts that have them"


def look_at_anchors(recipe: Recipe, problems: Problems, find: Find | None) -> None:
    """Add what is wrong with who decides. `find` finds a reward's code; without it no file is opened, and anchors are not looked for."""
    lines = [line for part in LISTS for line in getattr(recipe, part)]
    _gates(recipe, lines, problems)
    trained = any(line.at(1).trained_role() for line in lines)
    if find is None or not trained or any(_held(line.at(1), find) for line in lines):
        return
    if opinion := next(_opinions(lines, find), None):
        line, said = opinion
        problems.doubt(line.place(""), line.label, f"{said}, and nothing is measured that it does not decide: {UNSEEN}. {WAY}")


# ---- what only a gold answer can tell ----


def _held(step: Step, find: Find) -> bool:
    """Whether a step holds answers against something that no model of the chain wrote; a function whose code cannot be read may."""
    return any(_reads_more(reference, step, find) for reference in step.functions() if reference not in step.losses())


def _reads_more(reference: str, step: Step, find: Find) -> bool:
    with suppress(SelfkdError):
        node = definition(find(reference))
        if node is None or node.args.kwarg:
            return True
        return bool(set(parameters(node)) - WRITTEN - set(getattr(step, "params", {})) - _with_default(node))
    return True  # it is not there, which is said elsewhere


def reads_gold(reference: str, params: Mapping[str, Any], find: Find) -> bool:
    """Whether a reward surely holds an answer against what stands beside its prompt: it names a column, or `answer`, that it must be given."""
    with suppress(SelfkdError):
        node = definition(find(reference))
        return node is not None and bool(set(parameters(node)) - WRITTEN - set(params) - _with_default(node))
    return False


def _with_default(node: Definition) -> set[str]:
    known = {*SINGULAR, *PLURAL}
    plain, given = [one.arg for one in node.args.args], len(node.args.defaults)
    keyword = [one.arg for one, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if default is not None]
    return {name for name in (*plain[len(plain) - given :], *keyword) if name not in known}


def _opinions(lines: list[Line], find: Find) -> Iterator[tuple[Line, str]]:
    """Yield the steps that score answers by what a model says of them, or by nothing but the answers, and how that is put."""
    for line in lines:
        step = line.at(1)
        if step.outside or not step.scores():
            continue
        if step.models():
            yield line, f"its scores are what {' and '.join(map(str, step.models().values()))} says of answers"
        elif step.functions() and any(_votes(reference, find) for reference in step.functions()):
            yield line, "its scores are votes among the answers"


def _votes(reference: str, find: Find) -> bool:
    node = definition(find(reference))
    return node is not None and any(name in PLURAL for name in parameters(node))


# ---- who chooses among rounds ----


def _gates(recipe: Recipe, lines: list[Line], problems: Problems) -> None:
    """A judge that is trained here must not choose the round that pleases it; that it can be read at all may be a condition."""
    judged = {metric: line for line in lines if _is_trained(line, lines) for metric in _metrics(line)}
    watched = {"best": recipe.best.metric if recipe.best else None, "stop": recipe.stop.metric if recipe.stop else None}
    for name, metric in watched.items():
        if metric in judged:
            text = f"'metric' {_by_itself(metric, judged[metric])}"
            problems.add(recipe.places.get(f"{name}.metric", recipe.places.get(name, "")), name, text)
    words = set(re.findall(r"\w+", recipe.keep_if or ""))
    for metric, line in judged.items():
        word = metric.replace("/", "_")
        if words & {word, f"prev_{word}", f"best_{word}"}:
            problems.doubt(recipe.places.get("keep_if", ""), "keep_if", f"'{word}' {_by_itself(metric, line)}")


def _by_itself(metric: str, line: Line) -> str:
    judge = line.at(1).models()["model"]
    return (
        f"is what '{line.name}' says of its own judgments, and its judge, {judge}, is trained here: rounds would be chosen by who pleases it. "
        f"Take a metric of a measure step, or let {judge.role}@base judge"
    )


def _metrics(line: Line) -> list[str]:
    step = line.at(1)
    return list(getattr(step, "metrics", list)()) if not step.outside and "model" in step.models() else []


def _is_trained(line: Line, lines: list[Line]) -> bool:
    roles = {role for one in lines if (role := one.at(1).trained_role())}
    return any(model.role in roles and model.when in AS_ALIVE for model in line.at(1).models().values())
