"""Drawing by a number: the greatest first, or with chances by it."""

from __future__ import annotations

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from selfkd.core import drawing

IDS = ["a", "b", "c"]


def first(weights: list[float], *seed: object) -> str:
    keys = drawing.order(pl.Series(weights), IDS, "weighted", *seed)
    return pl.DataFrame({"id": IDS, "key": keys}).sort("key", descending=True, nulls_last=True)["id"][0]


def test_chances_are_in_proportion_to_the_weights():
    found = [first([1.0, 3.0, 0.0], seed) for seed in range(4000)]
    share = found.count("b") / len(found)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5  # four standard errors
    assert "c" not in found


def test_without_replacement_the_second_is_drawn_among_the_others():
    """P(b, then a) = 3/4 · 1/1 of the two that are left: a has weight 1, c has 0."""
    keys = drawing.order(pl.Series([1.0, 3.0, 0.0]), IDS, "weighted", 7)
    assert keys.null_count() == 1 and keys[2] is None


def test_top_is_the_number_itself_and_what_is_none_is_not_to_be_had():
    assert drawing.order(pl.Series([1.0, float("nan"), None]), IDS, "top").to_list() == [1.0, None, None]


@given(st.permutations(range(6)))
def test_the_order_of_the_rows_changes_nothing(places):
    names, weights = [f"n{at}" for at in range(6)], [0.5 + at for at in range(6)]
    plain = dict(zip(names, drawing.order(pl.Series(weights), names, "weighted", 3), strict=True))
    shuffled = [names[at] for at in places]
    moved = drawing.order(pl.Series([weights[at] for at in places]), shuffled, "weighted", 3)
    assert dict(zip(shuffled, moved, strict=True)) == plain
