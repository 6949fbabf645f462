"""Strengths from comparisons: values by hand, an independent optimiser, and what must hold of any comparisons."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from selfkd.core import ratings
from selfkd.core.ratings import PRIOR, SCALE, elo

NAMES = st.sampled_from("abcdef")
GAMES = st.lists(
    st.tuples(NAMES, NAMES, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0, 3.0])).filter(
        lambda game: game[0] != game[1]
    ),
    max_size=30,
)


def test_the_examples_hold():
    assert doctest.testmod(ratings).failed == 0


def test_a_quarter_of_a_game_won_makes_odds_of_nine_to_one():
    """With x = e^t for the winner and 1/x for the loser the likelihood is flat where w / (1 + x²) = (p / 2) (x - 1) / (x + 1).

    w = 1/4 and p = 1/10: at x = 3 both sides are 1/40. The two are 3 and 1/3, so 400 log10(3) = 190.849 points either side of 0.
    """
    assert PRIOR == 0.1
    assert elo([("a", "b", 1.0, 0.25)]) == {"a": 190.849, "b": -190.849}
    assert elo([("b", "a", 0.0, 0.25)]) == {"a": 190.849, "b": -190.849}


def test_a_tie_is_half_a_win_for_each():
    assert elo([("a", "b", 0.5, 4.0)]) == {"a": 0.0, "b": 0.0}
    twice = [("a", "b", 1.0, 1.0), ("a", "b", 0.0, 1.0)]
    assert elo([*twice, ("b", "c", 1.0, 1.0)]) == elo([("a", "b", 0.5, 2.0), ("b", "c", 1.0, 1.0)])


def test_many_games_come_to_the_log_odds_of_their_shares():
    """Three wins in four are odds of 3, and 400 log10(3) = 190.849 apart; the tenth of a game does not show in 4,000,000."""
    found = elo([("a", "b", 1.0, 3e6), ("a", "b", 0.0, 1e6)])
    assert found["a"] - found["b"] == pytest.approx(190.849, abs=0.01)


def test_who_was_not_compared_with_any_weight_has_no_strength():
    assert elo([]) == {}
    assert elo([("a", "b", 1.0, 0.0), ("c", "d", 1.0, 1.0)]).keys() == {"c", "d"}


def test_the_stronger_one_of_a_cycle_with_one_more_win_is_first():
    found = elo([("a", "b", 1.0, 1.0), ("b", "c", 1.0, 1.0), ("c", "a", 1.0, 1.0)])
    assert set(found.values()) == {0.0}
    more = elo([("a", "b", 1.0, 2.0), ("b", "c", 1.0, 1.0), ("c", "a", 1.0, 1.0)])
    assert more["a"] > more["c"] > more["b"]  # c beat the strongest, b lost to it


def likeliest(games: list[ratings.Game]) -> dict[str, float]:
    """The same strengths by a general optimiser over the likelihood as it is written down."""
    counted = [game for game in games if game[3] > 0]
    names = sorted({name for game in counted for name in game[:2]})

    def loss(theta: np.ndarray) -> float:
        of = dict(zip(names, theta, strict=True))
        played = sum(
            w * (v * math.log(expit(of[a] - of[b])) + (1 - v) * math.log(expit(of[b] - of[a]))) for a, b, v, w in counted
        )
        tied = sum(PRIOR / 2 * (math.log(expit(t)) + math.log(expit(-t))) for t in theta)
        return -(played + tied)

    found = minimize(loss, np.zeros(len(names)), method="BFGS", options={"gtol": 1e-7}) if names else None
    return {} if found is None else dict(zip(names, found.x * SCALE, strict=True))


@given(GAMES)
def test_the_strengths_are_those_of_the_greatest_likelihood(games):
    found, wanted = elo(games), likeliest(games)
    assert found.keys() == wanted.keys()
    assert all(abs(found[name] - wanted[name]) < 1.0 for name in found)


@given(GAMES, st.randoms())
def test_the_order_of_games_and_the_side_they_are_told_from_change_nothing(games, random):
    turned = [(b, a, 1 - v, w) if random.random() < 0.5 else (a, b, v, w) for a, b, v, w in games]
    random.shuffle(turned)
    first, second = elo(games), elo(turned)
    assert first.keys() == second.keys()
    assert all(abs(first[name] - second[name]) <= 0.002 for name in first)


@given(GAMES)
def test_strengths_are_finite_and_lie_around_zero(games):
    found = elo(games)
    assert all(math.isfinite(value) for value in found.values())
    beats_zero = math.fsum(
        expit(value / SCALE) for value in found.values()
    )  # where the likelihood is flat, the ties with 0 balance
    assert beats_zero == pytest.approx(len(found) / 2, abs=0.001)
