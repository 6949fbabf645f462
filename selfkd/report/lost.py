"""Records that no other record names: what was made says that they were there. Each function yields what is missing, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfkd.chain.numerics import computed
from selfkd.chain.paths import Paths
from selfkd.chain.records import Amendment, Commit, Computer, Info
from selfkd.core import digest
from selfkd.errors import SelfkdError
from selfkd.recipe.load import frozen
from selfkd.recipe.schema import Recipe

Made = Mapping[str, Commit]  # {name of its file: what a step made}, of the whole run


def numerics(paths: Paths, info: Info, made: Made) -> Iterator[str]:
    if info.numerics_fixed or paths.numerics.exists():
        return
    for name in [name for name, commit in made.items() if computed(commit)][:1]:
        yield f"numerics.json is missing, but {name} was made with it"


def facts(found: Mapping[Path, Computer | None], made: Made) -> Iterator[str]:
    """Name each record of what computed that a step names and that is gone; a damaged one is named already."""
    known = {(computer.kind, computer.digest) for computer in found.values() if computer}
    damaged = {path.stem.rpartition("-")[0] for path, computer in found.items() if computer is None}
    for name, commit in made.items():
        for kind, makers in commit.notes.get("makers", {}).items():
            for maker in makers if kind not in damaged else ():
                if (kind, maker) not in known:
                    known.add((kind, maker))
                    yield f"facts/{kind}-….json is missing: what made {name} as '{kind}' ({maker[:12]})"


def amendments(paths: Paths, info: Info, found: Mapping[Path, Amendment | None], made: Made) -> Iterator[str]:
    """Name amendments that are gone: by a gap in their numbers, else by rounds, code or words that no recipe here has."""
    numbers = [int(path.stem) for path in found]
    for number in sorted(set(range(1, max(numbers, default=0))) - set(numbers)):
        gone = paths.relative(paths.amendment(number))
        yield f"{gone} is missing, but {paths.relative(max(found))} is there"
    known = [one for one in found.values() if one]
    if len(known) < len(found) or len(numbers) < max(numbers, default=0):
        return
    yield from _rounds(paths, known)
    recipes = _Recipes(info, known, paths.folder)
    for name, commit in made.items():
        if why := recipes.problem(commit):
            yield f"an amendment is missing: {name} {why}"
            return


def _rounds(paths: Paths, found: Sequence[Amendment]) -> Iterator[str]:
    """An amendment says how many rounds were sealed when it was written; they cannot have become fewer."""
    sealed = sum(names.seal.is_file() for names in paths.rounds())
    for number, amendment in enumerate(found, 1):
        if amendment.sealed > sealed:
            where = paths.relative(paths.amendment(number))
            yield f"{where} was written when {amendment.sealed} rounds were sealed, and {sealed} are here"
            return


class _Recipes:
    """The recipes and the code that a run was ever told to go by: those of run.json and of each amendment."""

    def __init__(self, info: Info, found: Sequence[Amendment], folder: Path) -> None:
        told: list[Info | Amendment] = [info, *found]
        self.code = {(name, entry.digest) for one in told for name, entry in one.code.items()}
        self.code |= {(name, entry.digest) for name, entry in info.data.items()}
        self.rounds = max(int(one.recipe["rounds"]) for one in told)
        self.recipes = [readable(one.recipe, folder) for one in told]

    def problem(self, commit: Commit) -> str:
        """Return in what a step fits none of them, or ''."""
        if commit.round > self.rounds:
            return f"is of round {commit.round}, and no recipe here has more than {self.rounds}"
        for name, made_with in commit.code.items():
            if (name, made_with) not in self.code:
                return f"was made with a version of {name} that no recipe here has"
        if commit.verb == "load" or None in self.recipes:
            return ""
        if any(_has(recipe, commit) for recipe in self.recipes if recipe):
            return ""
        return "was made with words that no recipe here has"


def readable(words: Mapping[str, Any], folder: Path) -> Recipe | None:
    """Return a recipe; None where this version does not read it: then no step is judged by its words."""
    try:
        return frozen(dict(words), folder)
    except SelfkdError:
        return None


def _has(recipe: Recipe, commit: Commit) -> bool:
    """Whether a recipe has this step in this round. A field that one of the two does not know is passed over."""
    steps = [*recipe.steps_of(commit.round), *recipe.closing_steps(commit.round)]
    told = [digest.as_json(step.identity()) for step in steps if step.name == commit.step and step.verb == commit.verb]
    return any(all(one[name] == value for name, value in commit.identity.items() if name in one) for one in told)
