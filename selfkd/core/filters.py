"""How good a filter is, held against gold answers that it did not see: precision, the gap between verifying and generating, and AUROC.

Frames in, numbers out. Gold may be any number; 1 and 0 read as right and wrong. Knows neither steps nor files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import polars as pl

from selfkd.core.stats import Change, Interval, change, interval, interval_of_all, mean

Means = dict[str, float]  # by prompt


@dataclass(frozen=True)
class Ranking:
    """How often a score puts the better of two answers to one prompt first: the mean over the prompts that have two such answers."""

    value: float
    interval: Interval | None
    prompts: int


@dataclass(frozen=True)
class Filtering:
    """What the samples that were kept are worth by the score `gold`, of those that have it.

    `precision` is the mean gold of the kept ones, None where none was kept. `gap` is the change from what was sampled to what was kept,
    in the mean over prompts; a prompt of which nothing was kept counts as it was sampled (Song et al. 2024, arXiv 2412.02674).
    `relative_gap` divides it by what was missing. `auroc` says how well each score that chooses ranks the answers to a prompt.
    """

    gold: str
    sampled: int
    kept: int
    precision: float | None
    interval: Interval | None
    gap: Change | None
    relative_gap: float | None
    auroc: Mapping[str, Ranking] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Filtering:
        gap = content["gap"] and Change(**{**content["gap"], "interval": _between(content["gap"]["interval"])})
        rankings = {name: Ranking(**{**one, "interval": _between(one["interval"])}) for name, one in content["auroc"].items()}
        return cls(**{**content, "interval": _between(content["interval"]), "gap": gap, "auroc": rankings})

    def figures(self) -> dict[str, float | None]:
        """Return its figures by name, as a table of rounds has them."""
        named = {
            f"{self.gold}_precision": (self.precision, self.interval),
            f"{self.gold}_relative_gap": (self.relative_gap, None),
        }
        named |= {f"{self.gold}_gap": (self.gap.value, self.gap.interval) if self.gap else (None, None)}
        named |= {f"{self.gold}_auroc_{name}": (one.value, one.interval) for name, one in self.auroc.items()}
        found: dict[str, float | None] = {}
        for name, (value, between) in named.items():
            found |= {name: value} | ({f"{name}_low": between.low, f"{name}_high": between.high} if between else {})
        return found


def _between(content: Mapping[str, float] | None) -> Interval | None:
    return None if content is None else Interval(**content)


def filtering(view: pl.DataFrame, gold: str, scores: list[str]) -> Filtering | None:
    """Return what `view` (columns prompt, id, kept, the score `gold` and these scores) says of its filter; None where no sample has gold."""
    known = view.filter(pl.col(gold).is_finite()).sort("prompt", "id")
    if not known.height:
        return None
    chosen = known.filter("kept")
    groups = _groups(chosen, gold)
    sampled = _means(known, gold)
    verified = {**sampled, **_means(chosen, gold)}
    return Filtering(
        gold=gold,
        sampled=known.height,
        kept=chosen.height,
        precision=math.fsum(chosen[gold]) / chosen.height if chosen.height else None,
        interval=interval_of_all(groups),
        gap=change(sampled, verified) if chosen.height else None,
        relative_gap=_relative(sampled, verified) if chosen.height else None,
        auroc={name: found for name in scores if (found := auroc(known, name, gold))},
    )


def _groups(view: pl.DataFrame, gold: str) -> dict[str, list[float]]:
    return dict(view.group_by("prompt", maintain_order=True).agg(gold).iter_rows())


def _means(view: pl.DataFrame, gold: str) -> Means:
    return {prompt: math.fsum(values) / len(values) for prompt, values in _groups(view, gold).items()}


def _relative(sampled: Means, verified: Means) -> float | None:
    """Return the mean share of what was missing that verifying gained, over prompts that missed something."""
    return mean({prompt: (verified[prompt] - value) / (1 - value) for prompt, value in sampled.items() if value < 1})


def auroc(view: pl.DataFrame, score: str, gold: str) -> Ranking | None:
    """Return how often `score` ranks the better by `gold` of two answers to one prompt first, ties half; None where no prompt has two such.

    Within prompts: over all of them together it would mostly say which prompts are hard.
    """
    known = view.filter(pl.col(score).is_finite()).group_by("prompt", maintain_order=True).agg(score, gold)
    found = {prompt: value for prompt, *both in known.iter_rows() if (value := _ranked(*both)) is not None}
    value = mean(found)
    return None if value is None else Ranking(value, interval(found), len(found))


def _ranked(scores: list[float], golds: list[float]) -> float | None:
    answers = list(zip(scores, golds, strict=True))
    pairs = [(mine > other) + (mine == other) / 2 for mine, best in answers for other, worse in answers if best > worse]
    return math.fsum(pairs) / len(pairs) if pairs else None
