"""Answers for a page: what became right or wrong since the base, what was dropped and why, and a gallery by round and verdict.

Found through `chain.contents`, as `selfkd show` finds them, so a page and a terminal show the same verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from selfkd.chain import contents, measured
from selfkd.chain.contents import Rows
from selfkd.chain.records import Commit
from selfkd.chain.results import measuring
from selfkd.core import views
from selfkd.errors import SelfkdError
from selfkd.report.page.opened import Opened
from selfkd.report.panels import last_user

SHOWN = 3  # of each kind on the first screen, and of each verdict in the gallery
MOST_ROUNDS = 12  # whose answers are in the gallery
EACH_WAY = 6  # rows that are looked at for each one that is shown, so that no two of one prompt stand there
HELD_OUT = "held out"
GONE = "(its prompt is not on disk)"


@dataclass(frozen=True)
class Answer:
    """One answer: to what, what was wanted, what was said, its scores, and why it was dropped, '' where it was not."""

    id: str
    prompt: str
    wanted: str | None
    text: str
    scores: Mapping[str, float | None]
    why: str = ""
    note: str = ""


@dataclass(frozen=True)
class Moved:
    """A held-out prompt whose score moved: what the base said, and what the best round says."""

    prompt: str
    wanted: str | None
    before: Answer
    after: Answer
    change: float


@dataclass(frozen=True)
class Ledger:
    """How a round's held-out prompts stand against the base: prompts that rose and that fell, and of `right` at the base the `still` right.

    `yes_no`: every score is 0 or 1, so that to rise is to become right.
    """

    rose: Sequence[tuple[str, float]]
    fell: Sequence[tuple[str, float]]
    right: int
    still: int
    yes_no: bool


@dataclass(frozen=True)
class Verdict:
    """Answers of one kind in a round: `count` there are, `shown` are these. `reason` says why there are none to see."""

    name: str
    count: int
    shown: Sequence[Answer]
    reason: str = ""


@dataclass(frozen=True)
class Gallery:
    """The answers of a round, by verdict."""

    index: int
    verdicts: Sequence[Verdict] = field(default_factory=list)


# ---- what moved since the base ----


def ledger(run: Opened, index: int) -> Ledger | None:
    """Return how a round stands against the base prompt by prompt; None where it was not measured, or not in the same way."""
    at = run.main.get(index)
    before, after = (measuring(run.paths, one, run.metric) for one in (0, index)) if at and index else (None, None)
    if not at or at.differently or before is None or after is None:
        return None
    was, now = (measured.prompt_means(run.paths, one, at.score) for one in (before, after))
    sign = -1 if run.mode == "min" else 1
    moved = sorted(
        ((prompt, now[prompt] - was[prompt]) for prompt in was.keys() & now.keys()), key=lambda one: (-sign * one[1], one[0])
    )
    right = [prompt for prompt in was.keys() & now.keys() if was[prompt] >= 1]
    return Ledger(
        rose=[one for one in moved if sign * one[1] > 0],
        fell=[one for one in reversed(moved) if sign * one[1] < 0],
        right=len(right),
        still=sum(now[prompt] >= 1 for prompt in right),
        yes_no={*was.values(), *now.values()} <= {0.0, 1.0},
    )


def moved(run: Opened, index: int, prompts: Sequence[tuple[str, float]]) -> list[Moved]:
    """Return the first of these prompts with what base and round said to them."""
    score = run.main[index].score
    wanted = [prompt for prompt, _ in prompts[:SHOWN]]
    sides = [_answers_to(run, at, wanted, score) for at in (0, index)]
    changes = dict(prompts)
    return [
        Moved(before.prompt, before.wanted, before, after, changes[prompt])
        for prompt in wanted
        if (before := sides[0].get(prompt)) and (after := sides[1].get(prompt))
    ]


def _answers_to(run: Opened, index: int, prompts: Sequence[str], score: str) -> dict[str, Answer]:
    """Return {prompt: its first answer that was scored} of what a round's measurement asked."""
    commit = measuring(run.paths, index, run.metric)
    assert commit
    try:
        found = contents.samples(run.paths, index, commit.step)
    except SelfkdError:  # a table that is gone is named by `verify`
        return {}
    rows = found.rows.filter(pl.col("prompt").is_in(prompts))
    first = rows.sort("prompt", "number", "id").unique("prompt", keep="first", maintain_order=True)
    shown = _read(run, found, first, commit)
    return dict(zip(first["prompt"], shown, strict=True))


# ---- verdicts of a round ----


def dropped(run: Opened, index: int) -> tuple[int, list[Answer]]:
    """Return the round whose drops are shown, `index` or the newest before it that dropped some, and one drop of each reason, then more."""
    for at in [one for one in sorted(run.commits, reverse=True) if one <= index] or []:
        found = _pooled(run, at)
        gone = found.rows.filter(~pl.col("kept")) if found else pl.DataFrame()
        if found and gone.height:
            return at, _read(run, found, _one_of_each(gone, "why"))
    return index, []


def galleries(run: Opened) -> list[Gallery]:
    """Return the answers of at most `MOST_ROUNDS` rounds: the first, the last, the best, and of those between as many as may be."""
    return [
        Gallery(index, list(_verdicts(run, index))) for index in sorted(some_of(sorted(run.commits), run.best, MOST_ROUNDS))
    ]


def some_of(rounds: Sequence[int], best: int, most: int) -> set[int]:
    """Return at most `most` rounds, evenly apart, with the ends and the best one.

    >>> sorted(some_of(range(100), 7, 5))
    [0, 7, 33, 66, 99]
    """
    if len(rounds) <= most:
        return set(rounds)
    apart = {rounds[round(at * (len(rounds) - 1) / (most - 2))] for at in range(most - 1)}
    return apart | {best}


def _verdicts(run: Opened, index: int) -> Iterator[Verdict]:
    if found := _pooled(run, index):
        answers = found.rows.filter(pl.col("kept").is_not_null())
        kept, gone = answers.filter(pl.col("kept")), answers.filter(~pl.col("kept"))
        yield Verdict("kept", kept.height, _read(run, found, _spread(kept)))
        yield Verdict("dropped", gone.height, _read(run, found, _one_of_each(gone, "why")))
        judged = found.rows.filter(pl.col("kept").is_null())
        if judged.height:
            yield Verdict("judgments", judged.height, _read(run, found, _spread(judged)))
    for commit in (one for one in run.commits[index] if one.outside and "samples" in one.tables):
        yield from _measured(run, index, commit)


def _measured(run: Opened, index: int, commit: Commit) -> Iterator[Verdict]:
    name = f"{HELD_OUT}: {commit.identity.get('split', commit.step)}"
    found = _of_step(run, index, commit.step)
    if found is None:
        yield Verdict(name, 0, [], "their tables are not on disk: selfkd verify names what is missing")
        return
    score = run.main[index].score if index in run.main else ""
    if score in found.rows.columns and set(found.rows[score].drop_nulls().unique()) <= {0.0, 1.0}:
        for said, value in (("right", 1.0), ("wrong", 0.0)):
            some = found.rows.filter(pl.col(score) == value)
            yield Verdict(f"{name}, {said}", some.height, _read(run, found, _spread(some), commit))
        return
    yield Verdict(name, found.rows.height, _read(run, found, _spread(found.rows), commit))


def _pooled(run: Opened, index: int) -> Rows | None:
    """Return the samples that a round made for its pool; None where it made none, or they are gone."""
    if not any("samples" in one.tables and not one.outside for one in run.commits[index]):
        return None
    try:
        return contents.samples(run.paths, index)
    except SelfkdError:
        return None


def _of_step(run: Opened, index: int, step: str) -> Rows | None:
    try:
        return contents.samples(run.paths, index, step)
    except SelfkdError:
        return None


def _spread(rows: pl.DataFrame) -> pl.DataFrame:
    """Return a few rows of several prompts, chosen by their number that ties are broken by: no order of a file shows in them."""
    return rows.sort("tiebreak", "id").head(SHOWN * EACH_WAY).unique("prompt", keep="first", maintain_order=True).head(SHOWN)


def _one_of_each(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    """Return a row of each reason, the commonest first, then more of them."""
    ordered = rows.with_columns(_n=pl.len().over(column)).sort(
        "_n", column, "tiebreak", "id", descending=[True, False, False, False]
    )
    first = ordered.unique(column, keep="first", maintain_order=True).head(SHOWN)
    rest = ordered.join(first.select("id"), on="id", how="anti").head(SHOWN - first.height)
    return pl.concat([first, rest]).drop("_n")


def _read(run: Opened, found: Rows, rows: pl.DataFrame, commit: Commit | None = None) -> list[Answer]:
    """Return rows with their texts and prompts, in their order."""
    if not rows.height:
        return []
    whole = contents.with_prompts(
        run.paths, run.info, views.with_heavy(rows, found.pool, ["text", "teacher_messages"]), found.pool
    )
    names = [name for name in views.score_names(found.pool) if name in rows.columns]
    return [_answer(row, names) for row in whole.iter_rows(named=True)]


def _answer(row: Mapping[str, Any], names: Sequence[str]) -> Answer:
    told = row["teacher_messages"] and row["messages"] and row["teacher_messages"] != row["messages"]
    notes = [
        f"{row['tokens']} tokens",
        *(["cut at the limit"] if row["finish_reason"] == "length" else []),
        *(["its sampler was told more than this prompt"] if told else []),
    ]
    return Answer(
        id=row["id"],
        prompt=last_user(row["messages"]) if row["messages"] else GONE,
        wanted=row["answer"],
        text=row["text"] or "",
        scores={name: row[name] for name in names},
        why=row["why"] or "",
        note=", ".join(notes),
    )
