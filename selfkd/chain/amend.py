"""Going on with a recipe that changed: more rounds are always welcome, other changes only as a recorded amendment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfkd.chain import records
from selfkd.chain.freeze import code_digests, freeze_code, now
from selfkd.chain.paths import Paths
from selfkd.chain.records import Amendment, Info
from selfkd.core import digest, storage
from selfkd.errors import ChainError
from selfkd.recipe.schema import Recipe

SHOWN_CHANGES = 6


def in_force(paths: Paths, info: Info) -> Info | Amendment:
    """Return what holds the recipe and code in force: the newest amendment, or the run as created."""
    amendments = paths.amendments()
    return records.read(amendments[-1], Amendment) if amendments else info


def accept(recipe: Recipe, paths: Paths, info: Info, amended: bool) -> None:
    """Go on with the same recipe and code. With `amended`, record what changed; without, ChainError names it."""
    effective = in_force(paths, info)
    words = _changed_words(effective.recipe, digest.as_json(recipe.resolved()))
    code = {reference: entry.digest for reference, entry in effective.code.items()}
    current = code_digests(recipe)
    edited = sorted(name for name in code.keys() | current.keys() if code.get(name) != current.get(name))
    grown = ["rounds"] if recipe.rounds != effective.recipe["rounds"] else []
    if not (words or edited or grown):
        return
    if (words or edited) and not amended:
        raise _refusal(paths, [*words.values(), *(f"{name} changed" for name in edited)])
    record = Amendment(
        changed=[*words, *edited, *grown],
        recipe=recipe.resolved(),
        code=freeze_code(recipe, paths),
        files=storage.file_hashes(storage.files_in(paths.code), paths.folder),
        when=now(),
    )
    records.write(paths.amendment(len(paths.amendments()) + 1), record, paths.tmp)


def _changed_words(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return {dotted field: sentence} of what differs, the number of rounds left out."""
    was, now_ = _flat(old), _flat(new)
    changed = sorted(name for name in was.keys() | now_.keys() if was.get(name) != now_.get(name) and name != "rounds")
    return {name: f"{name}: {was.get(name)!r} was {_verb(name, was, now_)} {now_.get(name)!r}" for name in changed}


def _verb(name: str, was: Mapping[str, Any], now_: Mapping[str, Any]) -> str:
    if name in was and name in now_:
        return "changed to"
    return "removed, now" if name in was else "added as"


def _refusal(paths: Paths, said: list[str]) -> ChainError:
    more = f"; and {len(said) - SHOWN_CHANGES} more" if len(said) > SHOWN_CHANGES else ""
    what = "was made by a different recipe: " + "; ".join(said[:SHOWN_CHANGES]) + more
    fix = (
        f"Keep the chain: restore it, or `selfkd resume {paths.folder}`, which uses the recipe and code frozen in the run.\n"
        "Change only steps not made yet: repeat the command with --amend.   Start a new chain: --name X"
    )
    return ChainError(what, str(paths.folder), fix)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return {dotted.path: value} of nested mappings and lists, so that a difference can be named."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found or {name: value}
