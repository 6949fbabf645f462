"""Going on with a recipe that changed: more rounds are always welcome, other changes only as a recorded amendment.

An amendment is judged before it is written, under the lease: what is fixed, made already or without effect is refused, and then
the run is exactly as it was. So every changed word works from the next step on that is not made yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from selfkd.chain import records
from selfkd.chain.freeze import freeze_code, now, prove_code
from selfkd.chain.objections import objection, ways_out
from selfkd.chain.paths import Paths
from selfkd.chain.records import Amendment, CodeEntry, Info
from selfkd.chain.standing import Change, Standing
from selfkd.core.lease import Lease
from selfkd.errors import ChainError
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.schema import Recipe
from selfkd.steps.train import TrainStep

SHOWN_CHANGES = 6


def accept(recipe: Recipe, paths: Paths, info: Info, environment: Iterable[str], amended: bool) -> Recipe:
    """Return the recipe to go on with, the same as before or amended.

    With `amended`, what changed is recorded; without, ChainError names it. BusyError where a driver holds the run that would
    have to be amended. `environment` names what rewards may see of it: new ones are tried before they are recorded.
    """
    here = Standing(paths, info)
    recipe = here.with_rounds(as_it_was(recipe, info))
    change = here.change(recipe)
    if (change.words or change.edited) and not amended:
        raise _refusal(paths, change, objection(here, recipe, change))
    if change:
        with Lease(paths.leases, paths.tmp):
            record(recipe, Standing(paths, info), environment)  # read anew: another driver may have been here
    return recipe


def changes(recipe: Recipe, paths: Paths) -> list[str]:
    """Return what differs from the recipe and code in force, one sentence each; the number of rounds may always differ."""
    info = records.read(paths.info, Info)
    return Standing(paths, info).change(as_it_was(recipe, info)).sentences()


def as_it_was(recipe: Recipe, info: Info) -> Recipe:
    """Return the recipe with `precision: auto` as what it was when a run was created whose numerics do not know the word: bf16."""
    if "precision" in info.numerics:
        return recipe
    return recipe.model_copy(update={part: tuple(map(_in_bf16, getattr(recipe, part))) for part in LISTS})


def _in_bf16(line: Line) -> Line:
    if line.verb != TrainStep.verb or line.words.get("precision", "auto") != "auto":
        return line
    return replace(line, words={**line.words, "precision": "bf16"})


def record(recipe: Recipe, here: Standing, environment: Iterable[str], kept: Collection[str] = ()) -> Change:
    """Commit what differs from the recipe and code in force, and return it; ChainError where it may not, or takes no effect.

    Code that is `kept` stays as it is in force, whatever lies beside the recipe.
    """
    change = here.change(recipe, kept)
    if refused := objection(here, recipe, change, kept):
        raise refused
    if change:
        amendment = Amendment(
            changed=[*change.words, *change.edited, *change.rounds],
            recipe=recipe.resolved(),
            code=_proved_code(recipe, here, environment, kept) if change.edited else here.effective.code,
            files=here.code_files(),
            when=now(),
            sealed=len(here.sealed),
        )
        records.write(here.paths.amendment(len(here.amendments) + 1), amendment, here.paths.tmp)
    return change


def _proved_code(recipe: Recipe, here: Standing, environment: Iterable[str], kept: Collection[str]) -> dict[str, CodeEntry]:
    code = freeze_code(recipe, here.paths, here.effective.code, here.info.machine.get("backend") == "fake", kept)
    prove_code(recipe, code, here.paths, environment, kept)
    return code


def _refusal(paths: Paths, change: Change, refused: ChainError | None) -> ChainError:
    """Return the error of a change that nobody asked to record; --amend is offered only where it would be accepted."""
    said = change.sentences()
    more = f"; and {len(said) - SHOWN_CHANGES} more" if len(said) > SHOWN_CHANGES else ""
    what = "was made by a different recipe: " + "; ".join(said[:SHOWN_CHANGES]) + more
    if refused:
        return ChainError(what, str(paths.folder), f"It cannot be amended: {refused.where}  {refused.what}\n{refused.fix}")
    amend = "Change only steps not made yet: repeat the command with --amend"
    return ChainError(what, str(paths.folder), f"{ways_out(paths)}\n{amend}")
