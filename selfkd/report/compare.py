"""Runs side by side on one metric: each against its base and against the first one, prompt by prompt, and all at equal tokens.

Only what was asked and scored in the same way is compared, by the digests that commits hold, never by the name of a metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from selfkd.chain import filtering, measured, records, ways
from selfkd.chain.measured import Measured
from selfkd.chain.paths import Paths
from selfkd.chain.records import Amendment, Commit, Info, Record, Seal
from selfkd.chain.trained import learned
from selfkd.core import digest
from selfkd.core.stats import Change, change
from selfkd.core.wording import did_you_mean, listed
from selfkd.errors import ChainError, UsageError
from selfkd.report import adapters, filters
from selfkd.report.status import in_force, info_of

Kind = TypeVar("Kind", bound=Record)

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
    within: Within | None
    control: str = ""

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
    adapters: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        return self.generated + self.trained

    def how(self, metric: str) -> str:
        """Return the digest of how the metric was measured."""
        return ways.measures_of(self.commit)[metric]


@dataclass(frozen=True)
class _Records:
    """The records of a run, read once: sealed rounds and the steps of each. `changed` names those that are not as they were written."""

    paths: Paths
    info: Info
    seals: Sequence[Seal]
    made: Sequence[Sequence[Commit]]
    changed: Sequence[str]

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for commits in self.made for one in commits for name in _metrics(one)))

    @property
    def attempts(self) -> int:
        return len({one.notes.get("attempt") for commits in self.made for one in commits})


@dataclass(frozen=True)
class _Run:
    """What is read of a run. `mode` is whether more or less of the metric is better; `changed` names records that are not as they were written."""

    paths: Paths
    info: Info
    metric: str
    mode: str
    rounds: Sequence[_Round]
    changed: Sequence[str]
    attempts: int
    means: dict[str, Mapping[str, float]] = field(default_factory=dict, compare=False)  # {seal: scores}, read once for all arms

    @property
    def name(self) -> str:
        folder = self.paths.folder
        return " ".join(
            (self.info.name if folder.name == self.info.name else str(folder)).split()
        )  # a table has one line for it

    @cached_property
    def prompts(self) -> dict[str, str]:
        """Return {id: digest of all that is known of it} of the prompts that were measured."""
        frame = pl.read_parquet(self.paths.folder / self.info.prompts[self.metric.partition("/")[0]].file)
        return {row["id"]: digest.of(row["answer"], row["meta"]) for row in frame.iter_rows(named=True)}

    def notes(self, at: _Round) -> list[str]:
        """Return what a reader must know of one side."""
        found = [f"{self.name}: {name} was changed after it was written; see selfkd verify" for name in self.changed]
        found += [f"{self.name}: in round {at.seal.round} the {said}" for said in at.adapters]
        found += [f"{self.name}: round {at.seal.round} {said}" for said in filters.lines(filtering.recorded(at.seal.notes))]
        if not at.seal.accepted:
            found.append(f"{self.name}: round {at.seal.round} was rolled back: {at.seal.why}")
        if self.attempts > 1:
            found.append(
                f"{self.name}: it was made in {self.attempts} attempts; its time leaves out what a stopped step had taken before"
            )
        return found

    @property
    def score(self) -> str:
        return self.metric.partition("/")[2]

    def scores(self, at: _Round) -> Mapping[str, float]:
        if at.seal.digest not in self.means:
            self.means[at.seal.digest] = measured.prompt_means(self.paths, at.commit, self.score)
        return self.means[at.seal.digest]


def compare(folders: Sequence[Path], metric: str | None = None, which: str = LAST) -> Comparison:
    """Compare runs on a metric such as dev/correct; without one on the first that all of them measured, test before dev.

    `which` round: `last` accepted one, `best` by this metric, or a number. UsageError where a run has no such metric or round, or
    measured it in another way than the first one.
    """
    if len(folders) < 2:
        raise UsageError("compares two runs or more", "compare", "One run against its base: selfkd status RUN")
    read = [_read(folder) for folder in folders]
    chosen = metric or _shared_metric(read)
    runs = [_measuring_runs(one, chosen) for one in read]
    one = _chosen(runs[0], which)
    rounds = [one, *(_chosen(run, which, one.how(chosen)) for run in runs[1:])]
    _refuse_other_ways(runs, rounds)
    budget = min(at.tokens for at in rounds)
    arms = [
        _arm(run, at, (runs[0], one) if index else None, budget)
        for index, (run, at) in enumerate(zip(runs, rounds, strict=True))
    ]
    return Comparison(
        chosen,
        budget,
        arms,
        [*_notes(arms, which), *(note for run, at in zip(runs, rounds, strict=True) for note in run.notes(at))],
    )


# ---- what a run has ----


def _read(folder: Path) -> _Records:
    paths, changed = Paths(folder), list[str]()
    info = info_of(paths)
    seals = [_record(names.seal, Seal, paths, changed) for names in paths.rounds() if names.seal.is_file()]
    made = [
        [_record(paths.round(seal.round).folder / step.file, Commit, paths, changed) for step in seal.steps] for seal in seals
    ]
    return _Records(paths, info, seals, made, changed)


def _measuring_runs(read: _Records, metric: str) -> _Run:
    """Return what a run says of a metric; UsageError where it has none."""
    rounds = _rounds(read.seals, read.made, metric)
    if not rounds:
        known = sorted(read.metrics)
        fix = f"It measured {listed(known)}." if known else "Let it seal a round that measures something first."
        raise UsageError(f"did not measure {metric}.{did_you_mean(metric, known)}", str(read.paths.folder), fix)
    return _Run(read.paths, read.info, metric, _mode(read.paths, read.info, metric), rounds, read.changed, read.attempts)


def _record(path: Path, kind: type[Kind], paths: Paths, changed: list[str]) -> Kind:
    """Read a record; one that is not as it was written is read too, and named."""
    try:
        return records.read(path, kind)
    except ChainError:
        changed.append(paths.relative(path))
        return records.read(path, kind, unchanged=False)


def _rounds(seals: Sequence[Seal], made: Sequence[Sequence[Commit]], metric: str) -> list[_Round]:
    """Return the rounds that measured a metric, each with what was spent until its end."""
    generated = accumulate(int(seal.notes.get("tokens", 0)) for seal in seals)
    trained = accumulate(sum(map(learned, commits)) for commits in made)
    seconds = accumulate(sum(seal.notes.get("seconds", {}).values()) for seal in seals)
    adapted = [adapters.served(seal, [one for commits in made[: seal.round + 1] for one in commits]) for seal in seals]
    spent = zip(seals, made, generated, trained, seconds, adapted, strict=True)
    return [_Round(seal, commit, *more) for seal, commits, *more in spent if (commit := _measuring(commits, metric))]


def _mode(paths: Paths, info: Info, metric: str) -> str:
    """Return whether more of a metric is better ('max') or less, as the recipe in force says of its best round."""
    amendments = [records.read(path, Amendment, unchanged=False) for path in paths.amendments()]
    best = in_force(info, amendments).get("best") or {}
    return str(best.get("mode", "max")) if best.get("metric") == metric else "max"


def _measuring(commits: Sequence[Commit], metric: str) -> Commit | None:
    """Return the step that measured a metric; of several the last one, whose value the seal has."""
    return next((one for one in reversed(commits) if metric in _metrics(one)), None)


def _metrics(commit: Commit) -> list[str]:
    if not commit.outside:
        return []
    return [
        f"{commit.identity['split']}/{score}"
        for score in ways.scores_of(commit.identity)
        if not commit.step.endswith(measured.WARM)
    ]


def _shared_metric(runs: Sequence[_Records]) -> str:
    """Return the metric to compare by: of those that all runs measured one of `test`, else the first that the first run shows."""
    found = [one.metrics for one in runs]
    shared = [name for name in found[0] if all(name in others for others in found[1:])]
    if not shared:
        fix = "\n".join(
            f"{folder}: {listed(names) or 'nothing yet'}"
            for folder, names in zip((one.paths.folder for one in runs), found, strict=True)
        )
        raise UsageError("these runs have no metric that all of them measured", "compare", fix)
    return min(shared, key=lambda name: (not name.startswith("test/"), shared.index(name)))


def _chosen(run: _Run, which: str, how: str = "") -> _Round:
    """Return the round that is compared; the best is one of those that measured in the way `how`, else as the last one did."""
    accepted = [at for at in run.rounds if at.seal.accepted]
    if which == LAST:
        return accepted[-1]  # round 0 always is
    if which == BEST:
        return _best(run, [at for at in accepted if at.how(run.metric) == (how or accepted[-1].how(run.metric))] or accepted)
    for at in run.rounds:
        if str(at.seal.round) == which:
            return at
    known = ", ".join(str(at.seal.round) for at in run.rounds)
    raise UsageError(
        f"has no round {which} that measured {run.metric}", str(run.paths.folder), f"Rounds: {known}; or last, or best."
    )


def _best(run: _Run, rounds: Sequence[_Round]) -> _Round:
    values = [(at.commit.metrics.get(run.metric), at) for at in rounds]
    valued = [(-value if run.mode == "min" else value, at) for value, at in values if value is not None]
    return max(valued, key=lambda pair: (pair[0], -pair[1].seal.round))[1] if valued else rounds[0]


# ---- side by side ----


def _refuse_other_ways(runs: Sequence[_Run], rounds: Sequence[_Round]) -> None:
    """Raise UsageError where a run asked or scored otherwise than the first one: such figures have one name and two meanings."""
    for run, at in zip(runs[1:], rounds[1:], strict=True):
        if at.how(run.metric) != rounds[0].how(run.metric):
            what = f"measured {run.metric} differently from {runs[0].name}: another reward or version of it, or asked otherwise"
            fix = "Compare another metric (--metric), or measure both runs by the same step."
            raise UsageError(what, str(run.paths.folder), fix)


def _arm(run: _Run, at: _Round, first: tuple[_Run, _Round] | None, budget: int) -> Arm:
    against = _change(first, run, at) if first else None
    return Arm(
        run=run.name,
        round=at.seal.round,
        measured=measured.measurement(run.paths, at.commit, run.score),
        generated=at.generated,
        trained=at.trained,
        seconds=at.seconds,
        digest=at.seal.digest,
        against=against,
        verdict=_verdict(against) if first else "",
        within=_within(run, budget, at.how(run.metric)),
        control=str(run.info.recipe.get("control") or ""),
    )


def _change(first: tuple[_Run, _Round], run: _Run, at: _Round) -> Change | None:
    """Return the change from the first run on the prompts that are the same in both, whatever a reward may see of them included."""
    other, before = first
    alike = other.prompts.items() & run.prompts.items()
    same = {prompt for prompt, _ in alike}
    sides = [
        {prompt: value for prompt, value in one.scores(then).items() if prompt in same}
        for one, then in ((other, before), (run, at))
    ]
    return change(*sides)


def _verdict(against: Change | None) -> str:
    if against is None:
        return "not compared: no prompt in common"
    if against.interval is None or against.interval.low <= 0 <= against.interval.high:
        return SAME
    return "higher" if against.value > 0 else "lower"


def _within(run: _Run, budget: int, how: str) -> Within | None:
    """Return what a run had at equal tokens by the measurement that is compared; None where it had not measured so by then."""
    affordable = [at for at in run.rounds if at.seal.accepted and at.tokens <= budget and at.how(run.metric) == how]
    return (
        Within(affordable[-1].seal.round, affordable[-1].commit.metrics.get(run.metric), affordable[-1].tokens)
        if affordable
        else None
    )


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
