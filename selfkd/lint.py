"""What can be found wrong with a recipe without a model: files, code, templates, prompts, and what each step can see.

`load` has judged the words already. This reads what they point to: rewards are parsed, their doctests run and gold answers
scored in worker processes; prompts are read unless they lie on a hub. Torch is never imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl

from selfkd import checks, prompts, rewards, tables, templates
from selfkd.errors import GuardError, RewardError, SelfkdError
from selfkd.lines import LISTS, Line
from selfkd.recipe import Recipe
from selfkd.steps import Measure, Score, Step
from selfkd.types import Function

GOLD_SHARE = 0.95  # of gold answers that a reward must accept
GOLD_ROWS = 200
ABSENT = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")
DRY_PROMPTS = 8


@dataclass
class Report:
    """problems stop a run; notes do not. columns: what expressions may use after each step, by table."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: list[tuple[str, dict[str, list[str]]]] = field(default_factory=list)
    tested: dict[Path, list[str]] = field(default_factory=dict, repr=False)  # failures of the doctests of each file

    @property
    def ok(self) -> bool:
        return not self.problems

    def text(self) -> str:
        shown = [
            f"{name}\n    " + "\n    ".join(f"{table}: {', '.join(names)}" for table, names in seen.items())
            for name, seen in self.columns
        ]
        return "\n".join([*shown, *(f"note: {note}" for note in self.notes), *self.problems]) or "nothing to say"


def lint(recipe: Recipe, dry_run: bool = False, hub: bool = False) -> Report:
    """Everything that can be checked before a run. `hub` reads prompts from the network too; `dry_run` walks two rounds with a fake model."""
    report = Report(columns=columns(recipe))
    frames = _prompts(recipe, report, hub)
    _overlap(recipe, frames, report)
    for line in _lines(recipe):
        step = line.at(1)
        for reference in dict.fromkeys(step.templates()):
            report.problems += [
                f"{line.where}  {line.label}: {problem}" for problem in templates.problems(reference, recipe.folders)
            ]
        for reference in step.functions():
            _reward(reference, step, line, recipe, frames, report)
    if dry_run and report.ok:
        report.notes += _tried(recipe, report)
    return report


def columns(recipe: Recipe) -> list[tuple[str, dict[str, list[str]]]]:
    """(step, what it makes usable): the sample columns after each step that adds some, new ones only; first those always there."""
    found = [("always", {name: names for name, names in tables.columns_after(()).items() if name != "pairs"})]
    for part in LISTS:
        seen = checks.Seen()
        for line in getattr(recipe, part):
            before = tables.columns_after(seen.scores)
            checks.after(line.at(1), seen, recipe)
            after = tables.columns_after(seen.scores)
            new = {table: [name for name in names if name not in before[table]] for table, names in after.items()}
            if any(new.values()):
                found.append((f"after {line.name}", new))
    return found


def _lines(recipe: Recipe) -> Iterator[Line]:
    for part in LISTS:
        yield from getattr(recipe, part)


# ---- prompts ----


def _prompts(recipe: Recipe, report: Report, hub: bool) -> dict[str, pl.DataFrame]:
    frames = {}
    for split, source in recipe.splits().items():
        if prompts.on_hub(source) and not hub:
            report.notes.append(f"prompts.{split}: {source['hub']} lies on a hub, so its rows were not read")
            _mapping(recipe, source, split, report)
            continue
        try:
            frames[split] = prompts.read(source, recipe.folders, split)
        except SelfkdError as error:
            report.problems.append(str(error))
            continue
        repeats = prompts.duplicates(frames[split])
        if repeats:
            report.notes.append(f"prompts.{split}: {repeats} of {frames[split].height} prompts repeat an earlier one")
    return frames


def _mapping(recipe: Recipe, source: Mapping[str, Any], split: str, report: Report) -> None:
    """A mapping function can be looked up and its doctests run without a row."""
    if "map" not in source:
        return
    try:
        _sound(rewards.find(source["map"], recipe.folders), report, f"prompts.{split}")
    except SelfkdError as error:
        report.problems.append(f"prompts.{split}: {error}")


def _overlap(recipe: Recipe, frames: Mapping[str, pl.DataFrame], report: Report) -> None:
    """Train prompts that are held out too: refused, or said, as the recipe wants; shared passages are only said."""
    for split in ("dev", "test"):
        if "train" not in frames or split not in frames:
            continue
        same = prompts.overlap(frames["train"], frames[split])
        if same and recipe.overlap == "refuse":
            fix = "separate the splits, or write `overlap: drop` to take them out of train"
            report.problems.append(f"prompts.train: {len(same)} prompts stand in '{split}' too, such as {same[0]}: {fix}")
        elif same:
            report.notes.append(f"prompts.train: {len(same)} prompts that stand in '{split}' too will be left out")
        if any(prompts.described(recipe.splits()[name]).get("reasoning_gym") for name in ("train", split)):
            continue  # generated tasks share their wording with every number in it: no sign of anything
        shared = set(prompts.shared_passages(frames["train"], frames[split])) - set(same)
        if shared:
            report.notes.append(f"prompts.train: {len(shared)} prompts share 13 words in a row with '{split}'")


# ---- rewards ----


def _reward(reference: str, step: Step, line: Line, recipe: Recipe, frames: Mapping[str, pl.DataFrame], report: Report) -> None:
    """Is it there, can it be called, does it do what its doctests say, and does it accept the gold answers?"""
    at = f"{line.where}  {line.label}"
    try:
        function = replace(rewards.find(reference, recipe.folders), params=getattr(step, "params", {}))
        split = step.split if isinstance(step, Measure) else "train"
        frame = frames.get(split)
        problems = rewards.check(function, None if frame is None else prompts.columns(frame))
        report.problems += [f"{at}: {problem}" for problem in problems]
        sound = not problems and _sound(function, report, at)
        if sound and frame is not None and isinstance(step, Score | Measure):
            _gold(function, reference, frame, at, split, report)
    except SelfkdError as error:
        report.problems.append(f"{at}: {error}")


def _sound(function: Function, report: Report, at: str) -> bool:
    """Whether the examples of the file hold; failures are said once. A package that only the base install lacks is a note."""
    first = function.path not in report.tested
    failures = report.tested.setdefault(function.path, rewards.doctests(function) if first else [])
    missing = sorted({found[1] for failure in failures if (found := ABSENT.search(failure))})
    if first and missing:
        said = f"{function.path.name} needs {', '.join(missing)}, which is not installed here, so its examples were not run"
        report.notes.append(f"{said}: pip install 'selfkd[rewards]', or that package")
    elif first:
        report.problems += [f"{at}: {failure}" for failure in failures]
    return not failures


def _gold(function: Function, reference: str, frame: pl.DataFrame, at: str, split: str, report: Report) -> None:
    rows = [{**row, **_fields(row)} for row in frame.head(GOLD_ROWS).iter_rows(named=True)]
    passed, total, first = rewards.gold_check(function, rows)
    if total and passed < GOLD_SHARE * total:
        report.problems.append(
            f"{at}: {reference} accepts {passed} of {total} gold answers of '{split}' ({GOLD_SHARE:.0%} wanted). First: {first}"
        )
    elif total:
        report.notes.append(f"{reference} accepts {passed} of {total} gold answers of '{split}'")


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": templates.text_of(row["messages"]), "meta": json.loads(row["meta"] or "{}")}


# ---- a dry run ----


def _tried(recipe: Recipe, report: Report) -> list[str]:
    try:
        dry_run(recipe)
    except GuardError as error:
        return [
            f"the dry run kept nothing to train on (its stand-in answers may not be in the form that the rewards want): {error.what}"
        ]
    except SelfkdError as error:
        if isinstance(error, RewardError) and any(map(prompts.on_hub, recipe.splits().values())):
            return [f"the dry run could not score the stand-ins for prompts that lie on a hub: {error.what}"]
        report.problems.append(f"dry run: {error}")
        return []
    return ["two rounds were walked with a fake model"]


def dry_run(recipe: Recipe) -> list[dict[str, Any]]:
    """Walk two rounds in a temporary folder with a model that knows some of the answers; the records of the sealed rounds.

    A few prompts of each split; those that lie on a hub are stood in for by sums with every column that a template or reward names.
    """
    from selfkd.backend.base import Machine
    from selfkd.backend.fake import Fake
    from selfkd.loop import walk
    from selfkd.run import Run

    with TemporaryDirectory(prefix="selfkd-dry-") as folder:
        small = in_small(recipe)
        run = Run.open(small, Path(folder) / small.name, Machine(backend="fake"))
        walk(run, Fake(run.numerics, knowing(small)))
        return run.sealed()


def in_small(recipe: Recipe) -> Recipe:
    """The recipe with two rounds and a few prompts."""
    splits = {split: _few(recipe, split, source, place) for place, (split, source) in enumerate(recipe.splits().items())}
    update = {
        "prompts": recipe.prompts.model_copy(update={**splits, "take": None}),
        "rounds": min(2, recipe.rounds),
        "overlap": "drop",
    }
    return recipe.model_copy(update=update)


def _few(recipe: Recipe, split: str, source: Any, place: int) -> Any:
    if prompts.on_hub(source):
        first = 1 + 100 * place
        named = {name: f"the {name}" for name in sorted(_columns_named(recipe))}
        return [
            {**named, "prompt": f"How much is {first + at} + {at}?", "answer": str(first + 2 * at)}
            for at in range(1, DRY_PROMPTS + 1)
        ]
    described = dict(prompts.described(source))
    return {**described, "limit": min(DRY_PROMPTS, described.get("limit") or DRY_PROMPTS)}


def _columns_named(recipe: Recipe) -> set[str]:
    """Meta columns that templates (`prompt.solution`) and rewards (a parameter of that name) ask for."""
    found: set[str] = set()
    for line in _lines(recipe):
        step = line.at(1)
        for reference in step.templates():
            source = templates.load(reference, recipe.folders).source
            found |= set(re.findall(r"\bprompt\.(?:meta\.)?([A-Za-z_]\w*)", source))
        for reference in step.functions():
            node = rewards.definition(rewards.find(reference, recipe.folders))
            found |= set(rewards.required(node)) if node else set()
    return found - {"text", "answer", "messages", "meta"} - set(rewards.CONTRACT)


def knowing(recipe: Recipe) -> Any:
    """A model that finds the prompt it is asked about in the text, and knows its answer with the fake's skill."""
    from selfkd import digest

    frames = [prompts.read(source, recipe.folders, split) for split, source in recipe.splits().items()]
    known = {
        templates.text_of(row["messages"]): row["answer"] or "42" for frame in frames for row in frame.iter_rows(named=True)
    }

    def answer(messages: list[dict[str, str]], seed: int, skill: float) -> str:
        asked = " ".join(message["content"] for message in messages)
        gold = next((gold for text, gold in known.items() if text in asked), "42")
        said = gold if digest.uniform("skill", seed) < skill else f"{gold}{1 + seed % 9}"
        return f"Let me think ({seed % 97}).\n#### {said}\nAnswer: {said}"

    return answer
