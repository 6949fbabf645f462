"""Which two answers become a pair, and which part of them. Pure; knows neither tables nor losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Literal

Match = Literal["cycle", "spread", "product", "parent"]
Pair = tuple[str, str]


def matched(
    chosen: Sequence[str], rejected: Sequence[str], match: Match, most: int, parents: Mapping[str, Sequence[str]]
) -> list[Pair]:
    """Return at most `most` pairs of one prompt, none twice and none of a sample with itself.

    cycle walks both lists side by side, and the shorter one starts over. spread goes on where that comes round, with one side shifted by
    one, until all were with all. product takes the first with all, then the next. parent takes each rejected answer with the first
    chosen one that was made from it; `parents` says of each sample what it was made from.

    >>> matched(["a", "b"], ["x", "y", "z"], "cycle", 4, {})
    [('a', 'x'), ('b', 'y'), ('a', 'z'), ('b', 'x')]
    >>> matched(["a", "b"], ["x", "y"], "spread", 9, {})
    [('a', 'x'), ('b', 'y'), ('a', 'y'), ('b', 'x')]
    >>> matched(["a", "b"], ["x", "y", "z"], "product", 4, {})
    [('a', 'x'), ('a', 'y'), ('a', 'z'), ('b', 'x')]
    >>> matched(["a", "b", "c"], ["x", "y"], "parent", 4, {"a": ["y"], "b": ["x"], "c": ["x"]})
    [('b', 'x'), ('a', 'y')]
    """
    if match == "cycle":
        turns = ((chosen[turn % len(chosen)], rejected[turn % len(rejected)]) for turn in range(most))
        return list(dict.fromkeys(pair for pair in turns if pair[0] != pair[1]))
    found: Iterator[Pair] = product(chosen, rejected)
    if match == "spread":
        found = _spread(chosen, rejected)
    elif match == "parent":
        found = _of_parents(chosen, rejected, parents)
    return list(islice((pair for pair in found if pair[0] != pair[1]), most))


def _spread(chosen: Sequence[str], rejected: Sequence[str]) -> Iterator[Pair]:
    turns = math.lcm(len(chosen), len(rejected))  # until the same two would meet again
    for turn in range(len(chosen) * len(rejected)):
        yield chosen[turn % len(chosen)], rejected[(turn + turn // turns) % len(rejected)]


def _of_parents(chosen: Sequence[str], rejected: Sequence[str], parents: Mapping[str, Sequence[str]]) -> Iterator[Pair]:
    for one in rejected:
        made = next((name for name in chosen if one in parents.get(name, ())), None)
        if made is not None:
            yield made, one


def differing_step(chosen: str, rejected: str, end: str) -> Pair:
    """Return both texts up to the first step in which they differ, that step included; `end` is what ends a step.

    >>> differing_step("1 + 2 = 3; 3 + 4 = 7; so 7", "1 + 2 = 3; 3 + 4 = 8; so 8", "; ")
    ('1 + 2 = 3; 3 + 4 = 7', '1 + 2 = 3; 3 + 4 = 8')
    """
    both = [text.split(end) for text in (chosen, rejected)]
    shared = next((at for at, (one, other) in enumerate(zip(*both, strict=False)) if one != other), min(map(len, both)))
    return end.join(both[0][: shared + 1]), end.join(both[1][: shared + 1])
