"""Figures of a round that are no metrics: what a filter is worth, how far engine and trainer lie apart. Found in the table of rounds by their kind.

Each kind says what it means, and why a run may not have it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from selfkd.chain import contents
from selfkd.chain.records import Seal

Values = Mapping[int, float | None]


@dataclass(frozen=True)
class Diagnostic:
    """One figure by round: its name, what it means, its values; where it has none, `reason` says why, and what would give it.

    `bounds` are those of values that have an interval. `percent`: it is a share.
    """

    name: str
    means: str
    values: Values
    reason: str = ""
    percent: bool = False
    bounds: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def known(self) -> dict[int, float]:
        return {index: value for index, value in self.values.items() if value is not None}


@dataclass(frozen=True)
class Group:
    """Diagnostics that answer one question."""

    title: str
    diagnostics: Sequence[Diagnostic]


@dataclass(frozen=True)
class Kind:
    """A kind of figure that a round may have beside its metrics: how its name ends or what stands in it, what it means, why it may be missing."""

    name: str
    pattern: str
    means: str
    reason: str
    percent: bool = False


WATCHED = "nothing but the filter reads gold, so nothing watches it: score: {reward: FILE.py:FN, as: right}, and choose by another score"
FILTER = (
    Kind("filter precision", r"_precision$", "What was kept, by a gold score that did not choose: for right and wrong, the share that is right.", WATCHED, percent=True),
    Kind("GV gap", r"(?<!_relative)_gap$", "How much better what was kept is than what was sampled, by gold that did not choose: the mean over prompts. At 0 the filter adds nothing that the model does not have already (Song et al. 2024, arXiv 2412.02674).", WATCHED),
    Kind("relative GV gap", r"_relative_gap$", "The GV gap as a share of what was missing: 1 where all that was kept is right.", WATCHED),
    Kind("AUROC within prompts", r"_auroc_", "Of two answers to one prompt that gold tells apart, how often the score puts the better first, ties half; the mean over prompts. 0.5 is a coin.", WATCHED),
)  # fmt: skip
ENGINE = (
    Kind("engine against trainer", r"_engine_apart_(mean|p99)$", "How far the log-probabilities of the engine and of the trainer lie apart on tokens that are learned, in nats: their mean, and the 99th of 100.", "no log-probabilities were kept, or other weights or words sampled than those that learn: sample: {vllm: {logprobs: 0}}"),
    Kind("its floor", r"_engine_apart_floor$", "How much of that is rounding, measured with these weights on this machine. Far above it the two do not compute the same model.", ""),
)  # fmt: skip


def not_metrics(seals: Sequence[Seal]) -> tuple[pl.DataFrame, set[str]]:
    """Return the table of rounds as `Run.metrics` has it, and which of its columns are no metrics, nor their bounds."""
    frame = contents.metrics(seals)
    metrics = {name for seal in seals for name in seal.metrics}
    bounds = {f"{name}_{side}" for name in metrics for side in ("low", "high")}
    return frame, set(frame.columns) - metrics - bounds - {"round", "accepted"}


def noted(frame: pl.DataFrame, columns: Collection[str], kinds: Sequence[Kind]) -> Iterator[Diagnostic]:
    """Yield the figures of these kinds among columns of a table of rounds; of a kind that has none, why."""
    for kind in kinds:
        found = [name for name in sorted(columns) if re.search(kind.pattern, name) and not re.search(r"_(low|high)$", name)]
        for name in found:
            values = dict(frame.select("round", name).iter_rows())
            yield Diagnostic(f"{kind.name}: {name}", kind.means, values, kind.reason, kind.percent, _between(frame, name))
        if not found and kind.reason:
            yield Diagnostic(kind.name, kind.means, {}, kind.reason)


def _between(frame: pl.DataFrame, name: str) -> dict[int, tuple[float, float]]:
    sides = [f"{name}_low", f"{name}_high"]
    if not set(sides) <= set(frame.columns):
        return {}
    rows = frame.select("round", *sides).drop_nulls().iter_rows()
    return {index: (low, high) for index, low, high in rows}
