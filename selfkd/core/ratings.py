"""Strengths from comparisons: the model of Bradley and Terry (1952), on the scale of Elo. Pure; knows no samples.

P(a beats b) = 1 / (1 + 10^((elo of b - elo of a) / 400)). The strengths are those under which the comparisons are likeliest; a tie is half
a win for each. An answer that won everything would be infinitely strong, so each also ties a tenth of a game with an answer of strength 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

SCALE = 400 / math.log(10)  # points of Elo per unit of log-odds
PRIOR = 0.1  # games that each answer ties with one of strength 0
CLOSE = 1e-10  # of a step in log-odds: far below the digits that are kept
MOST_STEPS = 200
DIGITS = 3  # of the scale: equal records are then equal numbers, on every machine

Game = tuple[str, str, float, float]  # two names, what the first one got (1, 0, or between), and how much it counts


def elo(games: Iterable[Game]) -> dict[str, float]:
    """Return {name: strength}, around 0, of all that were compared with any weight; the order of games changes nothing.

    >>> elo([("a", "b", 1.0, 1.0), ("b", "c", 0.5, 1.0), ("c", "a", 0.0, 1.0)])
    {'a': 491.55, 'b': -165.907, 'c': -165.907}
    """
    import numpy as np

    counted = sorted(game for game in games if game[3] > 0)
    names = sorted({name for game in counted for name in game[:2]})
    place = {name: at for at, name in enumerate(names)}
    played, won = np.zeros((2, len(names), len(names)))
    for first, second, value, weight in counted:
        one, other = place[first], place[second]
        won[one, other] += value * weight
        won[other, one] += (1 - value) * weight
        played[[one, other], [other, one]] += weight
    strengths = np.zeros(len(names))
    for _ in range(MOST_STEPS):
        expected = 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
        at_zero = 1 / (1 + np.exp(-strengths))
        slope = (won - played * expected).sum(1) + PRIOR * (0.5 - at_zero)
        bends = played * expected * (1 - expected)
        curve = np.diag(bends.sum(1) + PRIOR * at_zero * (1 - at_zero)) - bends
        step = np.linalg.solve(curve, slope)
        strengths = strengths + np.clip(step, -1.0, 1.0)
        if np.abs(step).max(initial=0.0) < CLOSE:
            break
    return {name: round(float(value) * SCALE, DIGITS) + 0.0 for name, value in zip(names, strengths, strict=True)}
