"""Runs side by side on one metric: each against its base and against the first one, prompt by prompt, and all at equal tokens.

Only what was asked and scored in the same way is compared, by the digests that commits hold, never by the name of a metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from selfkd.chain import measured, records
from selfkd.chain.measured import Measured
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit, Seal
from selfkd.core.stats import Change, change
from selfkd.core.wording import did_you_mean, listed
from selfkd.errors import UsageError
from selfkd.report.status import info_of

LAST = "last"
BEST = "best"
SAME = "not distinguishable"


@dataclass(frozen=True)
class Within:
    """What a run had when it had spent as many tokens as the run that spent least: the round, its value, and its tokens."""

    round: int
    value: float | None
    tokens: int


@dataclass(frozen=True)
class Arm:
    """One run of a comparison, in one of its rounds.

    `tokens` were generated or trained on up to and with that round, `seconds` likewise. `against` is the change from the first run to
    this one on the prompts that both measured; None for the first run, and where they share none. `verdict` says in words what its
    interval allows: '' for the first run.
    """

    run: str
    round: int
    measured: Measured
    generated: int
    trained: int
    seconds: float
    digest: str
    against: Change | None
    verdict: str
    within: Within

    @property
    def tokens(self) -> int:
        return self.generated + self.trained


@dataclass(frozen=True)
class Comparison:
    """Arms in the order in which they were asked for, on `metric`; `budget` is the tokens of the one that spent least; `notes` a reader must know."""

    metric: str
    budget: int
    arms: Sequence[Arm]
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Round:
    """A sealed round in which the metric was measured, and what was spent until its end."""

    seal: Seal
    commit: Commit
    generated: int
    trained: int
    seconds: float

    @property
    def tokens(self) -> int:
        return self.generated + self.trained


@dataclass(frozen=True)
class _Run:
    paths: Paths
    name: str
    metric: str
    rounds: Sequence[_Round]

    @property
    def score(self) -> str:
        return self.metric.partition("/")[2]

    def scores(self, at: _Round) -> Mapping[str, float]:
        return measured.prompt_means(self.paths, at.commit, self.score)


def compare(folders: Sequence[Path], metric: str | None = None, which: str = LAST) -> Comparison:
    """Compare runs on a metric such as dev/correct; without one on the first that all of them measured, test before dev.

    `which` round: `last` accepted one, `best` by this metric, or a number. UsageError where a run has no such metric or round, or
    measured it in another way than the first one.
    """
    if len(folders) < 2:
        raise UsageError("compares two runs or more", "compare", "One run against its base: selfkd status RUN")
    chosen = metric or _shared_metric(folders)
    runs = [_read(folder, chosen) for folder in folders]
    rounds = [_chosen(run, which) for run in runs]
    _refuse_other_ways(runs, rounds)
    budget = min(at.tokens for at in rounds)
    first = runs[0].scores(rounds[0])
    arms = [
        _arm(run, at, first if index else None, rounds[0], budget)
        for index, (run, at) in enumerate(zip(runs, rounds, strict=True))
    ]
    return Comparison(chosen, budget, arms, _notes(arms, which))


# ---- what a run has ----


def _read(folder: Path, metric: str) -> _Run:
    paths = Paths(folder)
    info = info_of(paths)
    seals = [records.read(names.seal, Seal, unchanged=False) for names in paths.rounds() if names.seal.is_file()]
    made = [
        [records.read(paths.round(seal.round).folder / step.file, Commit, unchanged=False) for step in seal.steps]
        for seal in seals
    ]
    generated = accumulate(int(seal.notes.get("tokens", 0)) for seal in seals)
    trained = accumulate(sum(int(one.notes.get("train", {}).get("tokens", 0)) for one in commits) for commits in made)
    seconds = accumulate(sum(seal.notes.get("seconds", {}).values()) for seal in seals)
    spent = zip(seals, made, generated, trained, seconds, strict=True)
    rounds = [
        _Round(seal, commit, tokens, learned, took)
        for seal, commits, tokens, learned, took in spent
        if (commit := _measuring(commits, metric))
    ]
    if not rounds:
        known = sorted({name for commits in made for one in commits for name in _metrics(one)})
        fix = f"It measured {listed(known)}." if known else "Let it seal a round that measures something first."
        raise UsageError(f"did not measure {metric}.{did_you_mean(metric, known)}", str(folder), fix)
    return _Run(paths, info.name if folder.name == info.name else str(folder), metric, rounds)


def _measuring(commits: Sequence[Commit], metric: str) -> Commit | None:
    """Return the step that measured a metric; of several the last one, whose value the seal has."""
    return next((one for one in reversed(commits) if metric in _metrics(one)), None)


def _metrics(commit: Commit) -> list[str]:
    if not commit.outside:
        return []
    return [
        f"{commit.identity['split']}/{score}"
        for score in records.scores_of(commit.identity)
        if not commit.step.endswith(measured.WARM)
    ]


def _shared_metric(folders: Sequence[Path]) -> str:
    """Return the metric to compare by: of those that all runs measured one of `test`, else the first that the first run shows."""
    found = [_all_metrics(Paths(folder)) for folder in folders]
    shared = [name for name in found[0] if all(name in others for others in found[1:])]
    if not shared:
        fix = "\n".join(f"{folder}: {listed(names) or 'nothing yet'}" for folder, names in zip(folders, found, strict=True))
        raise UsageError("these runs have no metric that all of them measured", "compare", fix)
    return min(shared, key=lambda name: (not name.startswith("test/"), shared.index(name)))


def _all_metrics(paths: Paths) -> list[str]:
    info_of(paths)
    found: dict[str, None] = {}
    for names in paths.rounds():
        if names.seal.is_file():
            for path in names.commits():
                found |= dict.fromkeys(_metrics(records.read(path, Commit, unchanged=False)))
    return list(found)


def _chosen(run: _Run, which: str) -> _Round:
    accepted = [at for at in run.rounds if at.seal.accepted]
    if which == LAST:
        return accepted[-1]  # round 0 always is
    if which == BEST:
        valued = [at for at in accepted if at.commit.metrics.get(run.metric) is not None]
        return max(valued or accepted[:1], key=lambda at: (at.commit.metrics.get(run.metric) or 0.0, -at.seal.round))
    for at in run.rounds:
        if str(at.seal.round) == which:
            return at
    known = ", ".join(str(at.seal.round) for at in run.rounds)
    raise UsageError(
        f"has no round {which} that measured {run.metric}", str(run.paths.folder), f"Rounds: {known}; or last, or best."
    )


# ---- side by side ----


def _refuse_other_ways(runs: Sequence[_Run], rounds: Sequence[_Round]) -> None:
    """Raise UsageError where a run asked or scored otherwise than the first one: such figures have one name and two meanings."""
    first = _how(runs[0], rounds[0])
    for run, at in zip(runs[1:], rounds[1:], strict=True):
        if _how(run, at) != first:
            what = f"measured {run.metric} differently from {runs[0].name}: another reward or version of it, or asked otherwise"
            fix = "Compare another metric (--metric), or measure both runs by the same step."
            raise UsageError(what, str(run.paths.folder), fix)


def _how(run: _Run, at: _Round) -> str:
    return records.measures_of(at.commit)[run.metric]


def _arm(run: _Run, at: _Round, first: Mapping[str, float] | None, reference: _Round, budget: int) -> Arm:
    found = measured.measurement(run.paths, at.commit, run.score)
    against = None if first is None else change(first, run.scores(at))
    return Arm(
        run=run.name,
        round=at.seal.round,
        measured=found,
        generated=at.generated,
        trained=at.trained,
        seconds=at.seconds,
        digest=at.seal.digest,
        against=against,
        verdict="" if first is None else _verdict(against),
        within=_within(run, budget),
    )


def _verdict(against: Change | None) -> str:
    if against is None:
        return "not compared: no prompt in common"
    if against.interval is None or against.interval.low <= 0 <= against.interval.high:
        return SAME
    return "higher" if against.value > 0 else "lower"


def _within(run: _Run, budget: int) -> Within:
    affordable = [at for at in run.rounds if at.seal.accepted and at.tokens <= budget]
    at = affordable[-1] if affordable else run.rounds[0]
    return Within(at.seal.round, at.commit.metrics.get(run.metric), at.tokens)


def _notes(arms: Sequence[Arm], which: str) -> list[str]:
    found = []
    if which == BEST:
        found.append(
            "best: the round was chosen by the very figures that are compared, so they flatter every run, most those with many rounds"
        )
    if len(arms) > 2:
        found.append(
            f"{len(arms) - 1} comparisons with the first run, each at 95 %: of twenty without a difference one shows one"
        )
    shared = [arm for arm in arms if arm.against and arm.against.prompts < arm.measured.scored]
    found += [
        f"{arm.run}: compared on {arm.against.prompts} of its {arm.measured.scored} prompts" for arm in shared if arm.against
    ]
    found += [f"{arm.run} ends in the round that {arms[0].run} ends in" for arm in arms[1:] if arm.digest == arms[0].digest]
    return found
