"""Whether what was measured is what the answers come to: the means of each measure step, and the changes against the base that `keep_if` asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfkd.chain import measured, ways
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit
from selfkd.core.stats import mean
from selfkd.steps.measure import CHANGES

KINDS = tuple(f"_{name}" for name in CHANGES)


def problems(
    paths: Paths, commits: Sequence[Commit], metrics: Mapping[str, Any], told: Mapping[str, Any], again: bool
) -> Iterator[str]:
    """Yield where the metrics of a seal are neither those that its steps `told` nor changes; with `again`, those changes' values too."""
    more = {name: value for name, value in metrics.items() if name not in told}
    if {name: metrics.get(name) for name in told} != told or not all(name.endswith(KINDS) for name in more):
        yield "its metrics are not those of its steps"
    elif more and again:
        found: dict[str, float | None] = {}
        for one in measured.measurements(paths, commits).values():
            found |= measured.changes(one)
        for name, value in more.items():
            if name not in found:
                yield f"{name} is a change of what no step of it measured"
            elif found[name] != value:
                yield f"{name} is {value}, and the answers come to {found[name]}"


def of_answers(paths: Paths, commit: Commit) -> Iterator[str]:
    """Yield each mean of a measure step that is not that of the scores which lie beside it."""
    if not commit.outside:
        return
    place = measured.place_of(commit)
    for score in ways.scores_of(commit.identity):
        means = measured.prompt_means(paths, commit, score)
        for name, found in ((score, mean(means)), (f"{score}_scored", len(means))):
            told = commit.metrics.get(f"{place}/{name}", found)
            if not _same(told, found):
                yield f"{place}/{name} is {told}, and the scores come to {found}"


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)  # a last digit is one of the machine's
