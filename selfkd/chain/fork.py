"""A new run that begins as another one was after a round: the same rounds, then another recipe.

What is sealed never changes, so the earlier rounds are the very files, linked. Of the round after them, each step that the new recipe asks
for as the old one did, after the same history, is taken as it is; the first one that differs is made, and all behind it. The new run is
whole by itself: the old one may be removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfkd.chain import amend, records, rounded
from selfkd.chain.freeze import now
from selfkd.chain.objections import made_alike
from selfkd.chain.paths import Paths, RoundPaths
from selfkd.chain.records import Amendment, Commit, Info, Seal
from selfkd.chain.run import Run
from selfkd.chain.standing import Standing
from selfkd.core import storage
from selfkd.errors import ChainError, UsageError
from selfkd.recipe.load import changed
from selfkd.recipe.schema import Recipe

REFUSED = "Nothing was made. Fork after an earlier round, give the new run more rounds (rounds=N), or leave that change out."
OWN = ("logs", "leases", "tmp", "updates")  # of one run: who drove it, and what is in progress


@dataclass(frozen=True)
class Forked:
    """A new run, which rounds it shares, which steps of the next one it takes of those that were made, and what its recipe changes."""

    folder: Path
    after: int
    steps: Sequence[str]
    made: int
    changed: Sequence[str]


def fork(source: Path, into: Path, after: int, overrides: Sequence[str] = ()) -> Forked:
    """Make the run `into` of the run `source` as it was when round `after` was sealed, with the recipe that made the next round and
    these overrides.

    Code stays as it was frozen; what an override names anew is looked for in the working directory. UsageError where `into` is there, the
    round is not sealed, or its weights are gone; ChainError for a change on which the earlier rounds rest.
    """
    if os.path.lexists(into):  # a link to nothing, too
        raise UsageError("is there already", str(into), "Give the new run another name: --name X")
    old = Run.at(source)
    if old.folder.resolve() in into.absolute().resolve().parents:
        raise UsageError(
            "lies inside the run that it would be made of", str(into), "A run holds no other: name a folder beside it."
        )
    seal = _seal(old, after)
    for model in seal.head().values():
        old.trust.weights(model)  # damaged ones are no beginning
    into.absolute().parent.mkdir(parents=True, exist_ok=True)
    draft = Paths(storage.temporary(into.absolute().parent, f"-{into.name}"))
    try:
        made = _linked(old, seal, draft, into.name)
        recipe = changed(dict(Standing(draft, records.read(draft.info, Info)).effective.recipe), draft.folder, overrides)
        alike = _kept_steps(draft, recipe, after + 1)
        said = _amended(draft, recipe, old)
        storage.adopt(draft.folder, into.absolute())
    except ChainError as error:  # speaks of the draft, as if a run lay there
        where = error.where.replace(str(draft.folder), str(into)).replace(draft.folder.name, into.name)
        raise ChainError(error.what, where, REFUSED) from None
    finally:
        shutil.rmtree(draft.folder, ignore_errors=True)
    return Forked(into, after, [one.step for one in alike], made, said)


def _seal(old: Run, after: int) -> Seal:
    """Return the seal of the round; UsageError where it is not sealed, or where what it left cannot be gone on from."""
    sealed = old.sealed()
    if not 0 <= after < len(sealed):
        fix = f"Sealed rounds: 0 to {len(sealed) - 1}; 0 is the base." if sealed else "No round is sealed yet."
        raise UsageError(f"round {after} is not sealed", str(old.folder), fix)
    there = [seal.round for seal in sealed if _is_there(old.folder, seal)]
    if after not in there:
        fix = f"Rounds whose weights are there: {', '.join(map(str, there)) or 'none'}. The recipe's `keep` says which stay."
        raise UsageError(f"the weights that round {after} left are not on disk any more", str(old.folder), fix)
    return sealed[after]


def _is_there(folder: Path, seal: Seal) -> bool:
    return all((folder / rounded.located(folder, model).path).is_dir() for model in seal.head().values())


# ---- files ----


def _linked(old: Run, seal: Seal, new: Paths, name: str) -> int:
    """Link what the new run begins with, and write its run.json; return how many steps of the round behind it were made."""
    storage.make_folder(new.tmp)
    following = old.paths.round(seal.round + 1)
    for path in _shared(old.paths, seal.round, following):
        _link(path, new.folder / path.relative_to(old.folder))
    for number, amendment in enumerate(_amendments_until(old.paths, seal.round), 1):
        _link(amendment, new.amendment(number))
    info = replace(old.info, name=name, created=now(), more={**old.info.more, "forked": _origin(old, seal)})
    records.write(new.info, info, new.tmp)
    return len(following.commits())


def _origin(old: Run, seal: Seal) -> dict[str, object]:
    """Return what a forked run says of its beginning: of which run, after which round, with what digest."""
    return {"run": old.info.name, "created": old.info.created, "after": seal.round, "digest": seal.digest}


def _shared(paths: Paths, after: int, following: RoundPaths) -> Iterator[Path]:
    """Yield all files of a run but what is its own, what later rounds hold, and what the next one has unfinished."""
    later = [names.folder for names in paths.rounds() if names.index > after]
    apart = [*(paths.folder / name for name in OWN), *later, paths.info, *paths.amendments()]
    for path in storage.files_in(paths.folder):
        if not any(path == one or one in path.parents for one in apart):
            yield path
    for path in following.commits():
        yield path
        yield from storage.files_in(path.with_suffix("")) if path.with_suffix("").is_dir() else ()
    yield from following.cuts()


def _amendments_until(paths: Paths, after: int) -> list[Path]:
    """Return the amendments under which these rounds and the next one were made: what was asked for since is no part of a fork."""
    return [path for path in paths.amendments() if records.read(path, Amendment).sealed <= after + 1]


def _link(path: Path, target: Path) -> None:
    """Link a file, or copy it where the file system cannot: neither run ever changes one."""
    storage.make_folder(target.parent)
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


# ---- the recipe ----


def _kept_steps(new: Paths, recipe: Recipe, index: int) -> list[Commit]:
    """Take away what the new recipe would make otherwise in the round that was begun; return the steps that stay."""
    here = Standing(new, records.read(new.info, Info))
    alike = made_alike(here, recipe, _as_frozen(recipe, here))
    names = new.round(index)
    stay = {one.step for one in alike}
    for path in names.commits():
        if path.stem.partition("-")[2] not in stay:
            _take_away(names, path)
    return alike


def _take_away(names: RoundPaths, commit: Path) -> None:
    for path in (commit, commit.with_suffix(""), *names.folder.glob(f"cut-{commit.stem}-*.json")):
        if path.exists():
            storage.remove(path)


def _amended(new: Paths, recipe: Recipe, old: Run) -> list[str]:
    here = Standing(new, records.read(new.info, Info))
    recipe = here.with_rounds(recipe)
    change = amend.record(recipe, here, old.machine.environment, _as_frozen(recipe, here))
    return [*change.sentences(), *(f"rounds: {here.rounds} was changed to {recipe.rounds}" for _ in change.rounds)]


def _as_frozen(recipe: Recipe, here: Standing) -> list[str]:
    """Return the code that the recipe names and the run has already: it stays as it was frozen."""
    functions, texts = recipe.references()
    return [name for name in (*functions, *texts) if name in here.effective.code]
