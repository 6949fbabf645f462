"""What an attempt trusts is hashed when it is first used: weights, tables of earlier rounds, prompts and code.

A damaged file trains silently to other results. Knows no step and no round; each file is hashed once per opened run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfkd.chain import rounded
from selfkd.core import digest, storage
from selfkd.core.pool import Model
from selfkd.errors import ChainError

MOST_NAMED = 3


@dataclass(frozen=True)
class Trust:
    """What of the run in `folder` is known to be as it was committed."""

    folder: Path
    _known: set[tuple[str, str]] = field(default_factory=set)

    def weights(self, model: Model) -> Model:
        """Return the model with its path absolute; ChainError where its folder, or that of its base, does not hold what was committed.

        Of one that is kept in bf16, the copy: an engine loads the same bytes of it.
        """
        lies = rounded.located(self.folder, model)
        if (lies.path, model.digest) not in self._known:
            self._hash(model)
            self._known.add((lies.path, model.digest))
        if model.base is not None:
            named = digest.base_of(self.folder / model.path)
            self.weights(Model(model.role, model.base, named or "no adapter"))
        return lies.at(self.folder)

    def masters(self, model: Model) -> Model:
        """Return the model as `weights` does, for a training; ChainError where only a copy in bf16 is left of it."""
        rounded.refuse_rounded(self.folder, model)
        return self.weights(model)

    def know(self, model: Model) -> None:
        """Take a model as it is: this process hashed it when it was committed."""
        self._known.add((model.path, model.digest))

    def files(self, recorded: Mapping[str, Any], under: str = "") -> None:
        """ChainError where a recorded file (of those whose name begins with `under`) is missing or was changed."""
        wanted = {
            name: entry
            for name, entry in recorded.items()
            if name.startswith(under) and (name, entry["sha256"]) not in self._known
        }
        if wrong := storage.damaged(wanted, self.folder, rehash=True):
            fix = f"Restore it from a copy. All damage: selfkd verify {self.folder}"
            raise ChainError("; ".join(wrong[:MOST_NAMED]), str(self.folder), fix)
        self._known.update((name, entry["sha256"]) for name, entry in wanted.items())

    def _hash(self, model: Model) -> None:
        copy = rounded.copy_of(self.folder, model.path)
        lies, expected = (copy.path, copy.digest) if copy else (model.path, model.digest)
        try:
            same = digest.holds(self.folder / lies, expected)
        except (OSError, ValueError, KeyError) as error:
            what = f"these weights cannot be read: {error}"
        else:
            if same:
                return
            what = "these weights were changed after they were committed"
        fix = "Restore it from a copy, or go on from an earlier round in a new run."
        raise ChainError(what, f"{self.folder.name}/{lies}", fix)
