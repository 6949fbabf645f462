"""What a recipe is at a glance: what it needs, what it trains from what against what and on which rounds' rows, and how close to its paper."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfkd.core.files import builtin_folder
from selfkd.errors import SelfkdError
from selfkd.prompts.read import on_hub
from selfkd.recipe.load import read
from selfkd.recipe.schema import Recipe
from selfkd.steps.replay import ReplayStep
from selfkd.steps.step import Step
from selfkd.steps.train import TrainStep


@dataclass(frozen=True)
class Card:
    """A recipe as `selfkd recipes` shows it. What cannot be read says so in `title`, and the rest is empty."""

    name: str
    title: str
    needs: str = ""
    loss: str = ""
    start: str = ""
    reference: str = ""
    data: str = ""
    fidelity: str = ""
    tried: str = ""

    def sentence(self) -> str:
        """Return all but name and title in one line."""
        if not self.loss:
            return ""
        trained = f"{self.loss} from {self.start}" + (f" against {self.reference}" if self.reference != "none" else "")
        return "; ".join(filter(None, (f"needs {self.needs}", f"{trained} on rows of {self.data}", self.fidelity, self.tried)))


def card(name: str, path: Path) -> Card:
    """Return the card of the recipe file at `path`, which is run by `name`."""
    try:
        recipe = read(str(path))
    except SelfkdError as error:
        return Card(name, f"cannot be read: {error.what.splitlines()[0]}")
    steps = [line.at(1) for line in (*recipe.before, *recipe.steps, *recipe.after)]
    trained = [step for line in recipe.steps if isinstance(step := line.at(2), TrainStep)]
    return Card(
        name,
        title(path),
        ", ".join(dict.fromkeys(_needs(recipe, steps))) or "prompts alone",
        _each(step.loss for step in trained),
        _each(step.from_ for step in trained),
        _each(step.reference or ("start" if step.kind.reference else "none") for step in trained),
        _window(steps),
        fidelity(path),
        tried(path),
    )


def tried(path: Path) -> str:
    """Return how far a shipped recipe was tried, as standing.json beside it says: compared with others in a sweep, or only walked.

    Of a recipe that is not shipped nobody knows, whatever its name.
    """
    if path.resolve().parent != (builtin_folder() / "recipes").resolve():
        return ""
    known = json.loads((path.parent / "standing.json").read_text("utf-8"))
    if path.stem in known["compared"]:
        return "compared"
    return "only walked" if path.stem in known["walked"] else "not tried"


def title(path: Path) -> str:
    """Return the first line of a recipe, a comment."""
    first = path.read_text("utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def fidelity(path: Path) -> str:
    """Return how close the head of a recipe says it is to its paper: what stands before the first colon or full stop."""
    found = re.search(r"^# fidelity: (.*?)[:.;](?:\s|$)", path.read_text("utf-8"), re.MULTILINE)
    return found[1] if found else ""


def _needs(recipe: Recipe, steps: list[Step]) -> Iterator[str]:
    """Yield what a user must have beside the model: who says what is right, and whether the net."""
    own = [step for step in steps if not step.outside]
    if any(step.verb == "gold" for step in own):
        yield "gold answers"
    if any(step.functions() for step in own if step.verb == "score"):
        yield "a reward"
    if any(step.scorers() for step in own):
        yield "a model that scores"
    if any(step.verb == "judge" for step in own):
        yield "a judge"
    if any(map(on_hub, recipe.splits().values())):
        yield "the hub"


def _window(steps: list[Step]) -> str:
    """Return which rounds' samples a round trains on."""
    replays = [step.rounds for step in steps if isinstance(step, ReplayStep)]
    known = [count for count in replays if count is not None]
    if len(known) < len(replays):
        return "all rounds"
    return f"this round and {max(known)} before" if known else "this round"


def _each(words: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(words)) or "none"
