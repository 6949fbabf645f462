"""What a vote among k of n answers gets: the mean over every way to draw them, counted and not drawn. Knows nothing of runs or files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache


def plurality(scores: Sequence[float], keys: Sequence[float | None], k: int) -> float:
    """Return maj@k, without bias: the mean score of the answer that most of k give, over all ways to draw k of these.

    Answers of one key agree. Keys that tie share the draw, and an answer without a key has no vote: where none of the k has one, the mean
    score of the k counts. ValueError for more draws than answers.

    >>> plurality([1, 1, 0], [7, 7, 2], 3), plurality([1, 1, 0], [7, 7, 2], 2), plurality([1, 0], [7, None], 1)
    (1.0, 0.6666666666666666, 0.5)
    """
    if k > len(scores):
        raise ValueError(f"{k} answers cannot be drawn of {len(scores)}")
    of_key: dict[float | None, list[float]] = defaultdict(list)
    for score, key in zip(scores, keys, strict=True):
        of_key[key].append(score)
    silent = of_key.pop(None, [])
    sizes = tuple(sorted(map(len, of_key.values())))
    parts = [_wins(len(values), sizes, len(silent), k) * _mean(values) for values in of_key.values()]
    none = Fraction(math.comb(len(silent), k), math.comb(len(scores), k))
    return float(math.fsum([*parts, *([float(none) * _mean(silent)] if none else [])]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@cache
def _wins(size: int, sizes: tuple[int, ...], silent: int, k: int) -> float:
    """Return the chance that an answer which `size` of all give wins among k, as its share of a tie; `sizes` are those of every answer."""
    others = list(sizes)
    others.remove(size)
    won = Fraction(0)
    for votes in range(max(1, k - sum(others) - silent), min(size, k) + 1):  # as many as are left over at the least
        ways = _ways_below(others, votes, silent, k - votes)
        won += math.comb(size, votes) * sum((Fraction(count, ties + 1) for ties, count in ways), Fraction(0))
    return float(won / math.comb(sum(sizes) + silent, k))


def _ways_below(sizes: Sequence[int], votes: int, silent: int, left: int) -> Iterable[tuple[int, int]]:
    """Return (ties, ways) to draw the `left` answers that others give so that none has more than `votes`, and so many have as many."""
    free = silent + sum(size for size in sizes if size < votes)  # which cannot reach it, however many of them are drawn
    ways: dict[tuple[int, int], int] = {(0, 0): 1}  # {(drawn, ties): ways}
    for size in (size for size in sizes if size >= votes):
        more: dict[tuple[int, int], int] = defaultdict(int)
        for (drawn, ties), count in ways.items():
            for own in range(min(size, votes, left - drawn) + 1):
                more[drawn + own, ties + (own == votes)] += count * math.comb(size, own)
        ways = more
    return [(ties, count * math.comb(free, left - drawn)) for (drawn, ties), count in ways.items()]
