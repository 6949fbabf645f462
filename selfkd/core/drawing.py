"""Which rows to prefer by a number: the greatest first, or drawn at random with chances by it. Hashed from names, so it repeats."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import polars as pl

from selfkd.core import digest

Pick = Literal["top", "weighted"]


def next_of(rows: pl.DataFrame, most: int, index: int) -> pl.DataFrame:
    """Return the next `most` rows in round `index`, on through them and from their start again, in their order."""
    first = (index - 1) * most
    return rows[sorted({(first + offset) % rows.height for offset in range(most)})]


def order(values: pl.Series, ids: Iterable[str], pick: Pick, *seed: Any) -> pl.Series:
    """Return by what to sort, the greatest first; null for a row that is not to be had: without a value, or without a chance.

    weighted: as if one row after the other were drawn, each with a chance by its value among those left (Efraimidis and Spirakis 2006,
    Information Processing Letters 97(5)): the logarithm of a uniform number, divided by the value.
    """
    numbers = values.cast(pl.Float64).fill_nan(None)
    if pick == "top":
        return numbers
    keys = [_key(value, digest.uniform(*seed, name)) for value, name in zip(numbers, ids, strict=True)]
    return pl.Series(values.name, keys, dtype=pl.Float64)


def _key(weight: float | None, chance: float) -> float | None:
    if weight is None or weight <= 0:
        return None
    return math.log1p(-chance) / weight  # a uniform number is never 1, so this is finite
