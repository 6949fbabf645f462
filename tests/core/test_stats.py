"""The interval of a change: against a book, and against chance."""

from __future__ import annotations

import math
import random

import pytest

from selfkd.core.stats import change, interval


def test_a_change_is_the_mean_of_differences_on_shared_prompts():
    found = change({"a": 0.0, "b": 1.0, "c": 0.0, "only before": 1.0}, {"a": 1.0, "b": 1.0, "c": 0.0, "only after": 0.0})
    assert found is not None
    assert (found.value, found.prompts) == (pytest.approx(1 / 3), 3)
    assert found.low < found.value < found.high


def test_a_change_without_shared_prompts_is_not_known():
    assert change({"a": 1.0}, {"b": 1.0}) is None


def test_ten_prompts_without_a_change_still_leave_doubt():
    same = {str(number): float(number % 2) for number in range(10)}
    found = change(same, same)
    assert found is not None
    assert found.value == 0.0
    assert found.low < -0.1 < 0.1 < found.high


def test_the_interval_of_the_prime_ministers_approval_agrees_with_the_book():
    """Agresti, Categorical Data Analysis, 10.1: of 1600 asked twice 150 left, 86 came; 95 % interval (-0.06, -0.02)."""
    before = {str(number): float(number < 944) for number in range(1600)}
    after = {str(number): float(number < 794 or 944 <= number < 944 + 86) for number in range(1600)}
    found = change(before, after)
    assert found is not None
    assert (found.value, found.low, found.high) == (
        pytest.approx(-0.04),
        pytest.approx(-0.0587, abs=5e-4),
        pytest.approx(-0.0213, abs=5e-4),
    )


@pytest.mark.parametrize("draws", [1, 4])
def test_the_interval_covers_the_truth_about_95_times_in_100(draws):
    """Paired answers of 60 prompts, before right with 0.4, after with 0.55, dependent through the prompt's difficulty."""
    chance, hits, trials = random.Random(0), 0, 1500
    for _ in range(trials):
        ease = [chance.random() for _ in range(60)]
        rates = {"before": [e * 0.8 for e in ease], "after": [min(1.0, e * 1.1) for e in ease]}
        truth = sum(rates["after"]) / 60 - sum(rates["before"]) / 60
        sides = [
            {str(i): sum(chance.random() < r for _ in range(draws)) / draws for i, r in enumerate(rates[side])}
            for side in rates
        ]
        found = change(*sides)
        assert found is not None
        hits += found.low <= truth <= found.high
    assert hits / trials > 0.94


def test_a_share_of_no_hits_is_not_certain() -> None:
    assert round(interval([0.0] * 100), 4) == round(interval([1.0] * 100), 4) == 0.0185
    assert interval([0.0, 1.0] * 50) > interval([0.0, 1.0] * 500) > 0


def test_the_interval_of_numbers_is_the_normal_one() -> None:
    assert math.isclose(interval([1.0, 2.0, 3.0]), 1.96 / math.sqrt(3))
    assert math.isnan(interval([]))
