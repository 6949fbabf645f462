"""What judgments come to: the verdicts of both orders as scores, and how far a judge can be believed. Pure; asks nobody.

A judge prefers what it is shown first and what is longer (Zheng et al. 2023, arXiv 2306.05685). Neither can be seen in one judgment, and
both in many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Orders = Literal["agree", "average", "balance"]
Row = dict[str, Any]
DISAGREE = "the two orders disagree"


@dataclass(frozen=True)
class Judgment:
    """One judgment as read: which samples were shown in which order, and the value of the first one, None where there is none.

    `number` counts the draws, or draws and criteria; `criterion` is the name of one.
    """

    id: str
    prompt: str
    shown: tuple[str, ...]
    number: int
    value: float | None
    why: str
    criterion: str = ""


# ---- scores ----


def score_row(
    sample: str, name: str, value: float | None, why: str, draw: int = 0, weight: float = 1.0, versus: str = ""
) -> Row:
    """Return a row of table `scores`."""
    return {
        "sample": sample,
        "name": name,
        "draw": draw,
        "versus": versus or None,
        "value": value,
        "weight": weight,
        "why": why or None,
    }


def of_verdicts(judgments: Iterable[Judgment], name: str, orders: Orders) -> list[Row]:
    """Return two score rows per comparison, one for each of its samples: 1 where it won, 0 where it lost, 0.5 for a tie.

    agree: one per draw, None where the two orders do not say the same. average: one per order, each counting alike. balance: each
    counting by how rarely its place wins, so that a place that always wins counts nothing (Meta-Rewarding, arXiv 2407.19594).
    """
    judgments = list(judgments)
    weights = _weights(judgments) if orders == "balance" else {}
    rows: list[Row] = []
    for there, back in _both_orders(judgments):
        if orders == "agree":
            value, why = _agreed(there, back)
            rows += _two_rows(there.shown, name, value, why, there.number, 1.0)
            continue
        for turn, one in enumerate((there, back)):
            value = one.value if one.value is None or one is there else 1.0 - one.value
            weight = 1.0 if one.value is None else weights.get(one.value, 1.0)
            rows += _two_rows(there.shown, name, value, one.why, 2 * there.number + turn, weight)
    return rows


def _both_orders(judgments: Iterable[Judgment]) -> list[tuple[Judgment, Judgment]]:
    """Return the two judgments of each comparison and draw, that which shows the smaller id first before the other."""
    found = {(*one.shown, one.number): one for one in judgments}
    return [(one, found[one.shown[1], one.shown[0], one.number]) for one in found.values() if one.shown[0] < one.shown[1]]


def _agreed(there: Judgment, back: Judgment) -> tuple[float | None, str]:
    if there.value is None or back.value is None:
        return None, there.why or back.why
    return (there.value, "") if there.value == 1.0 - back.value else (None, DISAGREE)


def _two_rows(shown: Sequence[str], name: str, value: float | None, why: str, draw: int, weight: float) -> list[Row]:
    first, second = shown
    other = None if value is None else 1.0 - value
    return [
        score_row(first, name, value, why, draw, weight, second),
        score_row(second, name, other, why, draw, weight, first),
    ]


def _weights(judgments: Sequence[Judgment]) -> dict[float, float]:
    """Return {value of the first: weight}: a win at one place counts as often as the other place wins; 1 each without bias."""
    won = sum(one.value == 1.0 for one in judgments)
    lost = sum(one.value == 0.0 for one in judgments)
    return {1.0: 2 * lost / (won + lost), 0.0: 2 * won / (won + lost)} if won + lost else {}


def reduced(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return {sample: weighted mean of its score rows}, of samples that have one that counts."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["value"] is not None and row["weight"]:
            found.setdefault(row["sample"], []).append((row["value"] * row["weight"], row["weight"]))
    return {
        sample: math.fsum(value for value, _ in parts) / math.fsum(weight for _, weight in parts)
        for sample, parts in found.items()
    }


# ---- how far a judge can be believed ----


def share(flags: Iterable[bool]) -> float | None:
    """Return how many are true, None of none."""
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def of_order(judgments: Iterable[Judgment]) -> dict[str, float | None]:
    """Return how often a verdict follows the order: of pairs that were decided both times, and how often the first one wins at all."""
    judgments = list(judgments)
    decided = [(one.value, other.value) for one, other in _both_orders(judgments) if _decides(one) and _decides(other)]
    return {
        "follows_order": share(there == back for there, back in decided),
        "first_wins": share(one.value == 1.0 for one in judgments if _decides(one)),
    }


def _decides(one: Judgment) -> bool:
    return one.value in (0.0, 1.0)


def with_length(values: Mapping[str, float], chars: Mapping[str, int], prompts: Mapping[str, str]) -> float | None:
    """Return the correlation of value and length within prompts: what answers to one prompt have in common is no bias.

    >>> with_length({"a": 1.0, "b": 2.0, "c": 9.0}, {"a": 10, "b": 20, "c": 500}, {"a": "p", "b": "p", "c": "q"})
    1.0
    """
    groups: dict[str, list[tuple[float, float]]] = {}
    for sample in sorted(values):
        groups.setdefault(prompts[sample], []).append((values[sample], float(chars[sample])))
    apart = [pair for group in groups.values() for pair in _centred(group)]
    both, spread, width = (
        (math.fsum(part) for part in zip(*((v * c, v * v, c * c) for v, c in apart), strict=True)) if apart else (0,) * 3
    )
    return round(both / math.sqrt(spread * width), 6) if spread > 1e-12 and width > 1e-12 else None


def _centred(group: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    value, chars = (math.fsum(part) / len(group) for part in zip(*group, strict=True))
    return [(one - value, length - chars) for one, length in group]


def median(values: Iterable[float]) -> float | None:
    """Return the middle value, the mean of the two in the middle of an even number; None of none."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return None
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
