"""What rounds say of themselves beside their metrics: what a filter is worth by gold, how far engine and trainer lie apart; or why they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from selfkd.chain.records import Seal
from selfkd.core.filters import Filtering
from selfkd.core.stats import Interval
from selfkd.report.status import RoundSummary

Values = Mapping[int, float | None]
Known = tuple[float | None, Interval | None]


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


PRECISION, GAP, RELATIVE, AUROC = "filter precision", "GV gap", "relative GV gap", "AUROC within prompts"
MEANS = {
    PRECISION: "What was kept, by a gold score that did not choose it: of right and wrong, the share that is right.",
    GAP: "How much better what was kept is than what was sampled, by gold that did not choose it: the mean over prompts. At 0 the filter adds nothing that the model does not do by itself (Song et al. 2024, arXiv 2412.02674).",
    RELATIVE: "The GV gap as a share of what was missing: 1 where all that was kept is right.",
    AUROC: "Of two answers to one prompt that gold tells apart, how often the score puts the better one first, ties half; the mean over prompts. 0.5 is a coin.",
}
UNWATCHED = "no gold score watches the filter: score: {reward: reward/math.py:correct, as: right}, and choose by another score"


def of_filter(rounds: Sequence[RoundSummary]) -> Iterator[Diagnostic]:
    """Yield what the filter is worth by each gold score that did not choose, and by each score that did."""
    found = {(one.gold, at.index): one for at in rounds for one in at.filters}
    golds = dict.fromkeys(gold for gold, _ in found)
    for gold in golds:
        own = {index: one for (name, index), one in found.items() if name == gold}
        for name, values in _figures(own).items():
            kind = next(one for one in (RELATIVE, PRECISION, GAP, AUROC) if name.startswith(one))
            bounds = {index: (between.low, between.high) for index, (_, between) in values.items() if between}
            shown = {index: value for index, (value, _) in values.items()}
            none = "nothing that has gold was kept"
            yield Diagnostic(f"{name}, by {gold}", MEANS[kind], shown, none, kind == PRECISION and _share(shown), bounds)
    if not golds:
        yield from (Diagnostic(kind, means, {}, UNWATCHED) for kind, means in MEANS.items())


def _figures(own: Mapping[int, Filtering]) -> dict[str, dict[int, Known]]:
    scores = dict.fromkeys(name for one in own.values() for name in one.auroc)
    return {
        PRECISION: {index: (one.precision, one.interval) for index, one in own.items()},
        GAP: {index: (one.gap.value, one.gap.interval) if one.gap else (None, None) for index, one in own.items()},
        RELATIVE: {index: (one.relative_gap, None) for index, one in own.items()},
        **{
            f"{AUROC} of {name}": {
                index: (one.auroc[name].value, one.auroc[name].interval) for index, one in own.items() if name in one.auroc
            }
            for name in scores
        },
    }


def _share(values: Values) -> bool:
    return all(0 <= value <= 1 for value in values.values() if value is not None)


APART = {
    "mean": "How far the log-probabilities of the engine and of the trainer lie apart on tokens that are learned, in nats: the mean of |log p(engine) - log p(trainer)|. Far above what rounding explains, the two do not compute the same model.",
    "p99": "The same, of the token that 99 in 100 stay below.",
    "floor": "How much of it is rounding, measured with these weights on this machine.",
}
UNKEPT = "no log-probabilities were kept: sample: {vllm: {logprobs: 0}}"


def of_engine(seals: Sequence[Seal]) -> Iterator[Diagnostic]:
    """Yield how far engine and trainer lie apart in each update; where no round could say so, why."""
    found = {seal.round: seal.notes.get("engine_apart", {}) for seal in seals}
    steps = dict.fromkeys(step for of_round in found.values() for step in of_round)
    whys = dict.fromkeys(one["why"] for of_round in found.values() for one in of_round.values() if one.get("why"))
    known = [(step, name) for step in steps for name in APART if any(name in one.get(step, {}) for one in found.values())]
    for step, name in known:
        values = {index: of_round[step][name] for index, of_round in found.items() if name in of_round.get(step, {})}
        yield Diagnostic(f"engine against trainer, {name}, {step}", APART[name], values)
    if not known:
        yield Diagnostic("engine against trainer", APART["mean"], {}, "; ".join(whys) or UNKEPT)
