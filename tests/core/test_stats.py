"""Intervals: against published examples, where none can be given, and how often they hold the truth."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from selfkd.core import stats
from selfkd.core.stats import Interval, Paired, change, interval, mean, newcombe, wilson


def bounds(found: Interval | None, digits: int) -> tuple[float, float]:
    assert found is not None
    return round(found.low, digits), round(found.high, digits)


def of(values: list[float]) -> dict[str, float]:
    return {f"{number:04x}": float(value) for number, value in enumerate(values)}


# ---- right values, from books ----


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_a_share_has_the_two_bounds_that_newcombe_printed(hits, count, low, high):
    assert bounds(interval(of([1.0] * hits + [0.0] * (count - hits))), 4) == (low, high)


@pytest.mark.parametrize(
    ("table", "low", "high", "digits"),
    [
        (Paired(36, 12, 2, 0), 0.0569, 0.3404, 4),  # Newcombe, Statistics in Medicine 17 (1998) 2635, method 10
        (Paired(14, 5, 0, 22), 0.011, 0.226, 3),  # Altman et al., Statistics with Confidence (2000), table 6.2
        (Paired(1, 1, 7, 12), -0.507, -0.026, 3),  # Fagerland et al., Statistics in Medicine 33 (2014): Bentur's children
    ],
)
def test_a_paired_change_has_the_bounds_of_the_books(table, low, high, digits):
    before = of([1.0] * table.both + [0.0] * table.gained + [1.0] * table.lost + [0.0] * table.neither)
    after = of([1.0] * table.both + [1.0] * table.gained + [0.0] * table.lost + [0.0] * table.neither)
    found = change(before, after)
    assert found is not None and found.prompts == len(before)
    assert found.value == pytest.approx((table.gained - table.lost) / len(before))
    assert bounds(found.interval, digits) == (low, high)


def test_no_hit_of_a_hundred_may_still_be_three_in_a_hundred():
    """Wilson's upper bound of 0 of n is z² / (n + z²): 3.8415 / 103.8415; the lower one of n of n is the rest."""
    assert bounds(interval(of([0.0] * 100)), 4) == (0.0, 0.0370)
    assert bounds(interval(of([1.0] * 100)), 4) == (0.9630, 1.0)


# ---- a change is paired ----


def test_a_change_is_the_mean_of_differences_on_shared_prompts():
    found = change({"a": 0.0, "b": 1.0, "c": 0.0, "only before": 1.0}, {"a": 1.0, "b": 1.0, "c": 0.0, "only after": 0.0})
    assert found is not None and found.interval is not None
    assert (found.value, found.prompts) == (pytest.approx(1 / 3), 3)
    assert found.interval.low < found.value < found.interval.high


def test_a_change_without_shared_prompts_is_not_known():
    assert change({"a": 1.0}, {"b": 1.0}) is None


def test_ten_prompts_without_a_change_still_leave_doubt():
    same = of([float(number % 2) for number in range(10)])
    found = change(same, same)
    assert found is not None and found.interval is not None
    assert found.value == 0.0
    assert found.interval.low < -0.05 and found.interval.high > 0.05


# ---- where nothing can be said, nothing is ----


@pytest.mark.parametrize("values", [[], [0.7], [0.5, 0.5, 0.5], [-3.0], [-2.0, -2.0]])
def test_numbers_that_say_nothing_of_the_next_one_have_no_interval(values):
    assert interval(of(values)) is None


@pytest.mark.parametrize(("before", "after"), [([0.2], [0.7]), ([0.5, 0.25], [0.5, 0.25]), ([1.0, 2.0], [2.0, 3.0])])
def test_a_change_that_says_nothing_of_the_next_prompt_has_no_interval(before, after):
    found = change(of(before), of(after))
    assert found is not None
    assert found.interval is None


def test_one_right_answer_says_little_but_not_nothing():
    """Wilson of 1 of 1: from 1 / (1 + z²) = 0.2065 to 1."""
    assert bounds(interval({"a": 1.0}), 4) == (0.2065, 1.0)


def test_the_mean_of_nothing_is_not_known_and_no_order_changes_a_mean():
    """Added up from left to right, 1e16 + 1 - 1e16 would be 0 in one order and 1 in another."""
    assert mean({}) is None
    assert mean({"a": 1e16, "b": 1.0, "c": -1e16, "d": 2.0}) == mean({"a": 1e16, "c": -1e16, "b": 1.0, "d": 2.0}) == 0.75


# ---- several answers, repeats, other numbers: contents are drawn, not prompts ----


def test_prompts_that_stand_twice_do_not_narrow_an_interval():
    once = of([float(number % 3 == 0) for number in range(60)])
    often = once | {f"{prompt}-{repeat}": value for prompt, value in once.items() for repeat in range(2, 21)}
    narrow, wide = interval(often), interval(once)
    assert narrow is not None and wide is not None
    assert narrow.high - narrow.low == pytest.approx(wide.high - wide.low, rel=0.1)  # not 4.5 times as narrow


def test_no_hit_among_prompts_that_stand_twice_counts_each_content_once():
    once = of([0.0] * 50)
    assert interval(once | {f"{prompt}-2": 0.0 for prompt in once}) == interval(once)


def test_a_prompt_that_stands_twice_counts_twice_in_the_change():
    found = change({"a": 0.0, "a-2": 0.0, "b": 0.0}, {"a": 1.0, "a-2": 1.0, "b": 0.0})
    assert found is not None and found.interval is not None
    assert found.value == pytest.approx(2 / 3)
    assert found.interval.low <= 2 / 3 <= found.interval.high


def test_the_interval_of_numbers_is_that_of_students_t_where_both_hold():
    """Of 200 normal numbers the bootstrap and t agree: mean ± 1.972 s / √200."""
    values = np.random.default_rng(5).normal(3.0, 2.0, 200)
    found = interval(of(values.tolist()))
    half = 1.972 * values.std(ddof=1) / np.sqrt(200)
    assert found is not None
    assert (found.low, found.high) == (
        pytest.approx(values.mean() - half, abs=0.03),
        pytest.approx(values.mean() + half, abs=0.03),
    )


def test_the_same_scores_have_the_same_interval_in_any_order_and_any_process():
    values = of([0.0, 0.25, 0.5, 0.75, 1.0] * 12)
    backwards = dict(reversed(values.items()))
    assert interval(values) == interval(backwards)
    code = f"from selfkd.core.stats import interval; print(interval({values}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == str(interval(values))


# ---- how often they hold the truth ----

RATES, SIZES = (0.02, 0.1, 0.5, 0.98), (40, 120, 500)
TRIALS = 3000


def held(samples: np.ndarray, truth: float, made: Callable[[np.ndarray], Interval]) -> float:
    """In what share of the samples the interval holds the truth; equal samples are looked at once."""
    different, times = np.unique(samples, axis=0, return_counts=True)
    found = (made(sample) for sample in different)
    return sum(int(many) for one, many in zip(found, times) if one.low <= truth <= one.high) / len(samples)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("rate", RATES)
def test_wilsons_bounds_hold_a_share_at_least_92_times_in_100(rate, count):
    hits = np.random.default_rng(1).binomial(count, rate, TRIALS)
    covered = held(hits, rate, lambda one: wilson(int(one), count))
    assert covered >= 0.92
    assert covered <= 0.98 or count * min(rate, 1 - rate) < 10


def cells(before: float, after: float, together: float) -> list[float]:
    """The chances of right on both sides, only after, only before, neither, for two rates and their correlation."""
    both = before * after + together * np.sqrt(before * (1 - before) * after * (1 - after))
    both = max(0.0, before + after - 1, min(both, before, after))
    return [both, after - both, before - both, 1 - before - after + both]


@pytest.mark.parametrize("together", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("before", RATES)
def test_newcombes_bounds_hold_a_change_at_least_92_times_in_100_and_not_always(before, count, together):
    chance = np.random.default_rng(2)
    for after in RATES:
        chances = cells(before, after, together)
        covered = held(chance.multinomial(count, chances, TRIALS), after - before, lambda one: newcombe(Paired(*map(int, one))))
        assert covered >= 0.92, (after, covered)
        assert covered <= 0.98 or count * (chances[1] + chances[2]) < 10, (after, covered)


def clustered(chance: np.random.Generator, rate: float, count: int) -> Callable[[], dict[str, float]]:
    """Four answers to each of `count` prompts, some of them harder than others, as means; the difficulties stay from call to call."""
    ease = chance.beta(2 * rate, 2 * (1 - rate), count)
    return lambda: of((chance.binomial(4, ease) / 4).tolist())


@pytest.mark.parametrize(
    ("rate", "count", "trials"),
    [
        (0.02, 40, 60),
        (0.5, 40, 60),
        *(pytest.param(rate, count, 1000, marks=pytest.mark.nightly) for rate in RATES for count in SIZES),
    ],
)
def test_bounds_of_several_answers_per_prompt_hold_the_truth_as_often(monkeypatch, rate, count, trials):
    monkeypatch.setattr(stats, "RESAMPLES", 500)
    chance = np.random.default_rng(3)
    of_mean = of_change = 0
    for _ in range(trials):
        answers = clustered(chance, rate, count)
        before, after = answers(), answers()
        found, changed = interval(before), change(before, after)
        assert found is not None and changed is not None and changed.interval is not None
        of_mean += found.low <= rate <= found.high
        of_change += changed.interval.low <= 0.0 <= changed.interval.high
    assert min(of_mean, of_change) / trials >= 0.92


# ---- what it costs ----


def test_nothing_of_scipy_is_loaded_before_an_interval_is_asked_for():
    loaded = "import sys, selfkd, selfkd.cli.main, selfkd.report.status, selfkd.report.verify, selfkd.recipe.lint"
    code = f"{loaded}; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
