"""Which score of a round is gold that its filter did not see, what the filter kept, and what that was worth.

It is worked out when a round is sealed, stands in the notes of its seal, outside every digest, and steers nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import polars as pl

from selfkd.chain import commit as commits
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit
from selfkd.chain.ways import rewards_of
from selfkd.core import views
from selfkd.core.filters import Filtering, filtering
from selfkd.core.pool import Pool
from selfkd.errors import SelfkdError
from selfkd.recipe.anchors import Find, reads_gold
from selfkd.rewards.find import definition, parameters
from selfkd.steps.step import several

CHOOSING = (
    "where",
    "dedup",
    "by",
    "chosen",
    "rejected",
    "weight",
    "label",
    "columns",
)  # fields of expressions that choose or weigh
HALF = 0.5  # a label above it says that a completion is good


def recorded(notes: Mapping[str, Any]) -> list[Filtering]:
    """Return what the notes of a seal say of its filter; nothing where there was no gold, or of a seal that has no such notes."""
    return [Filtering.from_json(one) for one in notes.get("filter", ())]


def filters(paths: Paths, made: Sequence[Commit], find: Find, gold: str | None = None) -> list[Filtering]:
    """Return what a round's filter is worth by each score that reads gold and that it does not choose by; `gold` names one instead."""
    inside = [one for one in made if not one.outside]
    pools = [commits.own_pool_of(paths, one) for one in inside]
    pool = sum(pools, Pool())
    known = views.score_names(pool)
    used = chosen_by(inside, known, _given(inside, pools, find))
    golds = [gold] if gold else [name for name in golden(inside, find) if name not in used]
    if not pool.samples.height or not set(golds) & set(known):
        return []
    view = views.with_scores(views.answers(pool), pool)
    view = view.with_columns(kept=pl.col("id").is_in(kept(pool).implode()))
    ranked = [name for name in known if name in used and name in view.columns]
    found = (filtering(view, name, [one for one in ranked if one != name]) for name in golds if name in view.columns)
    return [one for one in found if one]


def golden(made: Sequence[Commit], find: Find) -> list[str]:
    """Return the scores of samples that are held against something that no model of the chain wrote, in the order of steps."""
    scoring = [one for one in made if one.verb == "score" and one.identity.get("reward")]
    found = [
        name
        for one in scoring
        for name, reference in rewards_of(one.identity).items()
        if reads_gold(reference, one.identity.get("params") or {}, find)
    ]
    return list(dict.fromkeys(found))


def chosen_by(made: Sequence[Commit], scores: Collection[str], given: Collection[str] = ()) -> set[str]:
    """Return the scores by which steps choose or weigh, those `given` to functions among them, also those that a worked-out score rests on."""
    texts = [text for one in made for field in CHOOSING for text in _texts(one.identity.get(field)) if one.verb != "score"]
    used = {score for name in views.named_in(*texts) if (score := _score_of(name, scores))} | set(given)
    values = {name: text for one in made if one.verb == "score" for name, text in _worked_out(one.identity).items()}
    while more := {
        score
        for name in used & values.keys()
        for word in views.named_in(values[name])
        if (score := _score_of(word, scores)) and score not in used
    }:
        used |= more
    return used


def _given(made: Sequence[Commit], pools: Sequence[Pool], find: Find) -> set[str]:
    """Return the scores that functions over tables were given: those of the steps before them. Each may be what they chose by."""
    before: set[str] = set()
    found: set[str] = set()
    for one, own in zip(made, pools, strict=True):
        found |= before if one.verb == "apply" and _reads_scores(one, find) else set()
        before |= set(views.score_names(own))
    return found


def _reads_scores(made: Commit, find: Find) -> bool:
    """Whether a function over tables is given scores; of one that cannot be read any more, nobody can say that it is not."""
    with suppress(SelfkdError):
        node = definition(find(str(made.identity["function"])))
        return node is None or node.args.kwarg is not None or "scores" in parameters(node)
    return True


def _worked_out(identity: Mapping[str, Any]) -> dict[str, str]:
    text = identity.get("value")
    return dict.fromkeys(several(identity.get("as")) or ["value"], text) if isinstance(text, str) else {}


def _texts(field: Any) -> Iterator[str]:
    """Yield the texts of a field: one, or one per name."""
    if isinstance(field, str):
        yield field
    elif isinstance(field, Mapping):
        yield from (text for text in field.values() if isinstance(text, str))


def _score_of(name: str, scores: Collection[str]) -> str | None:
    """Return the score that a column is of: itself, that of a side of a pair, or that of a prompt's answers (`right_max`)."""
    for side in ("", *(f"{side}_" for side in views.SIDES)):
        word = name.removeprefix(side)
        if word in scores:
            return word
    return next((one for one in scores if name in (f"{one}_max", f"{one}_mean", f"{one}_n")), None)


def kept(pool: Pool) -> pl.Series:
    """Return the samples that are learned from as good ones: of rows the completion, the chosen or the best one, of labels those above a half.

    In a round without rows, those that no step dropped.
    """
    rows = pool.rows
    if not rows.height:
        return views.live(pool)["id"]
    good = rows.filter((pl.col("kind") != "label") | (pl.col("label") > HALF))
    of_one = pl.when(pl.col("kind").is_in(["pair", "rank"])).then(pl.col("samples").list.head(1)).otherwise(pl.col("samples"))
    return good.select(of_one.alias("samples")).explode("samples")["samples"].drop_nulls().unique()
