"""How many tokens a loss would learn of each training row, counted with a model's tokenizer. Opens no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend import adapters, tokens
from selfkd.core.pool import Model
from selfkd.errors import UsageError


def learned(model: Model, rows: pl.DataFrame) -> list[int]:
    """Return the tokens of the answers of each row of table `rows`, ends included; 0 of a row that the trainer will refuse."""
    tok = tokens.tokenizer(str(Path(adapters.full_weights(model).path)))
    return [_of_row(tok, row) for row in rows.iter_rows(named=True)]


def _of_row(tok: Any, row: dict[str, Any]) -> int:
    try:
        return sum(len(_ids(tok, row, *answer)) for answer in answers(row))
    except UsageError:  # a special token that cannot be written as text
        return 0


def _ids(tok: Any, row: dict[str, Any], text: str | None, ids: list[int] | None, ended: bool | None) -> list[int]:
    if not text and not ids:
        return []
    return tokens.encode_completion(tok, text or "", ids, ended is not False, messages=row["messages"])


def answers(row: dict[str, Any]) -> list[tuple[str | None, list[int] | None, bool | None]]:
    """Return (text, ids, whether it ended) of each answer that a loss would learn from: one, both of a pair, or all of a ranking."""
    if row["ranked"]:
        return [(one["text"], one["ids"], one["ended"]) for one in row["ranked"]]
    sides = ["chosen", *(["rejected"] if row["kind"] == "pair" else [])]
    return [(row[side], row[f"{side}_ids"], row[f"{side}_ended"]) for side in sides]
