"""How sure a change is: the interval of a difference on the same prompts. Knows nothing of runs or files.

The interval of a single mean is `tables.interval`; the verbs need it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def interval(values: Sequence[float], confidence: float = 1.96) -> float:
    """Half-width of the normal 95 % interval of a mean; Wilson's for 0/1 values, so that 0 of 100 is not '± 0'."""
    n = len(values)
    if n == 0:
        return math.nan
    mean = sum(values) / n
    if all(value in (0.0, 1.0) for value in values):
        return confidence / (1 + confidence**2 / n) * math.sqrt(mean * (1 - mean) / n + confidence**2 / (4 * n * n))
    return confidence * math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, n - 1) / n)


CONFIDENCE = 1.96  # 95 % of a normal distribution


@dataclass(frozen=True)
class Change:
    """The mean difference on prompts that both sides answered, its 95 % interval, and how many prompts that were."""

    value: float
    low: float
    high: float
    prompts: int


def change(before: Mapping[str, float], after: Mapping[str, float]) -> Change | None:
    """The paired change from `before` to `after` (prompt id -> mean score); None where they share no prompt.

    Pairing takes the difficulty of the prompts out of the interval. Each prompt is one cluster, however many answers it has.
    """
    shared = sorted(before.keys() & after.keys())
    if not shared:
        return None
    differences = [after[prompt] - before[prompt] for prompt in shared]
    value = sum(differences) / len(differences)
    yes_no = all(side[prompt] in (0.0, 1.0) for side in (before, after) for prompt in shared)
    low, high = _agresti_min(differences) if yes_no else _normal(differences, value)
    return Change(value, min(value, low), max(value, high), len(shared))


def _agresti_min(differences: Sequence[float]) -> tuple[float, float]:
    """Agresti and Min (2005) for paired 0/1 scores: half a prompt more in each cell of the two-by-two table.

    So "no prompt of ten changed" is not "± 0", as the plain normal interval would have it.
    """
    total = len(differences) + 2
    won = sum(difference > 0 for difference in differences) + 0.5
    lost = sum(difference < 0 for difference in differences) + 0.5
    centre = (won - lost) / total
    half = CONFIDENCE * math.sqrt(won + lost - (won - lost) ** 2 / total) / total
    return max(-1.0, centre - half), min(1.0, centre + half)


def _normal(differences: Sequence[float], mean: float) -> tuple[float, float]:
    count = len(differences)
    if count < 2:
        return -math.inf, math.inf  # one prompt says nothing about the next
    spread = sum((difference - mean) ** 2 for difference in differences) / (count - 1)
    half = CONFIDENCE * math.sqrt(spread / count)
    return mean - half, mean + half
