"""A sweep: methods and their controls, each given the same number of trials. What a person writes of it, and the trials that this makes.

Reads the sweep file and the recipes that it names; runs nothing, and knows no run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from selfkd.core import digest, yamlfile
from selfkd.core.files import NAME, as_typed
from selfkd.core.wording import did_you_mean
from selfkd.core.yamlfile import Node, Problems, plain
from selfkd.errors import RecipeError, SelfkdError, UsageError
from selfkd.recipe.control import CONTROLS
from selfkd.recipe.load import load, read
from selfkd.recipe.messages import explain
from selfkd.recipe.schema import Recipe

TIMES = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
AS_LONG = ("gold-sft", "one-round")  # controls that train for as many steps as the method did in the trial beside them
PROBE = "best-decoding"  # the control that shows whether there is headroom, before anything is trained
Headroom = Literal["told", "vote"] | float


def count_of(value: Any) -> Any:
    """Return a number of tokens that may be written with k, M or G.

    >>> count_of("2M"), count_of("1.5k"), count_of(7)
    (2000000, 1500, 7)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", value) if isinstance(value, str) else None
    return round(float(found[1]) * TIMES[found[2]]) if found else value


class _Words(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1)


class Budget(_Words):
    """What all trials of a sweep together may take."""

    tokens: Annotated[int | None, BeforeValidator(count_of)] = Field(
        None, ge=1, description="Generated and trained on, such as 2M: no trial begins beyond it."
    )
    hours: float | None = Field(
        None, gt=0, description="In all calls together; a trial that is being made stops and can go on."
    )
    file: str | None = Field(None, description="A YAML file with `hours` and `spent_hours`, which sweeps share and write to.")


class ArmWords(_Words):
    """A method, or a control of one."""

    recipe: str = Field(description="A recipe file, beside the sweep file or by its name.")
    name: str | None = Field(
        None, pattern=NAME, description="Name of the arm; default: that of the recipe, and of the control."
    )
    control: str | None = Field(None, description="Run this control of the recipe instead.")
    set_: dict[str, Any] = Field({}, alias="set", description="Changed fields, {sample.n: 8}.")
    try_: dict[str, list[Any]] = Field(
        {},
        alias="try",
        description="Fields of which each combination of values is a trial, {train.trl.learning_rate: [1e-6, 5e-6]}.",
    )
    controls: list[str] | None = Field(None, description="Its controls; default: those of the sweep that it has something for.")
    gold: str | None = Field(None, description="Template of a gold answer's text, for its control gold-sft.")
    headroom: Headroom | None = Field(
        None,
        description="Train only where the base shows room on dev: told (it answers better with what its teacher is told), vote (a vote among its answers does better than one of them), or a number that it must exceed (chance); each beyond its interval.",
    )


class SweepWords(_Words):
    """A sweep, as it is written."""

    name: str = Field("", pattern=NAME, description="Name of the sweep and of its folder; default: the name of the file.")
    arms: list[str | ArmWords] = Field(min_length=1, description="Recipes, or {recipe, control, set, try, controls, headroom}.")
    controls: list[str] = Field([], description="Controls of every arm that has something for them.")
    seeds: int | list[int] = Field(3, description="How many seeds each trial is made with, counted from 0; or which.")
    metric: str | None = Field(None, description="The metric of dev that chooses; default: that of `best` in the first recipe.")
    mode: Literal["max", "min"] = Field("max", description="max: the greatest is best.")
    set_: dict[str, Any] = Field({}, alias="set", description="Changed fields of every arm.")
    try_: dict[str, list[Any]] = Field({}, alias="try", description="Fields to try on every arm.")
    results: str | None = Field(
        None,
        description="A file of results that were made before, also elsewhere (selfkd compare SWEEP --jsonl): such trials are done.",
    )
    budget: Budget | None = Field(None, description="tokens, hours, file: what all trials may take.")


@dataclass(frozen=True)
class Trial:
    """One run to be made: an arm with one combination of what is tried (`number`), and one seed.

    `method` is the trial of the method that a control is made of. `folders` are where its recipe is looked for.
    """

    arm: str
    recipe: str
    control: str | None
    number: int
    seed: int
    words: tuple[str, ...]
    method: str | None = None
    headroom: Headroom | None = None

    @property
    def name(self) -> str:
        return f"{self.arm}.{self.number}.s{self.seed}"

    @property
    def takes_steps(self) -> bool:
        """Whether it has to know how many steps the method's updates took."""
        return self.control in AS_LONG

    def load(self, steps: Sequence[int] = ()) -> Recipe:
        return load(self.recipe, [*self.words, f"seed={self.seed}"], control=self.control, steps=steps)

    def asked(self) -> dict[str, Any]:
        """Return what is recorded of it, and by which it is known again."""
        return {"arm": self.arm, "control": self.control, "number": self.number, "seed": self.seed, "set": list(self.words)}


@dataclass(frozen=True)
class Sweep:
    """A sweep, complete and checked: its trials in the order in which they are made, so that a budget that ends leaves arms even."""

    name: str
    metric: str
    mode: str
    trials: tuple[Trial, ...]
    budget: Budget
    folder: Path = field(default=Path(), compare=False)
    results: str | None = None

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(trial.arm for trial in self.trials))

    def words(self) -> dict[str, Any]:
        """Return what is recorded of a sweep."""
        return {"name": self.name, "metric": self.metric, "mode": self.mode, "trials": [one.asked() for one in self.trials]}


def read_sweep(path: Path) -> Sweep:
    """Return the sweep of a file; RecipeError names every problem at its line."""
    problems = Problems()
    tree, _ = yamlfile.read(path, as_typed(path), problems)
    words = _checked(tree, problems)
    return _sweep(words, tree, path.parent, path.stem, problems)


def is_sweep(path: Path) -> bool:
    """Whether a file is a sweep, and no recipe."""
    if not path.is_file():
        return False
    tree, _ = yamlfile.read(path, as_typed(path), Problems())
    return isinstance(tree.value, dict) and "arms" in tree.value


def sweep_of(
    words: Sequence[str], seeds: int, controls: Sequence[str], budget: str | None, metric: str | None, name: str
) -> Sweep:
    """Return the sweep that a command line says: names of recipes, and fields with values, of which those with commas are tried."""
    arms = [word for word in words if "=" not in word]
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    values = {
        key: [plain(yamlfile.parse(one, key, Problems(), lines=False)) for one in _cut(value)] for key, value in fields.items()
    }
    tree: dict[str, Any] = {"name": name, "arms": arms, "controls": list(controls), "seeds": seeds}
    tree |= {"set": {key: given[0] for key, given in values.items() if len(given) == 1}}
    tree |= {"try": {key: given for key, given in values.items() if len(given) > 1}}
    tree |= {"metric": metric} if metric else {}
    tree |= {"budget": _budget(budget)} if budget else {}
    problems = Problems()
    node = yamlfile.parse(yamlfile.dump(tree), "selfkd sweep", problems, lines=False)
    return _sweep(_checked(node, problems), node, Path(), name, problems)


def _cut(value: str) -> list[str]:
    """Return the parts between commas, of which those inside brackets and quotes cut nothing."""
    return [part for part in re.findall(r"((?:\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|[^,])+)", value)]


def _budget(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in text.split(","):
        key, _, value = word.partition("=")
        if key not in ("tokens", "hours") or not value:
            raise UsageError(f"'{word}' is no budget", "--budget", "Write tokens=2M, hours=10, or both: tokens=2M,hours=10")
        found[key] = value if key == "tokens" else float(value)
    return found


def _checked(tree: Node, problems: Problems) -> SweepWords:
    try:
        return SweepWords.model_validate(plain(tree))
    except ValidationError as error:
        explain(error, SweepWords, tree, "", problems)
        problems.stop()
        raise RecipeError("is no sweep", tree.where) from None


# ---- arms ----


def _sweep(words: SweepWords, tree: Node, folder: Path, stem: str, problems: Problems) -> Sweep:
    places = tree.value["arms"].value
    arms: list[tuple[ArmWords, str, str | None]] = []
    for given, node in zip(words.arms, places, strict=True):
        arm = given if isinstance(given, ArmWords) else ArmWords(recipe=given)
        arms += [(one, node.where, method) for one, method in _with_controls(arm, words, folder, node.where, problems)]
    _refuse_twins(arms, problems)
    _even(arms, words, problems)
    problems.stop()
    seeds = range(words.seeds) if isinstance(words.seeds, int) else words.seeds
    trials = [trial for seed in seeds for arm, _, method in arms for trial in _trials(arm, method, words, folder, seed)]
    trials.sort(
        key=lambda one: (list(seeds).index(one.seed), one.number)
    )  # the first seed of all arms before the second of any
    if not trials:
        raise RecipeError("a sweep needs one seed at least", tree.value["seeds"].where)
    metric = _metric(words, trials[0], tree, problems)
    _lint(trials, arms, metric, problems)
    problems.stop()
    return Sweep(words.name or stem, metric, words.mode, tuple(trials), words.budget or Budget(), folder, words.results)


def _with_controls(
    arm: ArmWords, words: SweepWords, folder: Path, where: str, problems: Problems
) -> Iterator[tuple[ArmWords, str | None]]:
    """Yield an arm, then its controls: those that it names itself, else those of the sweep that have something to take away."""
    name = arm.name or "-".join(filter(None, (Path(arm.recipe).stem, arm.control)))
    named = arm.model_copy(update={"name": name})
    yield named, None
    asked = arm.controls if arm.controls is not None else [] if arm.control else words.controls
    for control in asked:
        if control not in CONTROLS:
            problems.add(
                where, name, f"no control '{control}'.{did_you_mean(control, CONTROLS)} Controls: {', '.join(CONTROLS)}"
            )
        elif arm.controls is not None or _has_something(named, control, words, folder):
            yield named.model_copy(update={"name": f"{name}-{control}", "control": control}), name


def _has_something(arm: ArmWords, control: str, words: SweepWords, folder: Path) -> bool:
    try:
        read(_found(arm.recipe, folder), list(_words(arm, words, next(_grid(arm, words)))), control=control, steps=(1,))
    except UsageError as error:
        return "nothing to control" not in str(error)
    except SelfkdError:
        pass  # the lint of the trials says what is wrong
    return True


def _refuse_twins(arms: Sequence[tuple[ArmWords, str, str | None]], problems: Problems) -> None:
    seen: set[str | None] = set()
    for arm, where, _ in arms:
        if arm.name in seen:
            problems.add(where, "", f"two arms are called '{arm.name}': give one of them a name of its own (name)")
        seen.add(arm.name)


def _even(arms: Sequence[tuple[ArmWords, str, str | None]], words: SweepWords, problems: Problems) -> None:
    """The best of ten tries beats the best of two: every arm gets as many."""
    counts = {arm.name: len(list(_grid(arm, words))) for arm, _, _ in arms}
    most = max(counts.values())
    for arm, where, _ in arms:
        if counts[arm.name] < most:
            text = (
                f"'{arm.name}' has {counts[arm.name]} combinations to try and another arm has {most}: try as many of each (try)"
            )
            problems.add(where, "", text)


def _grid(arm: ArmWords, words: SweepWords) -> Iterator[dict[str, Any]]:
    tried = {**words.try_, **arm.try_}
    for values in product(*tried.values()):
        yield dict(zip(tried, values, strict=True))


def _words(arm: ArmWords, words: SweepWords, tried: Mapping[str, Any]) -> tuple[str, ...]:
    gold = {"gold.text": arm.gold} if arm.gold and arm.control == "gold-sft" else {}
    changed = {**words.set_, **arm.set_, **tried, **gold}
    return tuple(
        f"{key}={value if isinstance(value, str) else digest.canonical(value).decode()}" for key, value in changed.items()
    )


def _trials(arm: ArmWords, method: str | None, words: SweepWords, folder: Path, seed: int) -> Iterator[Trial]:
    for number, tried in enumerate(_grid(arm, words), 1):
        beside = f"{method}.{number}.s{seed}" if method else None
        recipe = _found(arm.recipe, folder)
        yield Trial(str(arm.name), recipe, arm.control, number, seed, _words(arm, words, tried), beside, arm.headroom)


def _found(recipe: str, folder: Path) -> str:
    """Return the recipe beside the sweep file, else its name."""
    named = [folder / recipe, folder / f"{recipe}.yaml"]
    return next((str(path) for path in named if path.is_file()), recipe)


def _metric(words: SweepWords, first: Trial, tree: Node, problems: Problems) -> str:
    if words.metric and not words.metric.startswith("dev/"):
        problems.add(tree.value["metric"].where, "", f"'metric' is of dev, which chooses; '{words.metric}' is not")
        problems.stop()
    if words.metric:
        return words.metric
    try:
        best = first.load((1,) if first.takes_steps else ()).best
    except SelfkdError as error:
        problems.add(tree.value["arms"].value[0].where, first.arm, str(error))
        problems.stop()
        raise
    if best is None:
        problems.add(tree.where, "", "by which metric? Write metric: dev/… in the sweep, or `best` in the first recipe")
        problems.stop()
        raise RecipeError("has no metric", tree.where)
    return best.metric


def _lint(trials: Sequence[Trial], arms: Sequence[tuple[ArmWords, str, str | None]], metric: str, problems: Problems) -> None:
    """Read the recipe of every arm and combination with the first seed, and see that it measures what chooses."""
    places = {str(arm.name): where for arm, where, _ in arms}
    for trial in (one for one in trials if one.seed == trials[0].seed):
        try:
            recipe = trial.load((1,) if trial.takes_steps else ())
        except SelfkdError as error:
            problems.add(places[trial.arm], trial.arm, str(error))
            continue
        measured = [name for step in recipe.measures(1) for name in step.metrics()]
        if metric not in measured:
            text = f"does not measure {metric}.{did_you_mean(metric, measured)}"
            problems.add(places[trial.arm], trial.arm, text)


def probe_of(trial: Trial, seed: int) -> Trial:
    """Return the run that shows whether a trial's method has headroom: the untouched model under every decoding."""
    return Trial("headroom", trial.recipe, PROBE, 0, seed, tuple(word for word in trial.words if not word.startswith("gold.")))
