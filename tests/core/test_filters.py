"""What a filter is worth by gold: figures by hand, and AUROC against scikit-like counting of pairs."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.core.filters import Filtering, auroc, filtering

# (prompt, gold, kept, votes): of a two of three are right and the two kept are; of b one of two, and the wrong one is kept; of c nothing is.
SAMPLES = [("a", 1, 1, 3), ("a", 1, 1, 3), ("a", 0, 0, 1), ("b", 1, 0, 1), ("b", 0, 1, 2), ("c", 0, 0, 1), ("c", 0, 0, 1)]


def view(samples=SAMPLES) -> pl.DataFrame:
    rows = [
        {
            "prompt": prompt,
            "id": f"{at:03}",
            "right": None if gold is None else float(gold),
            "kept": bool(kept),
            "votes": float(votes),
        }
        for at, (prompt, gold, kept, votes) in enumerate(samples)
    ]
    return pl.DataFrame(rows, schema_overrides={"right": pl.Float64})


def test_precision_gap_and_auroc_by_hand():
    found = filtering(view(), "right", ["votes"])
    assert (found.sampled, found.kept) == (7, 3)
    assert found.precision == pytest.approx(2 / 3)
    # what was sampled: 2/3, 1/2, 0; what was kept: 1, 0, and c, of which nothing was kept, as it was sampled
    assert found.gap.value == pytest.approx((1 / 3 - 1 / 2 + 0) / 3) and found.gap.prompts == 3
    assert found.relative_gap == pytest.approx((1 + -1 + 0) / 3)
    ranked = found.auroc["votes"]  # a: both right ones above the wrong one; b: the right one below; c has no pair
    assert (ranked.value, ranked.prompts) == (0.5, 2)


def test_an_interval_is_of_prompts_and_not_of_their_answers():
    """Fifty prompts whose eight answers are all alike say as much as fifty answers: about eight times the variance of 400."""
    answers = [(f"p{at}", at % 2, 1, 1) for at in range(50) for _ in range(8)]
    found = filtering(view(answers), "right", [])
    assert found.precision == 0.5
    assert 0.2 < found.interval.high - found.interval.low < 0.35  # of 400 independent answers it would be 0.098
    assert filtering(view([(f"p{at}", 1, 1, 1) for at in range(50)]), "right", []).interval.low == pytest.approx(
        0.929, abs=0.001
    )


def test_answers_without_gold_count_nowhere_and_without_any_there_is_no_figure():
    more = [*SAMPLES, ("d", None, 1, 9)]
    assert filtering(view(more), "right", ["votes"]) == filtering(view(), "right", ["votes"])
    assert filtering(view([("d", None, 1, 9)]), "right", []) is None
    none = filtering(view([("a", 1, 0, 1)]), "right", [])
    assert (none.precision, none.gap, none.relative_gap) == (None, None, None)


def test_it_is_read_back_as_it_was_written():
    found = filtering(view([*SAMPLES, *[(f"{prompt}x", *more) for prompt, *more in SAMPLES]]), "right", ["votes"])
    assert Filtering.from_json(found.to_json()) == found
    assert found.figures()["right_gap"] == found.gap.value and "right_auroc_votes" in found.figures()


@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.just(1), st.integers(0, 3)), min_size=2, max_size=9))
def test_auroc_of_one_prompt_is_the_share_of_pairs_in_order_with_ties_half(answers):
    frame = view([("a", *one) for one in answers])
    better = [(mine, other) for mine in answers for other in answers if mine[0] > other[0]]
    found = auroc(frame, "votes", "right")
    if not better:
        assert found is None
    else:
        ordered = sum(1.0 if mine[2] > other[2] else 0.5 * (mine[2] == other[2]) for mine, other in better)
        assert found.value == pytest.approx(ordered / len(better))
