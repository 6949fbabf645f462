"""Where a run stands: the recipe and code in force, what is sealed, and in what another recipe differs from that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from selfkd.chain import commit, records, steering
from selfkd.chain.freeze import code_digests
from selfkd.chain.paths import Paths
from selfkd.chain.records import Amendment, Info, Seal
from selfkd.core import digest, storage
from selfkd.errors import ChainError
from selfkd.recipe.load import frozen
from selfkd.recipe.schema import Recipe

FREE = ("name", "rounds")  # of the folder, which was given; and what needs no amendment


def in_force(paths: Paths, info: Info) -> Info | Amendment:
    """Return what holds the recipe and code in force: the newest amendment, or the run as created."""
    return _newest(info, amendments(paths))


def _newest(info: Info, found: Sequence[Amendment]) -> Info | Amendment:
    return found[-1] if found else info


def amendments(paths: Paths) -> list[Amendment]:
    """Return the amendments of a run, oldest first."""
    return [records.read(path, Amendment) for path in paths.amendments()]


@dataclass(frozen=True)
class Change:
    """What differs from the recipe and code in force: {dotted field: sentence}, names of code, and ["rounds"] where they do."""

    words: Mapping[str, str]
    edited: Sequence[str]
    rounds: Sequence[str]

    def __bool__(self) -> bool:
        return bool(self.words or self.edited or self.rounds)

    def sentences(self) -> list[str]:
        return [*self.words.values(), *(f"{name} changed" for name in self.edited)]


class Standing:
    """Its recipe and code in force, and what is sealed."""

    def __init__(self, paths: Paths, info: Info) -> None:
        self.paths, self.info, self.amendments = paths, info, amendments(paths)
        self.effective = _newest(info, self.amendments)
        self.sealed = [records.read(names.seal, Seal) for names in paths.rounds() if names.seal.exists()]
        self.rounds = int(self.effective.recipe["rounds"])

    def with_rounds(self, recipe: Recipe) -> Recipe:
        """Return the recipe with a number of rounds that the run can still have.

        A finished run that is asked for fewer stays as it is; one that is on its way past them cannot end where it was.
        """
        last = len(self.sealed) - 1
        if recipe.rounds > last or recipe.rounds == self.rounds:
            return recipe
        if not self.ended(recipe, self.rounds):
            what = f"round {last} is sealed already, on the way to round {self.rounds}: rounds={recipe.rounds} comes too late"
            fix = f"Go on: rounds={self.rounds}, or `selfkd resume {self.paths.folder}`.   End with the next one: rounds={last + 1}"
            raise ChainError(what, str(self.paths.folder), fix)
        return recipe.model_copy(update={"rounds": self.rounds})

    def ended(self, recipe: Recipe, rounds: int) -> bool:
        """Whether nothing is left to make of `rounds` rounds."""
        if len(self.sealed) > rounds:
            return True
        spent = sum(commit.generated_in(self.paths, seal) for seal in self.sealed)
        return bool(steering.ended_early(recipe.stop, self.sealed, self.amendments, spent))

    def change(self, recipe: Recipe, kept: Collection[str] = ()) -> Change:
        """Return what differs; code that is `kept` counts as it is in force, whatever lies beside the recipe."""
        words = _changed_words(digest.as_json(self.old.resolved()), digest.as_json(recipe.resolved()))
        code = {reference: entry.digest for reference, entry in self.effective.code.items()}
        current = code_digests(recipe, self.effective.code, kept)
        edited = sorted(name for name in code.keys() | current.keys() if code.get(name) != current.get(name))
        return Change(words, edited, ["rounds"] if recipe.rounds != self.rounds else [])

    def code_files(self) -> dict[str, Any]:
        """Return the hashes of all frozen code: of what lay there before, those of its own record, or damage would become the truth."""
        before = [self.info.files, *(one.files for one in self.amendments)]
        known = {name: entry for files in before for name, entry in files.items()}
        lying = {self.paths.relative(path): path for path in storage.files_in(self.paths.code)}
        new = storage.file_hashes([path for name, path in lying.items() if name not in known], self.paths.folder)
        return {name: known[name] for name in lying if name in known} | new

    @cached_property
    def old(self) -> Recipe:
        """Return the recipe in force."""
        return frozen(dict(self.effective.recipe), self.paths.folder)


# ---- words ----


def _changed_words(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return {dotted field: sentence} of what differs, without what is FREE; a field that is not there is one that is empty."""
    was, now_ = _told(old), _told(new)
    changed = sorted(name for name in was.keys() | now_.keys() if was.get(name) != now_.get(name) and name not in FREE)
    return {name: f"{name}: {_what_changed(name, was, now_)}" for name in changed}


def _told(words: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _flat(words).items() if value not in (None, {}, [])}


def _what_changed(name: str, was: Mapping[str, Any], now_: Mapping[str, Any]) -> str:
    if name in was and name in now_:
        return f"{was[name]!r} was changed to {now_[name]!r}"
    return f"{was[name]!r} was removed" if name in was else f"{now_[name]!r} was added"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return {dotted.path: value} of nested mappings and lists, so that a difference can be named."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found or {name: value}
