"""What a teacher is told of a prompt: its own gold answer, or that of another one, which is the control of such a teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import polars as pl

from selfkd.core import digest, views
from selfkd.core.pool import Pool
from selfkd.errors import GuardError

GOLD = ("answer", "meta")  # columns of a prompt that its student does not see


def of_another(pool: Pool, seed: int, where: str) -> pl.DataFrame:
    """Return (id, answer, meta) of the round's prompts, each with those of another one whose answer differs.

    GuardError where no other answer is to be had.
    """
    known = views.with_heavy(views.live_prompts(pool), pool, list(GOLD), "prompts").select("id", *GOLD)
    known = known.filter(pl.col("answer").is_not_null())
    golds = {name: (answer, meta) for name, answer, meta in known.iter_rows()}
    whose = deranged({name: str(answer) for name, (answer, _) in golds.items()}, seed)
    whose |= _of_others([name for name, other in whose.items() if golds[name][0] == golds[other][0]], golds, seed)
    if alike := [name for name, other in whose.items() if golds[name][0] == golds[other][0]]:
        what = f"{len(alike)} of {len(golds)} prompts cannot be told another answer: all answers are the same"
        raise GuardError(what, where, "Give the round more prompts (prompts.take), or of more kinds.")
    rows = [{"id": name, "answer": golds[other][0], "meta": golds[other][1]} for name, other in whose.items()]
    return pl.DataFrame(rows, schema={"id": pl.String, "answer": known.schema["answer"], "meta": known.schema["meta"]})


def _of_others(alone: Sequence[str], golds: Mapping[str, tuple[str | None, str | None]], seed: int) -> dict[str, str]:
    """Return a prompt with another answer, drawn, for those that have none left where more than half of the answers are the same."""
    others = {name: [other for other in sorted(golds) if golds[other][0] != golds[name][0]] for name in alone}
    return {name: some[int(digest.uniform(seed, "again", name) * len(some))] for name, some in others.items() if some}


def deranged(answers: Mapping[str, str], seed: int) -> dict[str, str]:
    """Return {prompt: another prompt}, a permutation under which no answer stays, as far as their counts allow.

    Equal answers stand side by side in a drawn order, which is turned by the length of the longest such run.

    >>> sorted(deranged({"a": "1", "b": "1", "c": "2", "d": "3"}, 0).values())
    ['a', 'b', 'c', 'd']
    """

    def drawn(name: str) -> tuple[float, str, float, str]:
        return digest.uniform(seed, answers[name]), answers[name], digest.uniform(seed, "prompt", name), name

    order: Sequence[str] = sorted(answers, key=drawn)
    turn = max(Counter(answers.values()).values(), default=0)
    return {name: order[(at + turn) % len(order)] for at, name in enumerate(order)}
