"""Going on with a recipe that changed: more rounds are always welcome, other changes only as a recorded amendment.

An amendment is judged before it is written, under the lease: what is fixed, made already or without effect is refused, and then
the run is exactly as it was. So every changed word works from the next step on that is not made yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from selfkd.chain import commit, data, numerics, records, rounded, steering, ways
from selfkd.chain.commit import Place
from selfkd.chain.freeze import code_digests, freeze_code, now, prove_code
from selfkd.chain.paths import Paths
from selfkd.chain.records import Amendment, CodeEntry, Commit, Info, Seal
from selfkd.core import digest, number_format, storage
from selfkd.core.files import reference_parts
from selfkd.core.lease import Lease
from selfkd.core.model_ref import ModelRef
from selfkd.errors import ChainError
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.load import frozen
from selfkd.recipe.schema import Recipe
from selfkd.steps.average import AverageStep
from selfkd.steps.replay import ReplayStep
from selfkd.steps.score import ScoreStep
from selfkd.steps.step import Step, several
from selfkd.steps.train import TrainStep

SHOWN_CHANGES = 6
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
FREE = ("name", "rounds")  # of the folder, which was given; and what needs no amendment


def in_force(paths: Paths, info: Info) -> Info | Amendment:
    """Return what holds the recipe and code in force: the newest amendment, or the run as created."""
    return _newest(info, amendments(paths))


def _newest(info: Info, found: Sequence[Amendment]) -> Info | Amendment:
    return found[-1] if found else info


def amendments(paths: Paths) -> list[Amendment]:
    """Return the amendments of a run, oldest first."""
    return [records.read(path, Amendment) for path in paths.amendments()]


def accept(recipe: Recipe, paths: Paths, info: Info, environment: Iterable[str], amended: bool) -> Recipe:
    """Return the recipe to go on with, the same as before or amended.

    With `amended`, what changed is recorded; without, ChainError names it. BusyError where a driver holds the run that would
    have to be amended. `environment` names what rewards may see of it: new ones are tried before they are recorded.
    """
    here = _Standing(paths, info)
    recipe = here.with_rounds(as_it_was(recipe, info))
    change = here.change(recipe)
    if (change.words or change.edited) and not amended:
        raise _refusal(paths, change, here.objection(recipe, change))
    if change:
        with Lease(paths.leases, paths.tmp):
            _record(recipe, _Standing(paths, info), environment)  # read anew: another driver may have been here
    return recipe


def changes(recipe: Recipe, paths: Paths) -> list[str]:
    """Return what differs from the recipe and code in force, one sentence each; the number of rounds may always differ."""
    info = records.read(paths.info, Info)
    return _Standing(paths, info).change(as_it_was(recipe, info)).sentences()


def as_it_was(recipe: Recipe, info: Info) -> Recipe:
    """Return the recipe with `precision: auto` as what it was when a run was created whose numerics do not know the word: bf16."""
    if "precision" in info.numerics:
        return recipe
    return recipe.model_copy(update={part: tuple(map(_in_bf16, _part(recipe, part))) for part in LISTS})


def _in_bf16(line: Line) -> Line:
    if line.verb != TrainStep.verb or line.words.get("precision", "auto") != "auto":
        return line
    return replace(line, words={**line.words, "precision": "bf16"})


def _record(recipe: Recipe, here: _Standing, environment: Iterable[str]) -> None:
    change = here.change(recipe)
    if objection := here.objection(recipe, change):
        raise objection
    if change:
        record = Amendment(
            changed=[*change.words, *change.edited, *change.rounds],
            recipe=recipe.resolved(),
            code=_proved_code(recipe, here, environment) if change.edited else here.effective.code,
            files=here.code_files(),
            when=now(),
            sealed=len(here.sealed),
        )
        records.write(here.paths.amendment(len(here.amendments) + 1), record, here.paths.tmp)


def _proved_code(recipe: Recipe, here: _Standing, environment: Iterable[str]) -> dict[str, CodeEntry]:
    code = freeze_code(recipe, here.paths, here.effective.code, here.info.machine.get("backend") == "fake")
    prove_code(recipe, code, here.paths, environment)
    return code


@dataclass(frozen=True)
class _Change:
    """What differs from the recipe and code in force: {dotted field: sentence}, names of code, and ["rounds"] where they do."""

    words: Mapping[str, str]
    edited: Sequence[str]
    rounds: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.words or self.edited or self.rounds)

    def sentences(self) -> list[str]:
        return [*self.words.values(), *(f"{name} changed" for name in self.edited)]


class _Standing:
    """Where a run stands: its recipe and code in force, what is sealed, and what is made of the open round."""

    def __init__(self, paths: Paths, info: Info) -> None:
        self.paths, self.info, self.amendments = paths, info, amendments(paths)
        self.effective = _newest(info, self.amendments)
        self.sealed = [records.read(names.seal, Seal) for names in paths.rounds() if names.seal.exists()]
        self.rounds = int(self.effective.recipe["rounds"])

    def with_rounds(self, recipe: Recipe) -> Recipe:
        """Return the recipe with a number of rounds that the run can still have.

        A finished run that is asked for fewer stays as it is; one that is on its way past them cannot end where it was.
        """
        last = len(self.sealed) - 1
        if recipe.rounds > last or recipe.rounds == self.rounds:
            return recipe
        if not self._ended(recipe, self.rounds):
            what = f"round {last} is sealed already, on the way to round {self.rounds}: rounds={recipe.rounds} comes too late"
            fix = f"Go on: rounds={self.rounds}, or `selfkd resume {self.paths.folder}`.   End with the next one: rounds={last + 1}"
            raise ChainError(what, str(self.paths.folder), fix)
        return recipe.model_copy(update={"rounds": self.rounds})

    def _ended(self, recipe: Recipe, rounds: int) -> bool:
        """Whether nothing is left to make of `rounds` rounds."""
        if len(self.sealed) > rounds:
            return True
        spent = sum(commit.generated_in(self.paths, seal) for seal in self.sealed)
        return bool(steering.ended_early(recipe.stop, self.sealed, self.amendments, spent))

    def change(self, recipe: Recipe) -> _Change:
        words = _changed_words(digest.as_json(self._old.resolved()), digest.as_json(recipe.resolved()))
        code = {reference: entry.digest for reference, entry in self.effective.code.items()}
        current = code_digests(recipe, self.effective.code)
        edited = sorted(name for name in code.keys() | current.keys() if code.get(name) != current.get(name))
        return _Change(words, edited, ["rounds"] if recipe.rounds != self.rounds else [])

    def code_files(self) -> dict[str, Any]:
        """Return the hashes of all frozen code: of what lay there before, those of its own record, or damage would become the truth."""
        before = [self.info.files, *(one.files for one in self.amendments)]
        known = {name: entry for files in before for name, entry in files.items()}
        lying = {self.paths.relative(path): path for path in storage.files_in(self.paths.code)}
        new = storage.file_hashes([path for name, path in lying.items() if name not in known], self.paths.folder)
        return {name: known[name] for name in lying if name in known} | new

    # ---- what cannot be amended ----

    def objection(self, recipe: Recipe, change: _Change) -> ChainError | None:
        """Return why this change is refused whatever is typed, with the ways out; None where it takes effect."""
        if not (change.words or change.edited):
            return None
        code = {name: CodeEntry(path="", digest=found) for name, found in code_digests(recipe, self.effective.code).items()}
        code |= dict(self.info.data)
        return (
            self._fixed(change)
            or self._unread(recipe)
            or self._made(recipe, code)
            or self._pruned(recipe)
            or self._replayed(recipe, code)
            or self._finished(recipe, change)
            or self._too_late(recipe, code)
        )

    def _fixed(self, change: _Change) -> ChainError | None:
        fixed = [said for name, said in change.words.items() if name.split(".")[0] in FIXED]
        if fixed:
            return self._no("; ".join(fixed) + ": this is fixed when a run is created")
        if "long" in change.words and self.paths.round(0).commits():
            return self._no(f"{change.words['long']}: prompts are measured when the model is loaded, and it was loaded")
        return None

    def _unread(self, recipe: Recipe) -> ChainError | None:
        """Find a step that would bring data which nobody read when the run was created."""
        if name := data.unread(recipe, self.info.data):
            return self._no(f"'{name}' would bring data that this run does not have: it is read when a run is created")
        return None

    def _made(self, recipe: Recipe, code: Mapping[str, CodeEntry]) -> ChainError | None:
        """Compare what is made of the open round with what the recipe would now make there."""
        index = len(self.sealed)
        parent = self.sealed[-1].digest if self.sealed else self.info.root
        steps, was = _steps_of(recipe, index), {step.name: step for step in _steps_of(self._old, index)}
        for number, step in enumerate(steps, 1):
            place = Place(self.paths, index, number, step, parent, commit.code_of(step, code))
            for other in commit.others(place):
                return self._no(f"is where the recipe now has '{step.name}'", self.paths.shown(other))
            if not place.commit.exists():
                break
            made = records.read(place.commit, Commit)
            problem = (
                self._in_another_format(was.get(step.name), step)
                or commit.mismatch(place, made)
                or self._of_another_best(recipe, list(step.models().values()))
            )
            if problem:
                return self._no(problem, self.paths.shown(place.commit))
            parent = made.digest
        else:
            for more in self.paths.round(index).at_number(len(steps) + 1):
                return self._no("is made already, and the recipe has no such step", self.paths.shown(more))
        return None

    def _in_another_format(self, was: Step | None, step: Step) -> str:
        """Return in what format a made step was trained where its recipe now says another; its key does not tell what `auto` came to."""
        if not (isinstance(was, TrainStep) and isinstance(step, TrainStep)):
            return ""
        fixed = numerics.kept(self.paths, self.info)
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
        was, now_ = (steering.best_round(self.sealed, one.best) for one in (self._old, recipe))
        return f"was made when round {was} was the best one; now round {now_} would be" if was != now_ else ""

    def _pruned(self, recipe: Recipe) -> ChainError | None:
        """Find a model that a step to come names and `keep` has taken away."""
        to_come = range(len(self.sealed), recipe.rounds + 1) if self.sealed else ()
        for step in (step for index in to_come for step in recipe.steps_of(index)):
            for field, model in step.models().items():
                path = self._path(model, recipe)
                copy = path and rounded.copy_of(self.paths.folder, path)
                if copy and isinstance(step, TrainStep | AverageStep):
                    what = (
                        f"{step.name}.{field}: of the weights of '{model}' only a copy in bf16 is left (`keep: {{as: bf16}}`)"
                    )
                    return self._no(f"{what}, and an update needs them in fp32")
                if path and not copy and not (self.paths.folder / path).exists():
                    what = f"{step.name}.{field}: the weights of '{model}' are not on disk any more: `keep` had them taken away"
                    return self._no(what)
        return None

    def _replayed(self, recipe: Recipe, code: Mapping[str, CodeEntry]) -> ChainError | None:
        """Find a score that `replay` would bring from earlier rounds, given there by another reward: one name, two meanings."""
        steps = recipe.steps_of(max(recipe.rounds, 1))
        windows = [step.rounds for step in steps if isinstance(step, ReplayStep)]
        if not windows:
            return None
        wide = 0 if None in windows else max(one for one in windows if one)
        ways: dict[str, Any] = {}
        for step in steps:
            ways |= _ways(step.verb, step.identity(), commit.code_of(step, code))
        for path in (path for seal in self.sealed[1:][-wide:] for path in self.paths.round(seal.round).commits()):
            made = records.read(path, Commit)
            for name, how in _ways(made.verb, made.identity, made.code).items():
                if ways.get(name, how) != how:
                    return self._mixed(name, self.paths.shown(path))
        return None

    def _mixed(self, name: str, where: str) -> ChainError:
        what = f"gave '{name}' by another reward, and `replay` brings these scores: old and new ones would have one name"
        more = f"Give the new score a name of its own (as: {name}_2), use it in the steps after it, and repeat with --amend"
        return self._no(what, where, more)

    def _path(self, model: ModelRef, recipe: Recipe) -> str | None:
        """Return where the weights of a sealed round's model lie; None for a model of a round to come."""
        named = {"base": 0, "warm": 0, "best": steering.best_round(self.sealed, recipe.best)}
        index = named.get(model.when, model.round)
        if index is None or index >= len(self.sealed):
            return None
        first = records.read(self.paths.round(0).commits()[0], Commit)
        models = first.models if model.when == "base" else self.sealed[index].models
        return models[model.role].path if model.role in models else None

    def _finished(self, recipe: Recipe, change: _Change) -> ChainError | None:
        steers_rounds = [name for name in change.words if name.split(".")[0] in (*LISTS, "keep_if")]
        if not (steers_rounds or change.edited) or change.rounds or not self._ended(recipe, recipe.rounds):
            return None
        more = f"Give the run more rounds with it: repeat the command with rounds={self.rounds + 1} --amend"
        return self._no(
            f"the run has ended, so nothing is left that {(*steers_rounds, *change.edited)[0]} could change", "", more
        )

    def _too_late(self, recipe: Recipe, code: Mapping[str, CodeEntry]) -> ChainError | None:
        """Find a step that changed, though nothing is left to make of what changed in it."""
        old = self._old
        first, last = len(self.sealed), max(recipe.rounds, old.rounds)
        known = {**self.effective.code, **self.info.data}
        was, now_ = _to_come(old, known, first, last), _to_come(recipe, code, first, last)
        before, after = _lines(old, known), _lines(recipe, code)
        changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        late = [name for name in changed if was.get(name) == now_.get(name)]
        return self._no(f"{', '.join(late)}: all that changed in it is made already") if late else None

    @cached_property
    def _old(self) -> Recipe:
        return frozen(dict(self.effective.recipe), self.paths.folder)

    def _no(self, what: str, where: str = "", more: str = "") -> ChainError:
        return ChainError(what, where or str(self.paths.folder), "\n".join(filter(None, [_ways_out(self.paths), more])))


# ---- steps, to be compared ----


def _steps_of(recipe: Recipe, index: int) -> list[Step]:
    """Return all that round `index` can have, with the steps that only a last round has."""
    return [*recipe.steps_of(index), *(recipe.closing_steps(index) if index < recipe.rounds else [])]


def _ways(verb: str, identity: Mapping[str, Any], code: Mapping[str, str]) -> dict[str, Any]:
    """Return {score: what gives it} of a score step, as its record tells it; nothing of any other step."""
    if verb != ScoreStep.verb:
        return {}
    if not identity.get("reward"):
        return dict.fromkeys(several(identity.get("as")) or ["logprob_of"], identity["logprob"])
    params = digest.as_json(identity.get("params", {}))
    rewards = ways.rewards_of(identity)
    return {name: [reference_parts(one)[1], code.get(one), params] for name, one in rewards.items()}


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


# ---- words ----


def _changed_words(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return {dotted field: sentence} of what differs, without what is FREE; a field that is not there is one that is empty."""
    was, now_ = _told(old), _told(new)
    changed = sorted(name for name in was.keys() | now_.keys() if was.get(name) != now_.get(name) and name not in FREE)
    return {name: f"{name}: {_what_changed(name, was, now_)}" for name in changed}


def _told(words: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _flat(words).items() if value not in (None, {}, [])}


def _what_changed(name: str, was: Mapping[str, Any], now_: Mapping[str, Any]) -> str:
    if name in was and name in now_:
        return f"{was[name]!r} was changed to {now_[name]!r}"
    return f"{was[name]!r} was removed" if name in was else f"{now_[name]!r} was added"


def _refusal(paths: Paths, change: _Change, objection: ChainError | None) -> ChainError:
    """Return the error of a change that nobody asked to record; --amend is offered only where it would be accepted."""
    said = change.sentences()
    more = f"; and {len(said) - SHOWN_CHANGES} more" if len(said) > SHOWN_CHANGES else ""
    what = "was made by a different recipe: " + "; ".join(said[:SHOWN_CHANGES]) + more
    if objection:
        return ChainError(
            what, str(paths.folder), f"It cannot be amended: {objection.where}  {objection.what}\n{objection.fix}"
        )
    amend = "Change only steps not made yet: repeat the command with --amend"
    return ChainError(what, str(paths.folder), f"{_ways_out(paths)}\n{amend}")


def _ways_out(paths: Paths) -> str:
    keep = f"Keep the chain: restore it, or `selfkd resume {paths.folder}`, which uses the recipe and code frozen in the run."
    return f"{keep}\nStart a new chain: --name X"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return {dotted.path: value} of nested mappings and lists, so that a difference can be named."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found or {name: value}
