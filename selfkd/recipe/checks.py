"""Does a recipe make sense as a whole? Columns, streams, rows, models, metrics and splits, each against what exists at that point.

Pure: judges words against words, and opens no file. Every finding names the line it is about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from selfkd.core import views
from selfkd.core.files import reference_parts
from selfkd.core.wording import did_you_mean
from selfkd.errors import RecipeError
from selfkd.prompts.read import source_problems
from selfkd.recipe.lines import Entry
from selfkd.recipe.schema import Recipe
from selfkd.recipe.yamlfile import Node, Problems, plain
from selfkd.steps import Build, Gold, Measure, Recall, Sample, Score, Select, Step, Train

WHENS = ("now", "start", "base", "warm", "best")

SPLITS = ("train", "dev", "test")


@dataclass
class Seen:
    """What earlier steps of the round have made."""

    scores: list[str] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)
    rows: dict[tuple[str, str], str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)


def sources(fields: Mapping[str, Node], problems: Problems) -> None:
    given = fields["prompts"].value if "prompts" in fields and isinstance(fields["prompts"].value, dict) else {}
    for split in SPLITS:
        if split in given and isinstance(given[split].value, dict | list | str):
            for problem in source_problems(plain(given[split]), split):
                problems.add(_named(given[split], problem), "", problem)


def _named(node: Node, problem: str) -> str:
    """Where the field stands that a problem quotes."""
    quoted = re.findall(r"'(\w+)'", problem)
    return next((node.value[word].where for word in quoted if isinstance(node.value, dict) and word in node.value), node.where)


# ---- the whole ----


def meaning(recipe: Recipe, entries: Mapping[str, Sequence[Entry]], fields: Mapping[str, Node], problems: Problems) -> None:
    """Every finding about a recipe whose words are all valid."""
    models = _Models(recipe)
    seen = walk(recipe, "before", entries, Seen(), models, problems)
    _copies(entries, problems)
    seen = walk(recipe, "steps", entries, Seen(), models, problems)
    metrics = list(seen.metrics)
    walk(recipe, "after", entries, seen, models, problems)
    _steering(recipe, metrics, fields, problems)


def walk(
    recipe: Recipe, part: str, entries: Mapping[str, Sequence[Entry]], seen: Seen, models: _Models, problems: Problems
) -> Seen:
    seen.metrics = {}
    for entry, line in zip(entries[part], getattr(recipe, part), strict=True):
        step = line.at(1)
        _inputs(step, entry, seen, problems)
        _expressions(step, entry, seen, problems)
        models.check(step, entry, problems)
        if isinstance(step, Train):
            _rows(step, entry, seen, problems)
        if isinstance(step, Measure):
            _measure(step, entry, recipe, seen, problems)
        if isinstance(step, Sample | Measure) and step.max_tokens >= recipe.context:
            room = f"no room for a prompt: context is {recipe.context} tokens, prompt and answer together"
            problems.add(entry.at("max_tokens"), entry.label, f"max_tokens {step.max_tokens} leaves {room}")
        after(step, seen, recipe)
    return seen


def after(step: Step, seen: Seen, recipe: Recipe) -> None:
    """Note what `step` adds for the steps behind it."""
    if isinstance(step, Recall):
        earlier = [line.at(1) for line in recipe.steps]
        _grow(seen.scores, [name for other in earlier for name in other.scores()])
        _grow(seen.streams, [step.as_] if step.as_ else streams(earlier))
    _grow(seen.scores, step.scores())
    _grow(seen.streams, streams([step]))
    if isinstance(step, Build):
        seen.rows[step.as_, step.role] = step.kind


def _grow(known: list[str], more: Sequence[str]) -> None:
    known += [name for name in dict.fromkeys(more) if name not in known]


def streams(steps: Sequence[Step]) -> list[str]:
    return [step.as_ for step in steps if isinstance(step, Sample | Gold)]


def metrics_of(step: Measure) -> list[str]:
    rewards = [reference_parts(reference)[1] for reference in step.functions()]
    found = [*rewards, *(f"{name}_interval" for name in rewards), "prompts", "samples", "tokens", "chars", "cut"]
    return [f"{step.split}/{name}" for name in found]


# ---- one step against what came before it ----


def _inputs(step: Step, entry: Entry, seen: Seen, problems: Problems) -> None:
    """Streams must exist, and so must samples where a verb works on them."""
    of = getattr(step, "of", None)
    named = of if isinstance(step, Sample | Score | Build) or (isinstance(step, Select) and of != "prompts") else None
    if named and named not in seen.streams:
        known = ", ".join(seen.streams) or "none yet"
        problems.add(
            entry.at("of"), entry.label, f"no stream '{named}' here.{did_you_mean(named, seen.streams)} Streams: {known}"
        )
    elif not seen.streams and (isinstance(step, Score | Build) or (isinstance(step, Select) and of != "prompts")):
        problems.add(entry.where, entry.label, "there are no samples yet: a sample, gold or recall step comes first")
    for side in ("chosen", "rejected") if isinstance(step, Build) else ():
        text = getattr(step, side)
        known_words = [*seen.streams, *views.columns_after(seen.scores)["samples"]]
        if text and text.isidentifier() and text not in known_words:
            problems.add(
                entry.at(side),
                entry.label,
                f"'{side}' names neither a stream nor a column: '{text}'.{did_you_mean(text, known_words)}",
            )


def _expressions(step: Step, entry: Entry, seen: Seen, problems: Problems) -> None:
    columns = views.columns_after(seen.scores)
    for name, text, table in step.expressions():
        try:
            views.expression(text, columns[table])
        except RecipeError as error:
            hint = "" if "Did you mean" in error.what or not error.fix else f" {error.fix}"
            problems.add(entry.at(name), entry.label, f"'{name}': {error.what}{hint}")


def _rows(step: Train, entry: Entry, seen: Seen, problems: Problems) -> None:
    """A train step needs rows of its stream and kind; plain SFT makes its own from samples if nothing was built."""
    wanted = "pair" if step.loss == "dpo" else "sft"
    made = seen.rows.get((step.of, step.role))
    if made is None and wanted == "sft" and not seen.rows:
        if not seen.streams:
            problems.add(
                entry.where, entry.label, "there is nothing to train on yet: a sample, gold or recall step comes first"
            )
    elif made is None:
        known = ", ".join(f"'{stream}' for {role}" for stream, role in seen.rows) or "none"
        need = f"loss {step.loss} needs rows of kind {wanted} in stream '{step.of}' for {step.role}"
        problems.add(
            entry.where, entry.label, f"{need}: put `build: {{kind: {wanted}, ...}}` before it (rows built so far: {known})"
        )
    elif made != wanted:
        problems.add(
            entry.at("loss"), entry.label, f"loss {step.loss} needs rows of kind {wanted}; '{step.of}' holds {made} rows"
        )


def _measure(step: Measure, entry: Entry, recipe: Recipe, seen: Seen, problems: Problems) -> None:
    if step.split == "test":
        problems.add(
            entry.at("split"),
            entry.label,
            "leave the test split alone: it is measured by itself at round 0 and after the last round",
        )
    elif step.split not in recipe.splits():
        known = ", ".join(recipe.splits())
        what = f"there are no prompts for the split '{step.split}'{did_you_mean(step.split, recipe.splits()) or '.'}"
        problems.add(entry.at("split"), entry.label, f"{what} Splits: {known}; add prompts.{step.split}")
    for metric in metrics_of(step)[: len(step.functions())]:
        if metric in seen.metrics:
            problems.add(
                entry.where, entry.label, f"{seen.metrics[metric]} measures {metric} already: use another reward or split"
            )
    seen.metrics |= dict.fromkeys(metrics_of(step), entry.name)


class _Models:
    """The models that a recipe can name: role@when."""

    def __init__(self, recipe: Recipe) -> None:
        lines = [*recipe.before, *recipe.steps, *recipe.after]
        trained = [step.role for line in lines if isinstance(step := line.at(1), Train)]
        self.roles = list(dict.fromkeys(["policy", *trained]))
        self.recipe = recipe

    def check(self, step: Step, entry: Entry, problems: Problems) -> None:
        for name in ("model", "logprob", "from", "reference"):
            reference = getattr(step, "from_" if name == "from" else name, None)
            if isinstance(reference, str):
                own = step.role if isinstance(step, Train) and "@" not in reference else ""
                wrong = self.wrong(f"{own}@{reference}" if own else reference)
                if wrong:
                    problems.add(entry.at(name), entry.label, f"'{name}': {wrong}")

    def wrong(self, reference: str) -> str:
        role, at, when = reference.partition("@")
        if role not in self.roles:
            also = f" Did you mean 'policy@{role}'?" if role in WHENS else did_you_mean(role, self.roles)
            return f"no model '{reference}'.{also} Roles: {', '.join(self.roles)}"
        if not at or when in WHENS:
            lacks = when == "best" and self.recipe.best is None
            return "which round is best? Write best: {metric: dev/..., mode: max} in the recipe" if lacks else ""
        number = re.fullmatch(r"round-(\d+)", when)
        if number is None:
            return f"no model '{reference}'.{did_you_mean(when, WHENS)} After '@' comes {', '.join(WHENS)} or round-K"
        return (
            ""
            if int(number[1]) < self.recipe.rounds
            else f"'{when}' is never there to use: the last round is {self.recipe.rounds}"
        )


def _copies(entries: Mapping[str, Sequence[Entry]], problems: Problems) -> None:
    """The copies of a measure step take names of their own; nobody else may have them."""
    taken = {entry.name: entry for part in entries.values() for entry in part}
    for entry in taken.values():
        for copy in (f"{entry.name}-test", f"{entry.name}-warm") if entry.verb == "measure" else ():
            if copy in taken:
                problems.add(
                    taken[copy].at("name"), taken[copy].label, f"the name '{copy}' is that of a copy of '{entry.name}'"
                )


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
        _keep_if(recipe, recipe.keep_if, metrics, own["keep_if"].where, problems)


def _metric(metric: str, metrics: Sequence[str]) -> str:
    if metric.startswith("test/"):
        return f"'{metric}' cannot steer: a split that steers is no test any more. Use dev"
    known = ", ".join(metric for metric in metrics if not metric.endswith("_interval")) or "none: add a measure step"
    return (
        "" if metric in metrics else f"'{metric}' is not measured every round.{did_you_mean(metric, metrics)} Metrics: {known}"
    )


def _keep_if(recipe: Recipe, text: str, metrics: Sequence[str], where: str, problems: Problems) -> None:
    words = [metric.replace("/", "_") for metric in metrics]
    words += [f"{before}_{word}" for before in ("prev", "best") for word in words]
    tested = re.findall(r"\b(?:prev_|best_)?test_\w+", text)
    if tested:
        problems.add(where, "keep_if", f"'{tested[0]}' cannot steer: a split that steers is no test any more. Use dev")
        return
    try:
        views.expression(text, words)
    except RecipeError as error:
        problems.add(where, "keep_if", error.what + ("" if "Did you mean" in error.what or not error.fix else f" {error.fix}"))
