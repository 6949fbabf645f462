"""What a reader is told of a filter that gold was held against: a line per round and gold score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfkd.core.filters import Filtering
from selfkd.core.stats import Interval


def lines(found: Sequence[Filtering]) -> Iterator[str]:
    """Yield what each gold score says of the samples that were kept.

    >>> list(lines([Filtering("right", 40, 10, 0.9, Interval(0.8, 1.0), None, 0.25)]))
    ['by right, which did not choose: precision 90.0 % [80.0, 100.0] of 10 kept of 40; relative gap +0.25']
    """
    for one in found:
        if one.precision is None:
            yield f"by {one.gold}, which did not choose: none of {one.sampled} was kept"
            continue
        parts = [f"precision {_share(one.precision)}{_bounds(one.interval)} of {one.kept} kept of {one.sampled}"]
        if one.gap:
            parts.append(f"GV gap {100 * one.gap.value:+.1f}{_bounds(one.gap.interval)}")
        parts += [f"relative gap {one.relative_gap:+.2g}"] if one.relative_gap is not None else []
        for name, ranking in one.auroc.items():
            parts.append(f"AUROC of {name} {ranking.value:.2f}{_bounds(ranking.interval, 1, 2)} on {ranking.prompts} prompts")
        yield f"by {one.gold}, which did not choose: " + "; ".join(parts)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bounds(found: Interval | None, scale: int = 100, digits: int = 1) -> str:
    return f" [{scale * found.low:z.{digits}f}, {scale * found.high:z.{digits}f}]" if found else ""
