"""Random recipes: each is refused by lint, or walks to one digest however often it is killed; random values never end in a traceback."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import grammar
import pytest
import yaml
from chains import Faults, Killed, end
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine, read_machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.errors import GuardError, RecipeError, RewardError, SelfkdError, UsageError
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load
from selfkd.recipe.schema import Recipe
from selfkd.report.verify import verify
from selfkd.steps import VERBS

CI = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
NIGHTLY = settings(CI, max_examples=2000, derandomize=False, phases=[Phase.generate, Phase.shrink])
PLACE = re.compile(r"r\.yaml:\d+|prompts\.\w+|jsonl:\d+|machine\.yaml|marks\.py:\d+")
MACHINE = Machine(backend="fake", threads=1)


def go(recipe: Recipe, folder: Path) -> str:
    """Walk the recipe to its end; return its digest, or what stopped it: too few rows or scores are the recipe's own doing."""
    run = Run.open(recipe, folder, MACHINE)
    try:
        walk(run, Fake(run.numerics), run.begin())
    except (GuardError, RewardError) as error:
        return f"stopped: {error.what.splitlines()[0]}"
    return end(run)


def checked(words: dict[str, Any], folder: Path) -> Recipe | None:
    """Return the recipe if nothing is wrong with it; else every problem names a place."""
    (folder / "r.yaml").write_text(yaml.safe_dump(words, sort_keys=False), errors="surrogatepass")
    try:
        recipe = load(str(folder / "r.yaml"))
        problems = lint(recipe).problems
    except (RecipeError, UsageError) as error:
        assert PLACE.search(str(error)), f"no place in: {error}"
        return None
    assert all(PLACE.search(problem) for problem in problems), problems
    return None if problems else recipe


def holds(words: dict[str, Any], moment: int) -> None:
    """Refused, or: killed at a moment and continued, it ends where it ends undisturbed, and verify finds nothing."""
    folder = Path(tempfile.mkdtemp())
    try:
        grammar.write_files(folder)
        recipe = checked(words, folder)
        event("refused" if recipe is None else "walked")
        if recipe is None:
            return
        with Faults() as counted:
            whole = go(recipe, folder / "whole")
        with Faults(moment % counted.count), pytest.raises(Killed):
            go(recipe, folder / "killed")
        assert go(recipe, folder / "killed") == whole
        if not whole.startswith("stopped"):
            assert verify(folder / "killed").problems == []
    finally:
        shutil.rmtree(folder)


@CI
@given(grammar.recipes(), st.integers(0, 10**6))
def test_a_random_recipe_is_refused_with_a_place_or_ends_on_one_digest_wherever_it_is_killed(words, moment):
    holds(words, moment)


@pytest.mark.nightly
@NIGHTLY
@given(grammar.recipes(), st.integers(0, 10**6))
def test_two_thousand_random_recipes_are_refused_or_end_on_one_digest(words, moment):
    holds(words, moment)


BASE: dict[str, Any] = {
    "model": "fake",
    "prompts": {"train": "train.jsonl", "dev": "dev.jsonl"},
    "steps": [
        {"gold": {}},
        {"sample": {"n": 2}},
        {"score": {"reward": "reward/number.py:last_number"}},
        {"select": {"where": "tokens > 0"}},
        {"build": {"kind": "sft"}},
        {"train": {"loss": "sft"}},
        {"measure": {"reward": "reward/number.py:last_number"}},
    ],
}
FIELDS = [
    *(("recipe", name) for name in Recipe.model_fields if name not in ("source", "folders", "text")),
    *((verb, field.alias or name) for verb, step in VERBS.items() for name, field in step.model_fields.items()),
    *(("prompts", name) for name in ("train", "dev", "test", "take")),
]


def with_value(place: str, name: str, value: Any) -> dict[str, Any]:
    """Return the recipe with `value` in one field; a verb that it lacks goes to the front."""
    if place == "recipe":
        return {**BASE, name: value}
    if place == "prompts":
        return {**BASE, "prompts": {**BASE["prompts"], name: value}}
    steps = BASE["steps"] if any(place in step for step in BASE["steps"]) else [{place: {}}, *BASE["steps"]]
    return {
        **BASE,
        "steps": [{verb: {**words, name: value} if verb == place else words for verb, words in step.items()} for step in steps],
    }


@CI
@given(st.sampled_from(FIELDS), grammar.ANYTHING, st.integers(0, 10**6))
def test_any_value_in_any_field_of_a_recipe_runs_or_is_a_message_with_a_place(field, value, moment):
    holds(with_value(*field, value), moment)


@pytest.mark.nightly
@NIGHTLY
@given(st.sampled_from(FIELDS), grammar.ANYTHING, st.integers(0, 10**6))
def test_two_thousand_values_in_fields_of_a_recipe_run_or_are_messages_with_a_place(field, value, moment):
    holds(with_value(*field, value), moment)


@CI
@given(st.dictionaries(st.sampled_from([one.name for one in fields(Machine)]), grammar.ANYTHING, min_size=1, max_size=2))
def test_any_value_in_any_field_of_a_machine_file_is_taken_or_is_a_message_with_a_place(words):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "machine.yaml"
        path.write_text(yaml.safe_dump(words), errors="surrogatepass")
        try:
            read_machine(path)
        except SelfkdError as error:
            assert PLACE.search(str(error)), f"no place in: {error}"
