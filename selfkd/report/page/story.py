"""The first screen of a run: the gain and how sure it is, why the run ended, what to be wary of, where samples went, what was forgotten, what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfkd.chain import records
from selfkd.chain.measured import Measured
from selfkd.chain.paths import runs_under
from selfkd.chain.records import Info, Seal
from selfkd.chain.trained import learned
from selfkd.core.wording import counted
from selfkd.errors import SelfkdError
from selfkd.report import tables
from selfkd.report.page.examples import Ledger
from selfkd.report.page.opened import Opened
from selfkd.report.status import COLUMNS, seals_of

MOST_REASONS = 5  # of drops in a chart; the rest are one part of it


@dataclass(frozen=True)
class Headline:
    """What a page says first. `figure` is the change, or the value where there is no base to compare with; `sure` says what its interval allows."""

    figure: str
    bounds: str
    sure: str
    sentence: str
    cautions: Sequence[str]


@dataclass(frozen=True)
class Alarm:
    """Something a reader must know before believing the figures; `grave` where the figures may be wrong."""

    text: str
    grave: bool


@dataclass(frozen=True)
class Suite:
    """What became of one measured score: at the base, at the best round, the change, and how much of the base's value is left."""

    name: str
    base: str
    now: str
    change: str
    left: str


@dataclass(frozen=True)
class Funnel:
    """What became of the samples of each round: {reason, or 'kept': count by round}."""

    rounds: Sequence[int]
    parts: Mapping[str, Sequence[int]]
    samples: Sequence[int]


@dataclass(frozen=True)
class Cost:
    """What the sealed rounds took, and what the folder holds now."""

    generated: int
    trained: int
    seconds: float
    stages: Mapping[str, float]
    disk: int
    checkpoints: int


@dataclass(frozen=True)
class Control:
    """A control of this run that lies beside it: its name, which control it is, and its figure by round."""

    name: str
    control: str
    values: Mapping[int, float]


# ---- the gain ----


def headline(run: Opened) -> Headline:
    at = run.at_shown
    if not run.rounds:
        return Headline("–", "", "", "No round is sealed yet.", [])
    if at is None or at.value is None:
        return Headline(
            "–", "", "", "Nothing was measured, so nothing is known of a gain: a `measure` step on dev prompts would tell.", []
        )
    if at.change is None:
        return Headline(
            tables.number_text(at.value, run.percent),
            tables.bounds_text(at.interval, run.percent).strip(),
            "",
            _no_change(run, at),
            _cautions(run, at),
        )
    value = f"{100 * at.change.value:+.1f} points" if run.percent else f"{at.change.value:+.3g}"
    return Headline(
        value,
        tables.bounds_text(at.change.interval, run.percent).strip(),
        _sure(run, at),
        _sentence(run, at),
        _cautions(run, at),
    )


def _no_change(run: Opened, at: Measured) -> str:
    if at.differently:
        return f"{at.name} was measured differently at the base, so the two are not compared."
    return f"{at.name} of {run.name_of(run.shown) if run.shown else 'the untouched model'}; there is no round to compare it with yet."


def _sure(run: Opened, at: Measured) -> str:
    between = at.change.interval if at.change else None
    if between is None:
        return "too few prompts say anything about how sure this is"
    if between.low <= 0 <= between.high:
        return "not distinguishable from no change: the 95 % interval holds 0"
    better = (between.low > 0) == (run.mode == "max")
    return f"{'better' if better else 'worse'} than the base: the 95 % interval leaves out 0"


def _sentence(run: Opened, at: Measured) -> str:
    base = run.main.get(0)
    before = tables.number_text(base.value, run.percent) if base and base.value is not None else "unknown"
    prompts = at.change.prompts if at.change else 0
    assert at.value is not None
    said = "" if run.best else "No round is better than the base. "
    return f"{said}{at.name}: base {before}, {run.name_of(run.shown)} {tables.number_text(at.value, run.percent)}, on the same {counted(prompts, 'prompt')}."


def _cautions(run: Opened, at: Measured) -> list[str]:
    said = []
    if run.best and run.recipe.get("best") and len(run.rounds) > 2:
        said.append(f"This is the best of {len(run.rounds) - 1} rounds by the very figure that is shown, so it flatters.")
    if not run.recipe.get("best") and run.best:
        said.append("The recipe names no `best`: this is the newest accepted round.")
    tests = [one.measured["test"] for one in run.rounds if "test" in one.measured and one.index]
    if tests and at.split != "test":
        said.append(
            f"On test, which steered nothing: {tables.mean_text(tests[-1])} {tables.against_base(tests[-1], tables.percent_of(tests))}."
        )
    return said


def ended(run: Opened) -> str:
    """Return why the run stands where it does, as one sentence."""
    state = run.state
    made, wanted = max(0, len(run.rounds) - 1), state.rounds_wanted
    so_far = f"{made} of {counted(wanted, 'round')}"
    said = {
        "running": f"It is running: {so_far} made.",
        "new": f"It has not begun: {so_far} made.",
        "done": f"Stopped early after {so_far}: {state.note}."
        if state.note
        else f"All {counted(wanted, 'round')} that the recipe asks for were made."
        if wanted
        else "The recipe asks for no round after the base.",
        "stopped": f"It was stopped after {so_far}{_because(state.note)}",
        "failed": f"It failed after {so_far}{_because(state.note)}",
        "interrupted": f"It was interrupted after {so_far}{_because(state.note)}",
    }
    return said[state.state]


def _because(note: str) -> str:
    first = note.splitlines()[0].rstrip(".") if note else ""
    return f": {first}." if first else "."


# ---- what to be wary of ----


def alarms(run: Opened) -> list[Alarm]:
    """Return the warnings that `status` prints, and what else makes the figures of the page doubtful."""
    lines = [line for one in run.rounds for line in tables.warnings(one, one is run.rounds[-1])]
    said = {line.plain: "red" in str(line.style) for line in lines}
    return [Alarm(text, grave) for text, grave in said.items()]


# ---- what was forgotten ----


def suites(run: Opened) -> list[Suite]:
    """Return what became of every measured score between the base and the round that is held against it, or the newest that measured it."""
    names = dict.fromkeys(name for one in run.rounds for name in one.measured)
    return [found for name in names if (found := _suite(run, name))]


def _suite(run: Opened, name: str) -> Suite | None:
    found = {one.index: one.measured[name] for one in run.rounds if name in one.measured}
    base = found.get(0)
    now = found.get(run.shown) or found[max(found)]
    if base is None or now is base or now.value is None or base.value is None:
        return None
    percent = tables.percent_of(list(found.values()))
    left = f"{100 * now.value / base.value:.0f} %" if base.value > 0 and not now.differently and run.mode == "max" else ""
    return Suite(
        now.name, tables.mean_text(base, percent), tables.mean_text(now, percent), tables.against_base(now, percent), left
    )


def still_right(found: Ledger | None) -> str:
    if found is None or not found.right:
        return ""
    share = f"{found.still} of {counted(found.right, 'prompt')} that the base had right {'is' if found.still == 1 else 'are'} still right ({100 * found.still / found.right:.0f} %)"
    return f"{share}; {counted(len(found.rose), 'prompt')} rose, {len(found.fell)} fell."


# ---- where samples went ----


def funnel(run: Opened) -> Funnel | None:
    """Return what became of samples, by round, the commonest reasons first; None where no sealed round made any."""
    counted_ = {seal.round: _counts(seal) for seal in run.seals if dict(seal.notes.get("funnel", ())).get("samples")}
    if not counted_:
        return None
    totals: dict[str, int] = {}
    for counts in counted_.values():
        for reason, count in counts.items():
            totals[reason] = totals.get(reason, 0) + count
    reasons = ["kept", *sorted((one for one in totals if one != "kept"), key=lambda one: (-totals[one], one))]
    rounds = sorted(counted_)
    samples = [dict(seal.notes["funnel"])["samples"] for seal in run.seals if seal.round in counted_]
    return Funnel(rounds, {reason: [counted_[index].get(reason, 0) for index in rounds] for reason in reasons}, samples)


def _counts(seal: Seal) -> dict[str, int]:
    return {
        name.removeprefix("dropped by "): count for name, count in seal.notes["funnel"] if name not in ("prompts", "samples")
    }


def few_parts(found: Funnel) -> dict[str, Sequence[int]]:
    """Return the parts of a funnel with the rarest reasons as one."""
    names = list(found.parts)
    shown = {name: found.parts[name] for name in names[: MOST_REASONS + 1]}
    rest = [found.parts[name] for name in names[MOST_REASONS + 1 :]]
    return shown | ({f"{len(rest)} more reasons": [sum(values) for values in zip(*rest, strict=True)]} if rest else {})


# ---- what it took ----


def cost(run: Opened) -> Cost:
    stages: dict[str, float] = {stage: sum(one.seconds[stage] for one in run.rounds) for stage in COLUMNS}
    sizes = {
        (found.st_dev, found.st_ino): (path, found.st_size)
        for path in run.paths.folder.rglob("*")
        if path.is_file() and (found := path.stat())
    }
    weights = [size for path, size in sizes.values() if path.suffix == ".safetensors"]
    return Cost(
        generated=sum(one.tokens for one in run.rounds),
        trained=sum(learned(commit) for seal in run.seals for commit in run.commits[seal.round]),
        seconds=sum(stages.values()),
        stages=stages,
        disk=sum(size for _, size in sizes.values()),
        checkpoints=sum(weights),
    )


# ---- what it is held against ----


def controls(run: Opened) -> list[Control]:
    """Return the controls of this run that lie beside it and have a round: of its recipe and seed, of the same prompts, measured in the same way."""
    found = []
    for folder in runs_under(run.paths.folder.absolute().parent):
        try:
            found += [_control(run, folder)] if folder != run.paths.folder.absolute() else []
        except SelfkdError:  # another run's damage is not this page's to tell
            continue
    return sorted((one for one in found if one and max(one.values, default=0)), key=lambda one: one.name)


def _control(run: Opened, folder: Path) -> Control | None:
    other = records.read(folder / "run.json", Info, unchanged=False)
    control = str(other.recipe.get("control") or "")
    same = other.recipe.get("name") == f"{run.info.recipe.get('name')}-{control}" and other.seed == run.info.seed
    split = run.metric.partition("/")[0]
    if not control or not same or split not in other.prompts or other.prompts[split].digest != run.info.prompts[split].digest:
        return None
    how = {seal.measures.get(run.metric) for seal in run.seals}
    seals = [seal for seal in seals_of(type(run.paths)(folder)) if seal.measures.get(run.metric) in how]
    values = {seal.round: seal.metrics[run.metric] for seal in seals if seal.metrics.get(run.metric) is not None}
    return Control(other.name, control, values)
