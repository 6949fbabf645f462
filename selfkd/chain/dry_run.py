"""A recipe walked for two rounds in a temporary folder on a model that is a function: what lint cannot find without walking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.records import Seal
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.errors import GuardError, RewardError, SelfkdError
from selfkd.prompts import templates
from selfkd.prompts.read import on_hub, read_prompts, source_words
from selfkd.prompts.template_fields import PROMPT_FIELDS, uses
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.lint import Report, all_lines, lint
from selfkd.recipe.schema import Recipe, Take
from selfkd.rewards.contract import CONTRACT
from selfkd.rewards.find import definition, find_function, required
from selfkd.steps.bring import BringStep

DRY_PROMPTS = 8
READABLE = {"tests": ["assert f(1) == 1"]}  # columns in which a reward reads more than text (reward/code.py)
THOUGHT = "Let me think"  # how a stand-in answer begins
KEPT_NOTHING = "the dry run kept nothing to train on (its stand-in answers may not be in the form that the rewards want)"


def lint_and_walk(recipe: Recipe, environment: Sequence[str] = ()) -> Report:
    """What `lint` finds, and where that is nothing, what a walk of two rounds finds."""
    report = lint(recipe, environment=environment)
    return report + try_walk(recipe, environment) if report.ok else report


def try_walk(recipe: Recipe, environment: Sequence[str] = ()) -> Report:
    """What a walk of two rounds on a fake model finds."""
    report = Report()
    try:
        dry_run(recipe, environment)
    except GuardError as error:
        report.notes.append(f"{KEPT_NOTHING}: {error.what}")
    except SelfkdError as error:
        if isinstance(error, RewardError) and any(map(on_hub, recipe.splits().values())):
            report.notes.append(f"the dry run could not score the stand-ins for prompts that lie on a hub: {error.what}")
        else:
            report.problems.append(f"dry run: {error}")
    else:
        report.notes.append("two rounds were walked with a fake model")
    return report


def dry_run(recipe: Recipe, environment: Sequence[str] = ()) -> list[Seal]:
    """Walk two rounds in a temporary folder with a model that knows some of the answers; the records of the sealed rounds.

    No answer is cut: how long a stand-in is says nothing of a model's. A few prompts of each split; those that lie on a hub are stood in
    for by sums with every column that a template or reward names.
    """

    with TemporaryDirectory(prefix="selfkd-dry-") as folder:
        small = in_small(recipe)
        run = Run.open(small, Path(folder) / small.name, Machine(backend="fake", environment=list(environment)))
        walk(run, Fake(run.numerics, knowing(small), fits=True), run.begin())
        return run.sealed()


def in_small(recipe: Recipe) -> Recipe:
    """The recipe with two rounds and a few prompts."""
    splits = {split: _few(recipe, split, source, place) for place, (split, source) in enumerate(recipe.splits().items())}
    held = {split: splits.pop(split) for split in recipe.prompts.held}
    take = recipe.prompts.take
    few = take.model_copy(update={"n": DRY_PROMPTS // 2}) if isinstance(take, Take) and take.by else None
    update = {
        "prompts": recipe.prompts.model_copy(update={**splits, "held": held, "take": few}),
        "rounds": min(2, recipe.rounds),
        "overlap": "drop",
        **{part: tuple(map(_few_answers, getattr(recipe, part))) for part in LISTS},
    }
    return recipe.model_copy(update=update)


def _few(recipe: Recipe, split: str, source: Any, place: int) -> Any:
    if on_hub(source):
        first = 1 + 100 * place
        named = {name: READABLE.get(name, f"the {name}") for name in sorted(_columns_named(recipe))}
        return [
            {**named, "prompt": f"How much is {first + at} + {at}?", "answer": str(first + 2 * at)}
            for at in range(1, DRY_PROMPTS + 1)
        ]
    words = dict(source_words(source))
    return {**words, "limit": min(DRY_PROMPTS, words.get("limit") or DRY_PROMPTS)}


def _few_answers(line: Line) -> Line:
    """Return a line that brings a few answers where it would bring many; those on a hub are stood in for."""
    step = line.at(1)
    if not isinstance(step, BringStep):
        return line
    words = dict(source_words(step.from_))
    if on_hub(words):
        scores = dict.fromkeys(step.scores(), 1.0)
        stand_ins = [{"prompt": f"Say {at}.", "completion": str(at), **scores} for at in range(DRY_PROMPTS)]
        return replace(line, words={**line.words, "from": stand_ins, "id": None})
    few = {**words, "limit": min(DRY_PROMPTS, words.get("limit") or DRY_PROMPTS)}
    return replace(line, words={**line.words, "from": few})


def _columns_named(recipe: Recipe) -> set[str]:
    """Meta columns that templates (`prompt.solution`) and rewards (a parameter of that name) ask for."""
    found: set[str] = set()
    for line in all_lines(recipe):
        step = line.at(1)
        for reference in step.templates():
            named = uses(templates.load(reference, recipe.folders))
            found |= {use.name for use in named if use.owner in ("prompt", "meta")}
        for reference in (name for name in step.functions() if name not in (*step.losses(), *step.applied())):
            node = definition(find_function(reference, recipe.folders))
            found |= set(required(node)) if node else set()
    return found - set(PROMPT_FIELDS) - set(CONTRACT)


def knowing(recipe: Recipe) -> Any:
    """A model that finds the prompt it is asked about in the text, and knows its answer with the fake's skill."""

    frames = [read_prompts(source, recipe.folders, split) for split, source in recipe.splits().items()]
    known = {
        templates.text_of(row["messages"]): row["answer"] or "42" for frame in frames for row in frame.iter_rows(named=True)
    }

    forms = [step for line in all_lines(recipe) if (step := line.at(1)).stand_in(0)]

    def answer(messages: list[dict[str, str]], seed: int, skill: float) -> str:
        asked = " ".join(message["content"] for message in messages)
        if forms and THOUGHT in asked:  # it is shown an answer, so it is asked about that
            return "\n".join(step.stand_in(seed + at) for at, step in enumerate(forms))
        gold = next((gold for text, gold in known.items() if text in asked), "42")
        said = gold if digest.uniform("skill", seed) < skill else f"{gold}{1 + seed % 9}"
        return f"{THOUGHT} ({seed % 97}).\n#### {said}\nAnswer: {said}"

    return answer
