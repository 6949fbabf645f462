"""What a round measured, for readers: each score's mean, its interval, how many prompts had one, and the change since the base.

It is worked out when a round is sealed and stands in the notes of its seal, outside every digest: bounds may differ in a last digit
from one version of a library to the next. Of rounds sealed before there were such notes it is worked out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.chain import records, ways
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit
from selfkd.core.pool import scan
from selfkd.core.stats import Change, Interval, change, interval
from selfkd.steps.measure import CHANGES, MARKS, Figure, by_prompt

Scores = dict[str, float]
WARM = "-warm"  # what ends the name of a measure step after the steps that run before the first round


@dataclass(frozen=True)
class Measured:
    """One score of one measure step: its mean over prompts; None of an interval or a change where there is none.

    `name` is that of its metric. `scored` of `prompts` had a scored answer. `change` is against the base, on the same prompts;
    None for the base itself, where round 0 has no such score, and where this was measured `differently`: by another reward, or
    asked otherwise.
    """

    name: str
    split: str
    score: str
    value: float | None
    interval: Interval | None
    scored: int
    prompts: int
    change: Change | None
    differently: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Measured:
        change = content["change"] and Change(**{**content["change"], "interval": _interval(content["change"]["interval"])})
        return cls(**{**content, "interval": _interval(content["interval"]), "change": change})


def _interval(content: Mapping[str, float] | None) -> Interval | None:
    return None if content is None else Interval(**content)


def recorded(notes: Mapping[str, Any]) -> dict[str, Measured] | None:
    """Return what the notes of a seal say was measured; None of a seal that has no such notes."""
    found = notes.get("measured")
    return None if found is None else {name: Measured.from_json(content) for name, content in found.items()}


def measurements(paths: Paths, commits: Sequence[Commit]) -> dict[str, Measured]:
    """Return the first score of each measure step of a round under its split, and further scores under split/score."""
    measured: dict[str, Measured] = {}
    for commit in (one for one in commits if one.outside):
        split = commit.identity["split"]
        first, *others = ways.scores_of(commit.identity)
        name = split if split not in measured else f"{split} ({commit.step})"
        measured[name] = measurement(paths, commit, first)
        measured |= {f"{name}/{other}": measurement(paths, commit, other) for other in others}
    return measured


def measurement(paths: Paths, commit: Commit, score: str) -> Measured:
    """Return what a measure step found of one of its scores."""
    split, place = commit.identity["split"], place_of(commit)
    scores, base = prompt_means(paths, commit, score), _base(paths, commit, score)
    differently = base is not None and _how(base, score) != _how(commit, score)
    none = base is None or differently or base.digest == commit.digest
    return Measured(
        name=f"{place}/{score}",
        split=split,
        score=score,
        value=commit.metrics.get(f"{place}/{score}"),
        interval=interval(scores),
        scored=len(scores),
        prompts=int(commit.metrics.get(f"{place}/prompts", len(scores))),
        change=None if none or base is None else change(prompt_means(paths, base, score), scores),
        differently=differently,
    )


def place_of(commit: Commit) -> str:
    """Return what stands before the names of a measure step's metrics."""
    return "warm" if commit.step.endswith(WARM) else str(commit.identity["split"])


def changes(one: Measured) -> dict[str, float | None]:
    """Return a change against the base as metrics: what keep_if may ask for. Rounded, so that no verdict rests on a last digit."""
    bounds = one.change.interval if one.change else None
    values = (one.change.value if one.change else None, *((bounds.low, bounds.high) if bounds else (None, None)))
    return {
        f"{one.name}_{name}": None if value is None else round(value, 6) for name, value in zip(CHANGES, values, strict=True)
    }


def _how(commit: Commit, score: str) -> str:
    """Return how a step measured a score, '' where it has no such metric."""
    return next((how for name, how in ways.measures_of(commit).items() if name.endswith(f"/{score}")), "")


def _base(paths: Paths, commit: Commit, score: str) -> Commit | None:
    """Return the step of round 0 that measured this score on this split, whatever it is called; None where there is none.

    Of several, that of the same name (`measure-warm` is `measure`, after the warm-up), else one that measured in the same way.
    """
    opening = [records.read(path, Commit, unchanged=False) for path in paths.round(0).commits()]
    split = commit.identity["split"]
    found = [one for one in opening if one.outside and one.identity["split"] == split and score in ways.scores_of(one.identity)]
    name, how = commit.step.removesuffix(WARM), _how(commit, score)
    return max(found, key=lambda one: (one.step == name, _how(one, score) == how, -one.number), default=None)


def prompt_means(paths: Paths, commit: Commit, score: str) -> Scores:
    """Return {prompt id: mean of `score` over its answers} of a measure step, without prompts that have too few scored answers.

    Of a pass@k or maj@k it is that of each prompt, and of a vote or a pick the mean of the answers that win it.
    """
    how = ways.scores_of(commit.identity).get(score, Figure(score))
    files = {name: [paths.folder / path for path in table.files] for name, table in commit.tables.items()}
    if not files.get("samples") or not files.get("scores"):
        return {}
    if not all(path.is_file() for found in files.values() for path in found):
        return {}  # verify names what is missing; a status is not the place to fail
    view = scan("samples", files["samples"]).select("id", "prompt").collect()
    for name in (how.reward, *(mark for way, mark in MARKS.items() if way == how.way)):
        view = view.join(_per_sample(files["scores"], name), on="id", how="left")
    return by_prompt(view, how)


def _per_sample(files: Sequence[Path], score: str) -> pl.DataFrame:
    values = scan("scores", list(files)).filter((pl.col("name") == score) & pl.col("value").is_finite())
    return values.group_by(id="sample").agg(pl.col("value").mean().alias(score)).collect()
