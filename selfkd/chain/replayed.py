"""Scores that `replay` brings from earlier rounds: one name must not mean two things, so what gave them is compared with what gives them now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from selfkd.chain import commit, records, ways
from selfkd.chain.paths import Paths
from selfkd.chain.records import CodeEntry, Commit, Seal
from selfkd.core import digest
from selfkd.recipe.schema import Recipe
from selfkd.rewards.check import signature
from selfkd.rewards.find import find_function
from selfkd.steps.replay import ReplayStep

NAMED_BY = {"score": "as", "judge": "score"}  # which field of a verb names its score; others list theirs


@dataclass(frozen=True)
class Otherwise:
    """A score of an earlier round that something else gave: where, what is wrong, and what can be done."""

    path: Path
    what: str
    way_out: str


def otherwise(recipe: Recipe, sealed: Sequence[Seal], paths: Paths, code: Mapping[str, CodeEntry]) -> Otherwise | None:
    """Return a score that `replay` would bring, and that the recipe would not give so in the round that it is of.

    A recipe whose words differ from round to round says itself what each of its rounds gave.
    """

    @cache
    def grouped(reference: str) -> bool:
        return signature(find_function(reference, recipe.folders)).grouped

    for index in _reached(recipe, sealed):
        now = _given(recipe, index, code, grouped)
        for path in paths.round(index).commits():
            made = records.read(path, Commit)
            for name, was in ways.scores_made(made.verb, made.identity, made.code, grouped).items():
                if name in now and was not in now[name]:
                    return _said(name, path, ways.unlike(was, now[name][0]), made.verb)
    return None


def _reached(recipe: Recipe, sealed: Sequence[Seal]) -> Iterator[int]:
    """Yield the accepted rounds from which a round to come would replay something."""
    steps = [step for step in recipe.steps_of(max(recipe.rounds, 1)) if isinstance(step, ReplayStep)]
    widths = [step.rounds or 0 for step in steps if not step.before]
    first, after = list(sealed[:1]), list(sealed[1:])
    chosen = first if any(step.before for step in steps) else []
    chosen += after[-(0 if 0 in widths else max(widths)) :] if widths else []
    yield from (seal.round for seal in chosen if seal.accepted)


def _given(recipe: Recipe, index: int, code: Mapping[str, CodeEntry], grouped: ways.Grouped) -> dict[str, list[ways.Made]]:
    """Return {score: all that gives it} of what the recipe has in a round; of round 0 also in the later ones, which replay its scores."""
    found: dict[str, list[ways.Made]] = {}
    for step in (*recipe.steps_of(max(index, 1)), *(recipe.steps_of(0) if index == 0 else ())):
        made = ways.scores_made(step.verb, digest.as_json(step.identity()), commit.code_of(step, code), grouped)
        found |= {name: [*found.get(name, ()), one] for name, one in made.items()}
    return found


def _said(name: str, path: Path, unlike: Sequence[str], verb: str) -> Otherwise:
    others = " and another ".join(unlike)
    what = f"gave '{name}' by another {others}, and `replay` brings these scores: old and new ones would have one name"
    field = NAMED_BY.get(verb, "scores")
    more = f"Give the new score a name of its own ({field}: {name}_2), use it in the steps after it, and repeat with --amend"
    return Otherwise(path, what, more)
