"""Rows of a round, found for a reader: what was asked, what was answered, what it scored, whether it was kept and if not, why.

Reads through `chain.contents`. Knows not how they are printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from selfkd.chain import contents
from selfkd.chain.paths import Paths
from selfkd.core import views
from selfkd.core.pool import Pool
from selfkd.report import status


@dataclass(frozen=True)
class Found:
    """The first rows that matched, with their texts: `matched` of `total` rows did. `title` says what was looked for."""

    table: Literal["samples", "rows"]
    title: str
    total: int
    matched: int
    first: pl.DataFrame
    scores: Sequence[str] = ()  # those of its columns that are scores
    reasons: Mapping[tuple[str, str], str] = field(default_factory=dict)  # why a sample has no value, by sample and score


def samples(
    folder: Path, index: int | None = None, step: str | None = None, where: str | None = None, n: int = 5, ids: bool = False
) -> Found:
    """Find samples of round `index` (None: the newest with samples), by prompt; only those of one step, or where `where` holds.

    `where` sees every column of the sample table, the scores, and `kept` and `why` (which step dropped it, and its reason). `ids`: with
    the tokens that were drawn.
    """
    paths = Paths(folder)
    info = status.info_of(paths)
    found = contents.samples(paths, index, step, where)
    heavy = ["text", "teacher_messages", *(["token_ids"] if ids else [])]
    first = views.with_heavy(found.rows.head(n), found.pool, heavy)
    return Found(
        table="samples",
        title=_title(found.index, step, where, "samples"),
        total=found.total,
        matched=found.rows.height,
        first=contents.with_prompts(paths, info, first, found.pool),
        scores=views.score_names(found.pool),
        reasons=_reasons(first, found.pool),
    )


def _reasons(shown: pl.DataFrame, pool: Pool) -> dict[tuple[str, str], str]:
    """Return why these samples could not be scored; of a score that has a value from another draw, nothing."""
    ours = pool.scores.filter(pl.col("sample").is_in(shown["id"].implode()) & pl.col("why").is_not_null())
    rows = ours.filter(pl.col("value").is_null()).select("sample", "name", "why").iter_rows()
    return {(sample, name): why for sample, name, why in rows}


def training_rows(
    folder: Path, index: int | None = None, step: str | None = None, where: str | None = None, n: int = 5, ids: bool = False
) -> Found:
    """Find the rows a model was trained on; `where` sees the columns of the row table (kind, stream, role, weight, chosen, …)."""
    paths = Paths(folder)
    status.info_of(paths)
    found = contents.training_rows(paths, index, step, where)
    with_ids = ["chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"] if ids else []
    heavy = ["messages", "chosen", "rejected", "ranked", "teacher_messages", *with_ids]
    return Found(
        table="rows",
        title=_title(found.index, step, where, "training rows"),
        total=found.total,
        matched=found.rows.height,
        first=views.with_heavy(found.rows.head(n), found.pool, heavy, "rows"),
    )


def _title(index: int, step: str | None, where: str | None, noun: str) -> str:
    return f"round {index}" + (f" · {step}" if step else "") + f" · {noun}" + (f" where {where}" if where else "")
