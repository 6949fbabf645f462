"""Whether the changes against the base that a seal holds for `keep_if` are what the answers of both rounds come to: worked out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfkd.chain import measured
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit
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
