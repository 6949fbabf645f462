"""What cannot be amended: what is fixed, made already, gone, or without effect. Judged before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from selfkd.chain import commit, data, numerics, records, replayed, rounded, steering
from selfkd.chain.commit import Place
from selfkd.chain.freeze import code_digests
from selfkd.chain.paths import Paths
from selfkd.chain.records import CodeEntry, Commit
from selfkd.chain.standing import Change, Standing
from selfkd.core import number_format
from selfkd.core.model_ref import ModelRef
from selfkd.errors import ChainError
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.schema import Recipe
from selfkd.steps.average import AverageStep
from selfkd.steps.step import Step
from selfkd.steps.train import TrainStep

FIXED = (
    "model",
    "seed",
    "prompts",
    "overlap",
    "transductive",
    "context",
    "chunk",
    "exact",
    "dither",
    "dither_seed",
    "chat",
)  # all that the first step rests on


def objection(here: Standing, recipe: Recipe, change: Change, kept: Collection[str] = ()) -> ChainError | None:
    """Return why a change is refused whatever is typed, with the ways out; None where it takes effect. `kept` code stays as it is in force."""
    return _Objections(here, kept).objection(recipe, change)


def made_alike(here: Standing, recipe: Recipe, kept: Collection[str] = ()) -> list[Commit]:
    """Return the first steps of the open round that the recipe would make just as they are made."""
    found = _Objections(here, kept)
    return found.made_alike(recipe, found.code_of(recipe))[0]


def ways_out(paths: Paths) -> str:
    keep = f"Keep the chain: restore it, or `selfkd resume {paths.folder}`, which uses the recipe and code frozen in the run."
    return f"{keep}\nStart a new chain: --name X"


class _Objections:
    """Each reason is a method: it returns the error, or None."""

    def __init__(self, here: Standing, kept: Collection[str]) -> None:
        self.here, self.kept = here, kept

    def objection(self, recipe: Recipe, change: Change) -> ChainError | None:
        """Return why this change is refused whatever is typed, with the ways out; None where it takes effect."""
        if not (change.words or change.edited):
            return None
        code = self.code_of(recipe)
        return (
            self._fixed(change)
            or self._unread(recipe)
            or self._made(recipe, code)
            or self._pruned(recipe)
            or self._replayed(recipe, code)
            or self._finished(recipe, change)
            or self._too_late(recipe, code)
        )

    def code_of(self, recipe: Recipe) -> dict[str, CodeEntry]:
        """Return the code and data that the recipe names, by their digests alone."""
        found = code_digests(recipe, self.here.effective.code, self.kept)
        return {**{name: CodeEntry(path="", digest=one) for name, one in found.items()}, **self.here.info.data}

    def _fixed(self, change: Change) -> ChainError | None:
        fixed = [said for name, said in change.words.items() if name.split(".")[0] in FIXED]
        if fixed:
            return self._no("; ".join(fixed) + ": this is fixed when a run is created")
        if "long" in change.words and self.here.paths.round(0).commits():
            return self._no(f"{change.words['long']}: prompts are measured when the model is loaded, and it was loaded")
        return None

    def _unread(self, recipe: Recipe) -> ChainError | None:
        """Find a step that would bring data which nobody read when the run was created."""
        if name := data.unread(recipe, self.here.info.data):
            return self._no(f"'{name}' would bring data that this run does not have: it is read when a run is created")
        return None

    def _made(self, recipe: Recipe, code: Mapping[str, CodeEntry]) -> ChainError | None:
        return self.made_alike(recipe, code)[1]

    def made_alike(self, recipe: Recipe, code: Mapping[str, CodeEntry]) -> tuple[list[Commit], ChainError | None]:
        """Compare what is made of the open round with what the recipe would now make there.

        Return the first steps that are alike, and why the next one is none; None where all that is made is alike.
        """
        index = len(self.here.sealed)
        parent = self.here.sealed[-1].digest if self.here.sealed else self.here.info.root
        steps, was = _steps_of(recipe, index), {step.name: step for step in _steps_of(self.here.old, index)}
        alike: list[Commit] = []
        for number, step in enumerate(steps, 1):
            place = Place(self.here.paths, index, number, step, parent, commit.code_of(step, code))
            for other in commit.others(place):
                return alike, self._no(f"is where the recipe now has '{step.name}'", self.here.paths.shown(other))
            if not place.commit.exists():
                return alike, None
            made = records.read(place.commit, Commit)
            problem = (
                self._in_another_format(was.get(step.name), step)
                or commit.mismatch(place, made)
                or self._of_another_best(recipe, list(step.models().values()))
            )
            if problem:
                return alike, self._no(problem, self.here.paths.shown(place.commit))
            parent = made.digest
            alike.append(made)
        for more in self.here.paths.round(index).at_number(len(steps) + 1):
            return alike, self._no("is made already, and the recipe has no such step", self.here.paths.shown(more))
        return alike, None

    def _in_another_format(self, was: Step | None, step: Step) -> str:
        """Return in what format a made step was trained where its recipe now says another; its key does not tell what `auto` came to."""
        if not (isinstance(was, TrainStep) and isinstance(step, TrainStep)):
            return ""
        fixed = numerics.kept(self.here.paths, self.here.info)
        did, would = (number_format.of_training(one.precision, fixed) for one in (was, step))
        said = f"was trained in {did} (precision: {was.precision})"
        if did != would:
            return f"{said}, and would now be in {would} (precision: {step.precision})"
        same = was.identity()["precision"] == step.identity()["precision"]
        return (
            "" if same else f"{said}: precision: {step.precision} says the same under another key, so leave the word as it was"
        )

    def _of_another_best(self, recipe: Recipe, models: Sequence[ModelRef]) -> str:
        if not any(model.when == "best" for model in models):
            return ""
        was, now_ = (steering.best_round(self.here.sealed, one.best) for one in (self.here.old, recipe))
        return f"was made when round {was} was the best one; now round {now_} would be" if was != now_ else ""

    def _pruned(self, recipe: Recipe) -> ChainError | None:
        """Find a model that a step to come names and `keep` has taken away."""
        to_come = range(len(self.here.sealed), recipe.rounds + 1) if self.here.sealed else ()
        for step in (step for index in to_come for step in recipe.steps_of(index)):
            for field, model in step.models().items():
                path = self._path(model, recipe)
                copy = path and rounded.copy_of(self.here.paths.folder, path)
                if copy and isinstance(step, TrainStep | AverageStep):
                    what = (
                        f"{step.name}.{field}: of the weights of '{model}' only a copy in bf16 is left (`keep: {{as: bf16}}`)"
                    )
                    return self._no(f"{what}, and an update needs them in fp32")
                if path and not copy and not (self.here.paths.folder / path).exists():
                    what = f"{step.name}.{field}: the weights of '{model}' are not on disk any more: `keep` had them taken away"
                    return self._no(what)
        return None

    def _replayed(self, recipe: Recipe, code: Mapping[str, CodeEntry]) -> ChainError | None:
        """Find a score that `replay` would bring from earlier rounds, given there by something else: one name, two meanings."""
        found = replayed.otherwise(recipe, self.here.sealed, self.here.paths, code)
        return self._no(found.what, self.here.paths.shown(found.path), found.way_out) if found else None

    def _path(self, model: ModelRef, recipe: Recipe) -> str | None:
        """Return where the weights of a sealed round's model lie; None for a model of a round to come."""
        named = {"base": 0, "warm": 0, "best": steering.best_round(self.here.sealed, recipe.best)}
        index = named.get(model.when, model.round)
        if index is None or index >= len(self.here.sealed):
            return None
        first = records.read(self.here.paths.round(0).commits()[0], Commit)
        models = first.models if model.when == "base" else self.here.sealed[index].models
        return models[model.role].path if model.role in models else None

    def _finished(self, recipe: Recipe, change: Change) -> ChainError | None:
        steers_rounds = [name for name in change.words if name.split(".")[0] in (*LISTS, "keep_if")]
        if not (steers_rounds or change.edited) or change.rounds or not self.here.ended(recipe, recipe.rounds):
            return None
        more = f"Give the run more rounds with it: repeat the command with rounds={self.here.rounds + 1} --amend"
        return self._no(
            f"the run has ended, so nothing is left that {(*steers_rounds, *change.edited)[0]} could change", "", more
        )

    def _too_late(self, recipe: Recipe, code: Mapping[str, CodeEntry]) -> ChainError | None:
        """Find a step that changed, though nothing is left to make of what changed in it."""
        old = self.here.old
        first, last = len(self.here.sealed), max(recipe.rounds, old.rounds)
        known = {**self.here.effective.code, **self.here.info.data}
        was, now_ = _to_come(old, known, first, last), _to_come(recipe, code, first, last)
        before, after = _lines(old, known), _lines(recipe, code)
        changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        late = [name for name in changed if was.get(name) == now_.get(name)]
        return self._no(f"{', '.join(late)}: all that changed in it is made already") if late else None

    def _no(self, what: str, where: str = "", more: str = "") -> ChainError:
        return ChainError(
            what, where or str(self.here.paths.folder), "\n".join(filter(None, [ways_out(self.here.paths), more]))
        )


# ---- steps, to be compared ----


def _steps_of(recipe: Recipe, index: int) -> list[Step]:
    """Return all that round `index` can have, with the steps that only a last round has."""
    return [*recipe.steps_of(index), *(recipe.closing_steps(index) if index < recipe.rounds else [])]


def _lines(recipe: Recipe, code: Mapping[str, CodeEntry]) -> dict[str, Any]:
    """Return {step name: its list, its words in every round, its code}."""
    return {
        line.name: (part, line.spelled(), commit.code_of(line.at(1), code))
        for part in LISTS
        for line in _part(recipe, part)
    }  # fmt: skip


def _to_come(recipe: Recipe, code: Mapping[str, CodeEntry], first: int, last: int) -> dict[str, list[Any]]:
    """Return {name of a line: each of its steps from round `first` on}, up to the round from which on they are all the same."""
    longest = max((line.variants for part in LISTS for line in _part(recipe, part)), default=1)
    rounds = [index for index in range(first, last + 1) if index in (first, last) or index <= longest]
    found: dict[str, list[Any]] = {}
    for line in (line for part in LISTS for line in _part(recipe, part)):
        made_in = [0] if line in recipe.before else rounds
        steps = [(index, line.at(index)) for index in made_in if index >= first]
        found[line.name] = [(index, step.words(), commit.code_of(step, code)) for index, step in steps]
    return {name: steps for name, steps in found.items() if steps}


def _part(recipe: Recipe, part: str) -> tuple[Line, ...]:
    return tuple(getattr(recipe, part))
