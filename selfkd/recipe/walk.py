"""One walk of a recipe before anything starts: each step's own code, run over empty tables that have every column and type.

What a run would trip over after hours (an expression of the wrong kind, a model that is not there yet, a name given twice) is found
here by the code that would trip, for every step, and not only the first of each step's mistakes. Nothing is generated or scored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import Logprob, Sampling, Trained, TrainSpec
from selfkd.backend.reading import Read, Reading
from selfkd.core import of_prompts, views
from selfkd.core.files import reference_parts
from selfkd.core.known_models import KnownModels
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Function, Model, Part, Pool
from selfkd.core.views import Kind
from selfkd.core.wording import first_line
from selfkd.core.yamlfile import Problems
from selfkd.errors import ChainError, GuardError, RecipeError, SelfkdError
from selfkd.prompts import brought, templates
from selfkd.prompts.template_fields import Columns, field_problems, unshown
from selfkd.recipe import scorers
from selfkd.recipe.lines import Line
from selfkd.recipe.losses import check_loss
from selfkd.recipe.schema import Recipe
from selfkd.rewards.check import check_parameters
from selfkd.rewards.find import definition, find_function, required
from selfkd.rewards.tables import GIVEN
from selfkd.steps import VERBS, Step
from selfkd.steps.bring import BringStep
from selfkd.steps.check import Check
from selfkd.steps.context import Messages, Render, Row
from selfkd.steps.outlook import Outlook

Shown = list[tuple[str, dict[str, list[str]]]]  # (step, what it makes usable in expressions, by table)
Prompts = Mapping[str, Columns]  # the columns of the splits that were read


def walk(recipe: Recipe, problems: Problems, prompts: Prompts | None = None) -> tuple[Shown, list[str]]:
    """Add everything that a round would trip over; return the columns after each step, and the metrics of a round.

    `prompts` are the columns of the prompts that were read. Without them no file is opened: rewards and templates are not looked at.
    """
    known = prompts["train"].kinds if prompts and "train" in prompts else None
    own = [f"{of_prompts.PREFIX}{name}" for name in (*of_prompts.FIXED, *(known or ()))]
    shown = [
        ("always", {**{name: found for name, found in Outlook().columns().items() if name != "pairs"}, "of each prompt": own})
    ]
    find = cache(lambda reference: find_function(reference, recipe.folders))  # reads all the code that a reward needs
    base = _Round(recipe, problems, prompts, find, 0, [], {"policy": _stand_in("policy")}, outlook(recipe, known))
    for line in (*(line for line in recipe.steps if VERBS[line.verb].outside), *recipe.before):
        shown += base.step(line)
    usual = _Round(recipe, problems, prompts, find, 1, [base.now], dict(base.now), outlook(recipe, known))
    for line in recipe.steps:
        shown += usual.step(line)
    metrics = list(usual.seen.metrics)
    usual.seen.metrics = {}
    heads = [base.now, *([usual.now] * (recipe.rounds - 1))]
    last = _Round(recipe, problems, prompts, find, recipe.rounds, heads, dict(usual.now), usual.seen)
    for line in recipe.after:
        shown += last.step(line)
    return shown, metrics


def outlook(recipe: Recipe, columns: Mapping[str, pl.DataType] | None = None) -> Outlook:
    """Return what is there when a round begins; an earlier round's steps say what may be replayed.

    `columns` are those of the train prompts, None where nobody has read them.
    """
    whole_round, opening = Outlook(), Outlook()
    for lines, made in ((recipe.steps, whole_round), (recipe.before, opening)):
        for line in lines:
            line.at(1).adds(made)
    pool = Pool(prompt_columns=columns)
    return Outlook(tuple(recipe.splits()), recipe.context, recipe.take, pool, replayable=whole_round, opening=opening)


def roles(recipe: Recipe) -> list[str]:
    trained = [line.at(1).trained_role() for line in (*recipe.before, *recipe.steps, *recipe.after)]
    return list(dict.fromkeys(["policy", *(role for role in trained if role)]))


def in_one_line(error: SelfkdError) -> str:
    """Return the finding, with what to do where no spelling is likely."""
    return error.what if "Did you mean" in error.what or not error.fix else f"{error.what} {error.fix}"


def _stand_in(role: str) -> Model:
    return Model(role, "", role)


@dataclass
class _Round:
    """One round over empty tables. `heads` are the models that each earlier round left, `now` those at this point."""

    recipe: Recipe
    problems: Problems
    prompts: Prompts | None
    find: Callable[[str], Function]
    index: int
    heads: Sequence[dict[str, Model]]
    now: dict[str, Model]
    seen: Outlook
    unfound: list[str] = field(default_factory=list)  # names of scores whose reward is not there
    found: bool = False  # whether something is wrong with the step at hand

    def add(self, line: Line, name: str, problem: str) -> None:
        """Add a problem with a field of a step ('': with the step as a whole)."""
        self.problems.add(line.place(name), line.label, problem)
        self.found = True

    def step(self, line: Line) -> Shown:
        """Run one step and note what it leaves; return the columns that it adds, if it adds some."""
        step, before, self.found = line.at(self.index), self.seen.columns(), False
        self._needs(line)
        for index in self._rounds(line):
            self._models(line, line.at(index), index)
            self._run(line, line.at(index))
        step.adds(self.seen)
        if role := step.trained_role():
            self.now[role] = _stand_in(role)
        after = self.seen.columns()
        new = {table: [name for name in names if name not in before[table]] for table, names in after.items()}
        return [(f"after {line.name}", new)] if any(new.values()) else []

    def _rounds(self, line: Line) -> Sequence[int]:
        """A number, an expression or a model may differ from round to round, so each of its values is held against what is there."""
        return range(1, line.variants + 1) if self.index else (0,)

    def _run(self, line: Line, step: Step) -> None:
        try:
            step.run(replace(self.seen.pool, models=self.now), LintContext(self, line, step))
        except GuardError:
            pass  # too few rows to train on: there are none here
        except (SelfkdError, pl.exceptions.PolarsError) as error:
            if not self.found:  # else it follows from what was said
                self.add(line, "", in_one_line(error) if isinstance(error, SelfkdError) else first_line(error))

    def _needs(self, line: Line) -> None:
        for step in map(line.at, self._rounds(line)):
            for name, problem in step.needs(self.seen):
                self.add(line, name, problem)
            for name, doubt in step.doubts(self.seen):
                self.problems.doubt(line.place(name), line.label, doubt)

    def _models(self, line: Line, step: Step, index: int) -> None:
        """`index` is a round that has this step; what the rounds between it and this one leave has every role."""
        later = [{role: _stand_in(role) for role in roles(self.recipe)}] * max(0, index - max(self.index, 1))
        past = [*self.heads, *later]
        heads = [lambda models=models: models for models in past]
        known = KnownModels(max(self.index, index), past[-1] if past else {}, heads, 0, lambda: {"policy": _stand_in("policy")})
        for name, reference in step.models().items():
            problem = reference.problem(roles(self.recipe), self.recipe.rounds, best_is_named=self.recipe.best is not None)
            try:
                yet = self.index == 0 and name in step.may_lack()
                known.find(reference, self.now, "") if not problem and not yet else None
            except ChainError as error:
                problem = f"'{reference}' cannot be there in round {max(self.index, index)}: {error.what}"
            if problem:
                self.add(line, name, f"'{name}': {problem}")


@dataclass
class LintContext:
    """A step's view of a round over empty tables (`steps.context.Context`): it answers with nothing, and notes what does not fit."""

    round: _Round
    line: Line
    step: Step
    max_length: int = field(init=False)
    engine_casts: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.max_length = self.round.recipe.context

    @property
    def index(self) -> int:
        return self.round.index

    @property
    def where(self) -> str:
        return self.line.where

    def _add(self, name: str, problem: str) -> None:
        self.round.add(self.line, name, problem)

    # ---- what a recipe's words are held against ----

    def expression(self, field: str, text: str, table: pl.DataFrame, kind: Kind) -> pl.Expr:
        own = self.round.seen.pool.prompt_columns
        table = table if own is not None else _fitting(text, table, kind)
        try:
            parsed = views.expression(text, table, kind, own=own or ())
            _try_on_text(parsed, text, table)
            return parsed if own is not None or not of_prompts.columns_in(text) else _nothing(kind)
        except RecipeError as error:
            guessed = any(f"Did you mean '{name}'?" in error.what for name in self.round.unfound)
            if not guessed:  # else the reward is what is misspelt, which was said
                self._add(field, f"'{field}': {in_one_line(error)}")
            return _nothing(kind)

    def template(
        self, field: str, reference: str, of: Sequence[str] | None = None, shows: Mapping[str, str] | None = None
    ) -> Render:
        if self.round.prompts is not None:
            names = dict.fromkeys((*templates.NAMES, *(shows or {})))
            found = templates.problems(reference, self.round.recipe.folders, list(names))
            if not found:
                known = self.round.prompts.get(self.step.split_asked())
                template = templates.load(reference, self.round.recipe.folders)
                found = [*field_problems(template, known, of), *unshown(template, shows or {}, known.first if known else ())]
                if not found and of is None and known:
                    found = list(_always_fails(template, known.first, self.step.verb == "gold"))
            for problem in found:
                self._add(field, problem)
        return _unrendered

    def sample_fields(self, reference: str) -> Collection[str]:
        return ()

    def function(self, reference: str, params: Mapping[str, Any]) -> Function:
        nothing = Function(reference_parts(reference)[1], Path(), "", params)
        if self.round.prompts is None:
            return nothing
        try:
            function = replace(self.round.find(reference), params=params)
            known = self.round.prompts.get(self.step.split_asked())
            # of a function without a `def`, only a worker that loads it can tell the parameters: lint asks one afterwards
            found = check_parameters(function, None if known is None else known.counts) if definition(function) else []
        except SelfkdError as error:
            function, found = nothing, [str(error)]
            self.round.unfound += self.step.scores()
        for problem in found:
            self._add("reward", problem)
        return function

    def scorer(self, field: str, reference: str, reading: Reading) -> Model:
        if self.round.prompts is not None:
            inner, problem = scorers.problem(reference, reading, self.round.recipe)
            if problem:
                self._add(inner or field, f"'{inner or field}': {problem}")
        return _stand_in(reference)

    def apply(
        self, reference: str, params: Mapping[str, Any], tables: Mapping[str, pl.DataFrame], timeout: float
    ) -> dict[str, pl.DataFrame]:
        if self.round.prompts is None:
            return {}
        try:
            node = definition(self.round.find(reference))
        except SelfkdError as error:
            self._add("function", str(error))
            return {}
        named = (*GIVEN, *params)
        for name in required(node) if node else ():
            if name not in named:
                self._add("function", f"{reference} wants '{name}', and it is given {', '.join(named)}")
        return {}

    def loss(self, reference: str, params: Mapping[str, Any]) -> Function:
        nothing = Function(reference_parts(reference)[1], Path(), "", params)
        if self.round.prompts is None:
            return nothing
        try:
            function = replace(self.round.find(reference), params=params)
            found = check_loss(function, self.step, self.round.seen) if definition(function) else []
        except SelfkdError as error:
            function, found = nothing, [str(error)]
        for problem in found:
            self._add("loss", problem)
        return function

    # ---- answers, of which there are none ----

    def seed(self, *names: Any) -> int:
        return 0

    def model(self, reference: ModelRef) -> Model:
        return _stand_in(reference.role)

    def there(self, reference: ModelRef) -> bool:
        return True

    def load(
        self,
        source: Mapping[str, Any],
        dither: int | None,
        asked: Iterable[pl.DataFrame],
        shapes: Iterable[pl.DataFrame] = (),
        chat: Mapping[str, Any] | None = None,
    ) -> tuple[Path, dict[str, Any]]:
        return Path(), {}

    def places(self, split: str, ids: Collection[str]) -> dict[str, str]:
        return {}

    def say(self, text: str) -> None:
        pass

    def generate(
        self, model: Model, requests: pl.DataFrame, sampling: Sampling, stream: str, about_samples: bool = False
    ) -> list[Path]:
        return []

    def logprobs(self, model: Model, rows: pl.DataFrame) -> Iterator[Logprob]:
        return iter(())

    def read(self, model: Model, reading: Reading, rows: pl.DataFrame) -> Iterator[Read]:
        return iter(())

    def lengths(self, model: Model, rows: pl.DataFrame) -> list[int]:
        return [0] * rows.height

    def average(self, models: Sequence[tuple[Model, float]]) -> Path:
        return Path()

    def train(
        self, start: Model, reference: Model | None, rows: pl.DataFrame, spec: TrainSpec, check: Check | None = None
    ) -> Trained:
        return Trained(Path(), {}, {})

    def map(
        self, function: Function, batches: Iterable[list[Row]], samples: Iterable[str], timeout: float
    ) -> Iterator[list[tuple[float | None, str]]]:
        return iter(())

    def earlier(self, window: int | None) -> Iterator[tuple[int, Pool]]:
        return iter(())

    def split(self, name: str) -> Pool:
        return Pool()

    def data(self, name: str) -> pl.DataFrame:
        return pl.DataFrame(schema=brought.schema(self.step.scores() if isinstance(self.step, BringStep) else ()))

    def save(self, table: str, frame: pl.DataFrame) -> Part:
        return frame

    def progress(self, done: int, total: int, unit: str, **more: Any) -> None:
        pass


def _always_fails(template: templates.Template, prompts: Sequence[Mapping[str, Any]], answered: bool) -> Iterator[str]:
    """Yield why a template can be rendered for none of the prompts; `answered`: it is asked only about those with an answer."""
    failures = []
    asked = [prompt for prompt in prompts if prompt["answer"] is not None or not answered]
    for prompt in asked:
        try:
            template.render(prompt=templates.prompt_of(prompt), of=None)
            return
        except SelfkdError as error:
            failures.append(in_one_line(error) if not getattr(error, "where", "") else f"{error.where}  {in_one_line(error)}")
    yield from (f"{failure} (so it is for each of the first {len(asked)} prompts)" for failure in failures[:1])


def number(text: str, pool: Pool) -> None:
    """Raise RecipeError where an expression is no number over the prompts of an empty pool."""
    table = views.prompt_view(pool, text)
    own = pool.prompt_columns
    views.expression(text, table if own is not None else _fitting(text, table, "number"), "number", own=own or ())


def _nothing(kind: Kind) -> pl.Expr:
    return pl.lit(None, pl.Boolean if kind == "condition" else pl.Float64)


def _fitting(text: str, table: pl.DataFrame, kind: Kind) -> pl.DataFrame:
    """Return the table with the prompts' columns in a type that an expression takes: nobody has read them, so they may be of any."""
    unread = [name for name in table.columns if name.startswith(of_prompts.PREFIX)]
    for given in (pl.Float64, pl.String, pl.Boolean) if unread else ():
        typed = table.with_columns(pl.col(unread).cast(given, strict=False))
        with suppress(RecipeError):
            views.expression(text, typed, kind)
            return typed
    return table


def _try_on_text(parsed: pl.Expr, text: str, table: pl.DataFrame) -> None:
    """Raise RecipeError where an expression takes any text for a number or a date: on other texts it would end the round."""
    row = {name: "x" if kind == pl.String else None for name, kind in table.schema.items()}
    try:
        pl.DataFrame([row], schema=table.schema).select(parsed)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        fix = "try_cast(... as ...) gives null where a text does not fit."
        raise RecipeError(f"'{text}' fails on a text such as 'x': {first_line(error)}.", fix=fix) from None


def _unrendered(prompt: Row, messages: Messages, of: Row | None = None, **more: Any) -> Messages:
    return messages
