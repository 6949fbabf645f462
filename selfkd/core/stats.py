"""How sure a number is: the interval of a mean, and of a difference on the same prompts. Knows nothing of runs or files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEVIATIONS_95 = 1.96  # standard deviations around the mean that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Change:
    """The mean difference on prompts that both sides answered, its 95 % interval, and how many prompts that were."""

    value: float
    low: float
    high: float
    prompts: int


def interval(values: Sequence[float]) -> float:
    """Return the half-width of the 95 % interval of a mean: Wilson's for 0/1 values, so that 0 of 100 is not '± 0'."""
    count = len(values)
    if count == 0:
        return math.nan
    mean = sum(values) / count
    if all(value in (0.0, 1.0) for value in values):
        return _wilson(mean, count)
    return _normal(values, mean)


def change(before: Mapping[str, float], after: Mapping[str, float]) -> Change | None:
    """Return the paired change from `before` to `after` (prompt id -> mean score); None where they share no prompt.

    Pairing takes the difficulty of the prompts out of the interval. Each prompt is one cluster, however many answers it has.
    """
    shared = sorted(before.keys() & after.keys())
    if not shared:
        return None
    differences = [after[prompt] - before[prompt] for prompt in shared]
    value = sum(differences) / len(differences)
    yes_no = all(side[prompt] in (0.0, 1.0) for side in (before, after) for prompt in shared)
    low, high = _agresti_min(differences) if yes_no else _around(value, differences)
    return Change(value, min(value, low), max(value, high), len(shared))


def _normal(values: Sequence[float], mean: float) -> float:
    """Return the half-width of the normal interval; of a single value it is 0."""
    count = len(values)
    return DEVIATIONS_95 * math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, count - 1) / count)


def _wilson(share: float, count: int) -> float:
    """Return the half-width of Wilson's interval (1927) of a share of `count` yes-or-no values."""
    z = DEVIATIONS_95
    return z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count * count))


def _agresti_min(differences: Sequence[float]) -> tuple[float, float]:
    """Return the interval of Agresti and Min (2005) for paired 0/1 scores: half a prompt more in each cell of the 2x2 table.

    So "no prompt of ten changed" is not "± 0", as the plain normal interval would have it.
    """
    total = len(differences) + 2
    won = sum(difference > 0 for difference in differences) + 0.5
    lost = sum(difference < 0 for difference in differences) + 0.5
    centre = (won - lost) / total
    half = DEVIATIONS_95 * math.sqrt(won + lost - (won - lost) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def _around(mean: float, differences: Sequence[float]) -> tuple[float, float]:
    if len(differences) < 2:
        return -math.inf, math.inf  # one prompt says nothing about the next
    half = _normal(differences, mean)
    return mean - half, mean + half
