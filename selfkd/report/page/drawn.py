"""Which charts a page has, and what each says in words to a reader who cannot see it."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from selfkd.report.compare import Comparison
from selfkd.report.page import charts
from selfkd.report.page.charts import Curve
from selfkd.report.page.noted import Diagnostic
from selfkd.report.page.opened import Opened
from selfkd.report.page.story import Control, Funnel, few_parts
from selfkd.report.sweeps import SweepReport
from selfkd.report.tables import number_text, percent_of


def path_of(run: Opened, name: str = "") -> Curve:
    """Return the figure of a run by round with its bounds; rounds that were rolled back are faint."""
    known = {index: one for index, one in sorted(run.main.items()) if one.value is not None}
    accepted = {one.index: one.accepted for one in run.rounds}
    bounds = [(one.interval.low, one.interval.high) if one.interval else None for one in known.values()]
    values = [one.value for one in known.values() if one.value is not None]
    return Curve(name or run.state.name, list(known), values, bounds, [not accepted[index] for index in known])


def accuracy(run: Opened, controls: Sequence[Control]) -> Markup | None:
    """Return the figure by round with its band, the base as a line, and the controls; None where nothing was measured."""
    line = path_of(run)
    if not line.x:
        return None
    others = [Curve(f"control {one.control}", list(one.values), list(one.values.values())) for one in controls]
    base = run.main.get(0)
    says = f"{run.metric} by round, with 95 % intervals: " + in_words(line, run.percent)
    says += "".join(f" {one.name}: {in_words(one, run.percent)}" for one in others)
    return charts.curves(
        [line, *others], f"{run.state.name}: {run.metric} by round", says, run.metric, run.percent, base.value if base else None
    )


def in_words(line: Curve, percent: bool) -> str:
    """Return a line as a sentence: every point of a short one, of a long one its ends and extremes."""
    named = [f"{'base' if x == 0 else f'round {x:g}'} {number_text(y, percent)}" for x, y in zip(line.x, line.y, strict=True)]
    if len(named) > 12:
        at = {0, len(named) - 1, line.y.index(max(line.y)), line.y.index(min(line.y))}
        named = [named[one] for one in sorted(at)]
    return ", ".join(named) + "."


def samples(run: Opened, found: Funnel) -> Markup:
    parts = few_parts(found)
    last = ", ".join(f"{name} {values[-1]}" for name, values in parts.items())
    title = f"{run.state.name}: what became of samples"
    return charts.stacked(
        parts,
        found.rounds,
        title,
        f"Samples of each round by what became of them. In round {found.rounds[-1]}: {last}.",
        "samples",
    )


def diagnostic(run: Opened, one: Diagnostic) -> Markup | None:
    """Return a small chart of a diagnostic that has two values or more."""
    known = sorted(one.known.items())
    if len(known) < 2:
        return None
    line = Curve(
        one.name, [index for index, _ in known], [value for _, value in known], [one.bounds.get(index) for index, _ in known]
    )
    return charts.small(line, f"{run.state.name}: {one.name} by round", in_words(line, one.percent), one.percent)


def side_by_side(runs: Sequence[Opened], metric: str) -> Markup | None:
    """Return the runs of a comparison in one chart, by round."""
    lines = [path_of(run) for run in runs if run.metric == metric]
    lines = [line for line in lines if line.x]
    if len(lines) < 2:
        return None
    percent = all(run.percent for run in runs)
    says = " ".join(f"{line.name}: {in_words(line, percent)}" for line in lines)
    return charts.curves(lines, f"{metric} of {len(lines)} runs by round", says, metric, percent)


def compared(found: Comparison) -> Markup:
    percent = percent_of([arm.measured for arm in found.arms])
    rows = [
        (f"{arm.run}, round {arm.round}", arm.measured.value, arm.measured.interval)
        for arm in found.arms
        if arm.measured.value is not None
    ]
    return _dots(
        [(name, value, (between.low, between.high) if between else None) for name, value, between in rows],
        found.metric,
        percent,
    )


def arms(found: SweepReport) -> Markup | None:
    rows = [
        (row.arm, row.value, (row.interval.low, row.interval.high) if row.interval else None)
        for row in found.rows
        if row.value is not None
    ]
    return _dots(rows, found.metric, all(0 <= value <= 1 for _, value, _ in rows)) if rows else None


def _dots(rows: Sequence[tuple[str, float, tuple[float, float] | None]], metric: str, percent: bool) -> Markup:
    says = "; ".join(f"{name} {number_text(value, percent)}" for name, value, _ in rows) + "."
    return charts.dots(rows, f"{metric} with 95 % intervals", says, metric, percent)
