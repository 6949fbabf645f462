"""What can be found wrong with a recipe without a model, in two parts: a walk that runs nothing of the user's, and the rewards.

`look` reads prompts (unless they lie on a hub), parses rewards and templates, and walks the steps over empty tables. `try_rewards` runs
doctests and scores gold answers in worker processes, which takes longer. Torch is never imported.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.machine import Machine
from selfkd.core import install
from selfkd.core.hardware import usable_cores
from selfkd.core.pool import Function
from selfkd.core.yamlfile import Problems
from selfkd.errors import SelfkdError
from selfkd.prompts import templates
from selfkd.prompts.overlap import duplicates, leaks, shared_passages
from selfkd.prompts.read import gold_hint, meta_columns, on_hub, read_prompts, source_kind, source_words
from selfkd.prompts.sources import SOURCES
from selfkd.prompts.template_fields import Columns
from selfkd.recipe import brought, checks, ready, targets
from selfkd.recipe.chat import look_at_chat
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.load import read, small_form
from selfkd.recipe.losses import MEMORY_GB as LOSS_MEMORY_GB
from selfkd.recipe.losses import try_loss
from selfkd.recipe.schema import Recipe
from selfkd.rewards.check import GoldCheck, check_gold, check_parameters, run_doctests
from selfkd.rewards.contract import told
from selfkd.rewards.find import definition, find_function, required
from selfkd.rewards.pool import MEMORY_GB
from selfkd.rewards.restate import BARE
from selfkd.steps import Step

GOLD_SHARE = 0.95  # of gold answers that a reward must accept
GOLD_ROWS = 200
MOST_UNREAD = 20  # problems with gold answers that one finding names
NO_GOLD = (
    "asks for the gold answer, and the train prompts of a transductive recipe have none: "
    "score by what needs none, such as reward/vote.py:majority (measure steps do have the answers)"
)
ABSENT = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")

Frames = Mapping[str, pl.DataFrame]
Tell = Callable[[str], None]


@dataclass
class Report:
    """problems stop a run; notes do not. columns: what expressions may use after each step, by table."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: list[tuple[str, dict[str, list[str]]]] = field(default_factory=list)

    def __add__(self, more: Report) -> Report:
        return Report([*self.problems, *more.problems], [*self.notes, *more.notes], [*self.columns, *more.columns])

    @property
    def ok(self) -> bool:
        return not self.problems

    def text(self) -> str:
        shown = [
            f"{name}\n    " + "\n    ".join(f"{table}: {', '.join(names)}" for table, names in seen.items() if names)
            for name, seen in self.columns
        ]
        head = ["What expressions (where, by, chosen, …) may name:"] if shown else []
        return "\n".join([*head, *shown, *(f"note: {note}" for note in self.notes), *self.problems])


def lint(recipe: Recipe | str | Path, hub: bool = False, environment: Sequence[str] = ()) -> Report:
    """Check all that can be checked before a run without walking it; `hub` reads prompts from the network too.

    `recipe` may be the name or path of a recipe file; RecipeError then names what is wrong with its fields. `environment`
    names variables that rewards may see although they look like secrets.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read(str(recipe))
    doctests = Doctests(recipe, environment)
    found, frames = look(recipe, hub)
    return found + try_rewards(recipe, frames, doctests)


def look(recipe: Recipe, hub: bool = False, machine: Machine | None = None) -> tuple[Report, Frames]:
    """Return what is found without running anything of the user's but `map` and prompt functions, and the prompts by split.

    `machine` is the one that the recipe is to run on, where one is named.
    """
    report, problems = Report(), Problems()
    ready.add_problems(recipe, machine, problems)
    if missing := ready.missing_model(recipe):
        report.notes.append(f"model: {missing}")
    if lacking := targets.lacking(recipe):
        report.notes.append(f"{lacking[0]}  {lacking[1]}: {lacking[2]}")
    frames = _prompts(recipe, report, hub)
    _overlap(recipe, frames, report)
    report.columns = checks.meaning(recipe, problems, {split: Columns.of(frame) for split, frame in frames.items()})
    if small := small_form(recipe):
        checks.meaning(small, problems)
    report.problems += problems.ordered()
    report.notes += problems.doubts
    wrong, said = brought.look(recipe, frames, hub)
    report.problems, report.notes = [*report.problems, *wrong], [*report.notes, *said]
    spoken = look_at_chat(recipe, frames)
    report.problems, report.notes = [*report.problems, *spoken.problems], [*report.notes, *spoken.notes]
    return report, frames


class Doctests:
    """The examples of all rewards and mapping functions, run side by side from now on.

    Each file has a worker that mostly waits for its imports: begin before `look`, which then costs no time of its own.
    """

    def __init__(self, recipe: Recipe, environment: Sequence[str] = ()) -> None:
        self.environment = tuple(environment)
        functions: dict[Path, Function] = {}
        memory: dict[Path, float] = {}
        named = [name for line in all_lines(recipe) for name in line.at(1).functions()]
        losses = {name for line in all_lines(recipe) for name in line.at(1).losses()}
        for reference, in_place in (*((name, True) for _, name in _maps(recipe)), *((name, False) for name in named)):
            with suppress(SelfkdError):  # `look` says what is wrong with it
                found = find_function(reference, recipe.folders)
                functions.setdefault(found.path, replace(found, in_place=in_place, environment=self.environment))
                memory |= {found.path: LOSS_MEMORY_GB} if reference in losses else {}
        threads = ThreadPoolExecutor(usable_cores())
        self._failures = {
            path: threads.submit(run_doctests, one, memory_gb=memory.get(path, MEMORY_GB))
            for path, one in reversed(functions.items())
        }  # rewards import most
        threads.shutdown(wait=False)

    def failures(self, file: Path) -> list[str]:
        return self._failures[file].result()


def try_rewards(recipe: Recipe, frames: Frames, doctests: Doctests, tell: Tell = lambda _: None) -> Report:
    """Return what the doctests of rewards and mapping functions say, and whether the rewards accept the gold answers."""
    trial, tried = _Trial(recipe, frames, doctests), []
    for split, reference in _maps(recipe):
        tell(f"trying {reference}")
        trial.mapping(reference, split)
    for line in all_lines(recipe):
        step = line.at(1)
        for reference in step.functions():
            what = (reference, getattr(step, "params", {}), step.scored_split(), getattr(step, "rows", None))
            if what not in tried:
                tell(f"trying {reference}")
                try_it = (
                    trial.loss if reference in step.losses() else trial.table if reference in step.applied() else trial.reward
                )
                try_it(reference, step, line)
            tried.append(what)
    return trial.report


def _maps(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (split, mapping function) of each source on a hub, which runs where it lies; that of a file has just run."""
    for split, source in recipe.splits().items():
        if on_hub(source) and "map" in source:
            yield split, source["map"]


def all_lines(recipe: Recipe) -> Iterator[Line]:
    for part in LISTS:
        yield from getattr(recipe, part)


# ---- prompts ----


def _prompts(recipe: Recipe, report: Report, hub: bool) -> dict[str, pl.DataFrame]:
    frames = {}
    for split, source in recipe.splits().items():
        if on_hub(source) and not hub:
            report.notes.append(f"prompts.{split}: {source['hub']} lies on a hub, so its rows were not read")
            continue
        try:
            frames[split] = read_prompts(source, recipe.folders, split)
        except SelfkdError as error:
            at = next(
                (place for name in (f"prompts.{split}", "prompts.held", "prompts") if (place := recipe.places.get(name))), ""
            )
            report.problems.append(f"{at}  prompts.{split}: {error}".lstrip())
            continue
        if hint := gold_hint(frames[split]):
            report.notes.append(f"prompts.{split}: {hint}")
        repeats = duplicates(frames[split])
        if repeats:
            report.notes.append(f"prompts.{split}: {repeats} of {frames[split].height} prompts repeat an earlier one")
    return frames


def _overlap(recipe: Recipe, frames: Frames, report: Report) -> None:
    """Prompts that another split holds out too: refused, or said, as the recipe wants; shared passages are only said."""
    if recipe.transductive:
        _measured_prompts(frames, report)
    shared = {(split, held_out): same for split, held_out, same in leaks(frames, recipe.transductive)}
    for (split, held_out), same in shared.items():
        if len(same) == frames[split].height:
            report.problems.append(f"prompts.{split}: every prompt stands in '{held_out}' too: separate the splits")
        elif recipe.overlap == "refuse":
            fix = f"separate the splits, or write `overlap: drop` to take them out of {split}"
            report.problems.append(f"prompts.{split}: {len(same)} prompts stand in '{held_out}' too, such as {same[0]}: {fix}")
        else:
            report.notes.append(f"prompts.{split}: {len(same)} prompts that stand in '{held_out}' too will be left out")
    for split in (name for name in frames if name != "train"):
        if "train" in frames and not recipe.transductive:
            _passages(recipe, frames, split, set(shared.get(("train", split), ())), report)


def _measured_prompts(frames: Frames, report: Report) -> None:
    """Say of a recipe that learns from prompts which it measures how many those are."""
    for split, held_out, same in leaks(frames):
        if split == "train":
            said = f"{held_out} tells how well these very prompts are answered, not others"
            report.notes.append(f"prompts.train: {len(same)} prompts are those of '{held_out}' (transductive): {said}")


def _passages(recipe: Recipe, frames: Frames, split: str, same: set[str], report: Report) -> None:
    if any(source_words(recipe.splits()[name]).get("reasoning_gym") for name in ("train", split)):
        return  # generated tasks share their wording with every number in it: no sign of anything
    shared = set(shared_passages(frames["train"], frames[split])) - same
    if shared:
        report.notes.append(f"prompts.train: {len(shared)} prompts share 13 words in a row with '{split}'")


# ---- rewards ----


@dataclass
class _Trial:
    """What is said of one recipe's rewards; the failures of a file's doctests are said once."""

    recipe: Recipe
    frames: Frames
    doctests: Doctests
    report: Report = field(default_factory=Report)
    told: set[Path] = field(default_factory=set)

    def mapping(self, reference: str, split: str) -> None:
        """Can a mapping function of a hub's data set be found, and do its doctests hold? No row is read for that."""
        try:
            self.sound(find_function(reference, self.recipe.folders), f"prompts.{split}")
        except SelfkdError as error:
            self.report.problems.append(f"prompts.{split}: {error}")

    def reward(self, reference: str, step: Step, line: Line) -> None:
        """Does it do what its doctests say, and does it accept the gold answers? Whether it is there, and fits, `look` has said."""
        at = f"{line.where}  {line.label}"
        try:
            found = find_function(reference, self.recipe.folders)
        except SelfkdError:
            return
        function = replace(found, params=getattr(step, "params", {}), environment=self.doctests.environment)
        split = step.scored_split()
        frame = self.frames.get(split or "train")
        try:
            problems = check_parameters(function, None if frame is None else meta_columns(frame))
            node = definition(function)
            if split == "train" and self.recipe.transductive and node and "answer" in required(node):
                self.report.problems.append(f"{at}: {reference} {NO_GOLD}")
            if problems and not node:  # a worker had to load it, which `look` does not
                self.report.problems += [f"{at}: {problem}" for problem in problems]
            if not problems and self.sound(function, at) and split and frame is not None:
                _gold(function, reference, frame, at, split, self.report, _Bound.of(step, self.recipe))
        except SelfkdError as error:
            self.report.problems.append(f"{at}: {error}")

    def table(self, reference: str, step: Step, line: Line) -> None:
        """Does a function of tables do what its doctests say? What it takes, `look` has said."""
        with suppress(SelfkdError):
            found = find_function(reference, self.recipe.folders)
            self.sound(replace(found, environment=self.doctests.environment), f"{line.where}  {line.label}")

    def loss(self, reference: str, step: Step, line: Line) -> None:
        """Does a loss do what its doctests say, and is it row-wise? Without torch neither can be tried, which is a note."""
        at = f"{line.where}  {line.label}"
        with suppress(SelfkdError):  # `look` has said it
            found = find_function(reference, self.recipe.folders)
            function = replace(found, params=getattr(step, "params", {}), environment=self.doctests.environment)
            try:
                problems, notes = try_loss(function, step) if self.sound(function, at) else ([], [])
            except SelfkdError as error:
                missing = ABSENT.search(str(error))
                notes = (
                    [f"{found.path.name} needs {missing[1]}, which is not installed here, so it was not tried"]
                    if missing
                    else []
                )
                problems = [] if missing else [str(error)]
            self.report.problems += [f"{at}: {problem}" for problem in problems]
            self.report.notes += notes

    def sound(self, function: Function, at: str) -> bool:
        """Whether the examples of the file hold; failures are said once. A package that only the base install lacks is a note."""
        first = function.path not in self.told
        self.told.add(function.path)
        failures = self.doctests.failures(function.path)
        missing = sorted({found[1] for failure in failures if (found := ABSENT.search(failure))})
        if first and missing:
            said = f"{function.path.name} needs {', '.join(missing)}, which is not installed here, so its examples were not run"
            self.report.notes.append(f"{said}: {install.extra('rewards')}, or that package")
        elif first:
            self.report.problems += [f"{at}: {failure}" for failure in failures]
        return not failures


def _gold(function: Function, reference: str, frame: pl.DataFrame, at: str, split: str, report: Report, bound: _Bound) -> None:
    rows = [{**row, **_fields(row)} for row in frame.head(GOLD_ROWS).iter_rows(named=True)]
    found = check_gold(function, rows)
    if not found.total:
        return
    counted = f"{reference} accepts {found.passed} of {found.total} gold answers of '{split}'"
    unread = bound.unread(found, split, function.name)
    if unread and bound.exceeded(len(found.unread), frame.head(GOLD_ROWS).height):
        report.problems.append(f"{at}: {counted}. {unread}\n    {bound.fix(found)}")
    elif found.passed < GOLD_SHARE * found.total:
        report.problems.append(f"{at}: {counted} ({GOLD_SHARE:.0%} wanted). First: {found.failure}")
    else:
        report.notes.append(f"{counted}. {unread}" if unread else counted)
    if found.forms == (BARE,):
        report.notes.append(f"{reference} gives a gold answer of '{split}' its full mark only where it is the whole completion")
    if found.uneven:
        report.notes.append(f"{reference} accepts most gold answers of '{split}' in this form, but not {found.uneven}")
    if found.accepted > found.near / 2:
        said = f"accepts {found.accepted} of {found.near} answers that are nearly right, such as {found.example}"
        report.problems.append(f"{at}: {reference} {said}: it must tell them apart")
    elif found.accepted:
        report.notes.append(f"{reference} accepts {found.accepted} of {found.near} wrong answers, such as {found.example}")


@dataclass(frozen=True)
class _Bound:
    """How many samples a step may leave unscored, held against gold answers that no completion can be scored by."""

    share: float
    one_may: bool
    recipe: Recipe

    @classmethod
    def of(cls, step: Step, recipe: Recipe) -> _Bound:
        share = getattr(step, "max_failed", 1.0)
        return cls(share, share > 0 and getattr(step, "n", 0) == 1, recipe)  # one answer per prompt: one may always fail

    def exceeded(self, unread: int, total: int) -> bool:
        return unread > self.share * total and not (self.one_may and unread == 1 < total)

    def fix(self, found: GoldCheck) -> str:
        if len(_by_problem(found)) == 1 < len(found.unread):  # whatever the answer is
            return "A run would stop at them: mend the reward first."
        return "A run would stop at them, and it keeps its prompts: mend the gold answers or the reward first, or raise max_failed."

    def unread(self, found: GoldCheck, split: str, name: str) -> str:
        """Return what the reward fails with on gold answers, each problem once, with an example; "" where there is none."""
        if not found.unread:
            return ""
        places, problems = _places(self.recipe, split), _by_problem(found)
        lines = [
            f"{places[place] if place < len(places) else f'prompt {place + 1}'}  answer {answer!r}: {told(name, why)}"
            + (f" (so it is for {count} answers)" if count > 1 else "")
            for (place, answer, why), count in problems[:MOST_UNREAD]
        ]
        more = len(problems) - MOST_UNREAD
        lines += [f"and {more} more"] if more > 0 else []
        raised = all(getattr(why, "raised", False) for _, _, why in found.unread)
        said = "Its code raised on" if raised else "It cannot read"
        return "\n    ".join([f"{said} {len(found.unread)} of them (max_failed is {self.share:.0%}):", *lines])


def _by_problem(found: GoldCheck) -> list[tuple[tuple[int, str, str], int]]:
    """Return the first answer of each distinct problem that a reward has with gold answers, and how many have it."""
    counts = Counter((why, getattr(why, "at", "")) for _, _, why in found.unread)
    first = {(why, getattr(why, "at", "")): (place, answer, why) for place, answer, why in reversed(found.unread)}
    return [(first[key], count) for key, count in counts.items()]


def _places(recipe: Recipe, split: str) -> list[str]:
    """Return where each prompt of a split was written; [] where order or number is not that of the source, or it lies on a hub."""
    words = source_words(recipe.splits()[split])
    if on_hub(words) or "map" in words or "shuffle" in words:
        return []
    rows = SOURCES[source_kind(words)].read(words, recipe.folders, split)
    return [raw.where for raw in islice(rows, min(GOLD_ROWS, words.get("limit") or GOLD_ROWS))]


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": templates.text_of(row["messages"]), "meta": json.loads(row["meta"] or "{}")}
