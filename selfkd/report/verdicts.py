"""Whether each round was kept or rolled back as the recipe then in force says of its metrics, and left the head that follows: judged again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from selfkd.chain import steering
from selfkd.chain.records import Amendment, Commit, Info, ModelEntry, Seal
from selfkd.errors import SelfkdError
from selfkd.recipe.schema import Recipe
from selfkd.report.lost import readable


class Verdicts:
    """The recipes of a run in the order in which they came into force, and the seals so far."""

    def __init__(self, info: Info, amendments: Sequence[Amendment], folder: Path) -> None:
        self.since = [0, *(one.sealed for one in amendments)]
        self.recipes = [readable(words, folder) for words in (info.recipe, *(one.recipe for one in amendments))]
        self.sealed: list[Seal] = []

    def problems(self, seal: Seal, commits: Sequence[Commit]) -> Iterator[str]:
        """Yield what is wrong with the verdict of the next seal, and with the models that it says the round left."""
        before, found = self.sealed, list(self._judged(seal))
        self.sealed = [*before, seal]
        yield from found
        kept = [one.models for one in before if one.accepted]
        head: dict[str, ModelEntry] = dict(kept[-1]) if kept else {}
        for commit in commits if seal.accepted else ():
            head |= commit.models
        for role in sorted(role for role in head.keys() | seal.models.keys() if head.get(role) != seal.models.get(role)):
            verdict = "was kept" if seal.accepted else "was rolled back"
            yield f"its '{role}' is not the model that the round leaves, which {verdict}"

    def _judged(self, seal: Seal) -> Iterator[str]:
        """Compare the verdict with those of the recipes that may have been in force; one that this version cannot read judges nothing."""
        recipes = self._in_force(seal.round)
        if None in recipes:
            return
        said: list[str] = []
        for recipe in recipes:
            wrong = self._wrong(seal, recipe) if recipe else ""
            if not wrong:
                return
            said.append(wrong)
        yield said[-1]

    def _in_force(self, index: int) -> list[Recipe | None]:
        """Return the recipe in force when a round was sealed; of amendments that do not say when they were written, all that may have been."""
        newest = max(at for at, since in enumerate(self.since) if since <= index)
        return [self.recipes[at] for at in range(newest + 1) if at == newest or self.since[newest] == 0]

    def _wrong(self, seal: Seal, recipe: Recipe) -> str:
        """Return in what the verdict of a seal is not that of a recipe, or ''."""
        try:
            accepted, why = steering.verdict(recipe.keep_if, recipe.best, self.sealed, seal.metrics, seal.measures)
        except SelfkdError as error:
            return f"keep_if cannot be judged again: {error.what}"
        if accepted == seal.accepted:
            return ""
        if accepted:
            said = f"of its metrics keep_if holds: {recipe.keep_if}" if recipe.keep_if else "the recipe has no keep_if"
            return f"the round was rolled back, and {said}"
        return f"the round was kept, and by its metrics it is to be rolled back: {why}"
