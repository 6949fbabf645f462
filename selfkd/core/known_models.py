"""Finding the model that `role@when` names at one point of a chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Model
from selfkd.errors import ChainError

Models = Mapping[str, Model]


@dataclass(frozen=True)
class KnownModels:
    """The models of round `index`: `start` entered it, `heads` are what each sealed round left, `best` is the number of the best one.

    `base` reads what round 0 loaded.
    """

    index: int
    start: Models
    heads: Sequence[Callable[[], Models]]
    best: int
    base: Callable[[], Models]

    def find(self, reference: ModelRef, now: Models, where: str) -> Model:
        """Return the model; `now` are the newest ones. ChainError where there is none."""
        models = self._at(reference, now, where)
        if reference.role not in models:
            roles = "Roles: " + (", ".join(sorted(models)) or "none yet")
            raise ChainError(f"there is no model '{reference}' at this point", where, roles)
        return models[reference.role]

    def _at(self, reference: ModelRef, now: Models, where: str) -> Models:
        if reference.when == "now":
            return now
        if reference.when == "start" or (reference.when == "warm" and self.index == 0):
            return self.start or now
        if reference.when == "base":
            return self.base()
        named = {"warm": 0, "best": self.best}
        index = named.get(reference.when, reference.round)
        if index is None or index >= len(self.heads):
            raise ChainError(f"round {index} is not sealed yet", where)
        return self.heads[index]()
