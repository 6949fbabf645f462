"""How sure a number is: the 95 % interval of a mean, and of a change on the same prompts. Knows nothing of runs or files.

Right-or-wrong scores of distinct prompts have Wilson's interval (1927), and their change has Newcombe's, which is made of Wilson's
(1998, his tenth method). Everything else has a bootstrap over contents, because several answers to one prompt, and prompts that
stand there twice, say less than as many prompts would. Where nothing can be said there is no interval.

numpy and scipy are loaded when an interval is asked for: that takes a second, which readers of a run do without.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 4000  # a bound then moves by about 2 % of the width from seed to seed
CELLS = 1 << 22  # numbers of a bootstrap that are in memory at once
ENOUGH = 10  # contents must differ from the rest before resampling them says how much they vary
REPEAT = re.compile(r"-\d+$")  # what ends the id of a prompt whose content stands there already


@dataclass(frozen=True)
class Interval:
    """The two bounds of a 95 % interval; not of one width on both sides."""

    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """The mean difference on prompts that both sides scored, its interval where there is one, and how many prompts that were."""

    value: float
    interval: Interval | None
    prompts: int


@dataclass(frozen=True)
class Paired:
    """How many prompts were right on both sides, only after, only before, and on neither."""

    both: int
    gained: int
    lost: int
    neither: int


def mean(scores: Mapping[str, float]) -> float | None:
    """Return the mean over prompts, exactly rounded whatever the order; None of no prompts."""
    return math.fsum(scores.values()) / len(scores) if scores else None


def pass_at(scores: Sequence[float], k: int) -> float:
    """Return the chance that at least one of `k` answers drawn from these is right (score 1 or more), without bias.

    1 - C(n - right, k) / C(n, k), as Chen et al. 2021 (arXiv 2107.03374) have it. ValueError for more draws than answers.

    >>> pass_at([1, 0, 0, 0], 2), pass_at([1, 0, 0, 0], 1), pass_at([1, 1, 1, 0], 2)
    (0.5, 0.25, 1.0)
    """
    if k > len(scores):
        raise ValueError(f"{k} answers cannot be drawn of {len(scores)}")
    wrong = sum(score < 1 for score in scores)
    return 1 - math.comb(wrong, k) / math.comb(len(scores), k)


def interval(scores: Mapping[str, float]) -> Interval | None:
    """Return the interval of the mean of `scores` (prompt id -> mean score); None where these say nothing about the next prompt."""
    contents = _contents(scores)
    if not contents:
        return None
    if _yes_no(scores) and len(contents) == len(scores):
        return wilson(round(math.fsum(scores.values())), len(scores))
    shares = [math.fsum(values) / len(values) for values in contents]
    extreme = max((0.0, 1.0), key=shares.count)
    if _within_one(scores) and _hardly_differ(shares, lambda share: share == extreme) and (_yes_no(scores) or len(shares) > 1):
        apart = math.ceil(math.fsum(abs(share - extreme) for share in shares))
        found = wilson(apart if extreme == 0.0 else len(shares) - apart, len(shares))
        return _holding(found, math.fsum(scores.values()) / len(scores))
    return _bootstrap(contents)


def interval_of_all(groups: Mapping[str, Sequence[float]]) -> Interval | None:
    """Return the interval of the mean over all values of `groups` (prompt id -> its values), where prompts are what was drawn.

    Where nearly all prompts are right or wrong throughout, each counts as one, which is never too narrow.
    """
    merged: dict[str, list[float]] = {}
    for prompt in sorted(groups):
        merged.setdefault(REPEAT.sub("", prompt), []).extend(groups[prompt])
    contents = [values for values in merged.values() if values]
    if not contents:
        return None
    shares = [math.fsum(values) / len(values) for values in contents]
    extreme = max((0.0, 1.0), key=shares.count)
    if _within_one(dict(enumerate(shares))) and _hardly_differ(shares, lambda share: share == extreme) and len(shares) > 1:
        apart = math.ceil(math.fsum(abs(share - extreme) for share in shares))
        found = wilson(apart if extreme == 0.0 else len(shares) - apart, len(shares))
        return _holding(found, math.fsum(map(math.fsum, contents)) / sum(map(len, contents)))
    return _bootstrap(contents)


def change(before: Mapping[str, float], after: Mapping[str, float]) -> Change | None:
    """Return the paired change from `before` to `after` (prompt id -> mean score); None where they share no prompt.

    Pairing takes the difficulty of the prompts out of the interval.
    """
    shared = sorted(before.keys() & after.keys())
    if not shared:
        return None
    value = math.fsum(after[prompt] - before[prompt] for prompt in shared) / len(shared)
    sides = [{prompt: side[prompt] for prompt in shared} for side in (before, after)]
    return Change(value, _interval_of_change(value, *sides), len(shared))


def _interval_of_change(value: float, before: Mapping[str, float], after: Mapping[str, float]) -> Interval | None:
    contents = [_contents(side) for side in (before, after)]
    pairs = [tuple(math.fsum(values) / len(values) for values in both) for both in zip(*contents, strict=True)]
    yes_no = _yes_no(before) and _yes_no(after)
    if yes_no and len(pairs) == len(before):
        return newcombe(_table(pairs))
    if _within_one(before) and _within_one(after) and _hardly_differ(pairs, _same_extreme) and (yes_no or len(pairs) > 1):
        return _holding(newcombe(_table(pairs)), value)
    return _bootstrap(_contents({prompt: after[prompt] - before[prompt] for prompt in before}))


# ---- what kind of scores ----


def _contents(scores: Mapping[str, float]) -> list[list[float]]:
    """Return the scores of each content, in the order of ids: repeats of a prompt (`ab12`, `ab12-2`) are one content."""
    found: dict[str, list[float]] = {}
    for prompt in sorted(scores):
        found.setdefault(REPEAT.sub("", prompt), []).append(scores[prompt])
    return list(found.values())


def _yes_no(scores: Mapping[str, float]) -> bool:
    return all(score in (0.0, 1.0) for score in scores.values())


def _within_one(scores: Mapping[Any, float]) -> bool:
    return all(0.0 <= score <= 1.0 for score in scores.values())


def _hardly_differ(contents: Sequence[object], settled: Callable[..., bool]) -> bool:
    """Whether nearly all contents are always right or always wrong: too few others are left to resample.

    A bootstrap of 0 of 100 would be [0, 0]. Each content then counts as one prompt, which is never too narrow.
    """
    others = sum(not settled(one) for one in contents)
    return others < ENOUGH and 2 * others < len(contents)


def _same_extreme(pair: tuple[float, float]) -> bool:
    return pair in ((0.0, 0.0), (1.0, 1.0))


def _table(pairs: Sequence[tuple[float, ...]]) -> Paired:
    """Return the table of pairs of shares: each content lies in up to two of its cells, and a started change counts as a whole one."""
    gained = math.ceil(math.fsum(max(0.0, after - before) for before, after in pairs))
    lost = math.ceil(math.fsum(max(0.0, before - after) for before, after in pairs))
    both = min(round(math.fsum(min(pair) for pair in pairs)), len(pairs) - gained - lost)
    return Paired(both, gained, lost, len(pairs) - both - gained - lost)


def _holding(found: Interval, value: float) -> Interval:
    return Interval(min(found.low, value), max(found.high, value))


# ---- intervals ----


@cache
def wilson(hits: int, count: int) -> Interval:
    """Return Wilson's score interval of a share, so that 0 of 100 is [0, 0.037] and not [0, 0]."""
    from scipy.stats import binomtest

    found = binomtest(hits, count).proportion_ci(LEVEL, method="wilson")
    return Interval(float(found.low), float(found.high))


def newcombe(table: Paired) -> Interval:
    """Return Newcombe's interval of a paired change: Wilson's arms of both shares, joined by how far the two go together."""
    count = table.both + table.gained + table.lost + table.neither
    hits_after, hits_before = table.both + table.gained, table.both + table.lost
    after, before = wilson(hits_after, count), wilson(hits_before, count)
    up, down = after.high - hits_after / count, hits_after / count - after.low
    up_before, down_before = before.high - hits_before / count, hits_before / count - before.low
    value, together = (table.gained - table.lost) / count, _together(table, count)
    low = value - math.sqrt(max(0.0, down**2 - 2 * together * down * up_before + up_before**2))
    high = value + math.sqrt(max(0.0, up**2 - 2 * together * up * down_before + down_before**2))
    return Interval(max(-1.0, low), min(1.0, high))


def _together(table: Paired, count: int) -> float:
    """Return the correlation phi of a table, drawn half a prompt per cell towards 0 where it is above; 0 where a side never varies."""
    right, right_before = table.both + table.gained, table.both + table.lost
    spread = right * (count - right) * right_before * (count - right_before)
    if not spread:
        return 0.0
    cross = table.both * table.neither - table.gained * table.lost
    return (max(0.0, cross - count / 2) if cross > 0 else cross) / math.sqrt(spread)


def _bootstrap(contents: Sequence[Sequence[float]]) -> Interval | None:
    """Return the interval of the mean score by drawing whole contents again and again, seeded; None where they are all equal.

    It is as much wider than the plain percentiles as Student's t is than the normal distribution (Hesterberg 2015).
    """
    sums, sizes = [math.fsum(values) for values in contents], [len(values) for values in contents]
    if len({total / size for total, size in zip(sums, sizes, strict=True)}) < 2:
        return None
    import numpy as np
    from scipy import stats

    count = len(contents)
    tail = stats.norm.sf(math.sqrt(count / (count - 1)) * stats.t.isf((1 - LEVEL) / 2, count - 1))
    found = stats.bootstrap(
        (np.array(sums), np.array(sizes)),
        _ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=RESAMPLES,
        batch=max(1, CELLS // count),
        confidence_level=1 - 2 * tail,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(found.low), float(found.high)) if found.low < found.high else None


def _ratio(sums: NDArray[np.float64], sizes: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = sums.sum(axis=axis) / sizes.sum(axis=axis)
    return ratio
