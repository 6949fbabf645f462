"""How what a sweep found is written: a table for the terminal, Markdown, CSV, LaTeX, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from selfkd.core.stats import Interval
from selfkd.report.compare import SAME
from selfkd.report.comparison import csv_of, latex_of, markdown_of, table_of
from selfkd.report.sweeps import OVER_SEEDS, Row, SweepReport
from selfkd.report.tables import ANY_WIDTH, bounds_text, change_text, count, number_text, span

NARROW = ("seeds", "base", "made", "learned", "time")


def print_report(found: SweepReport, to: Console) -> None:
    dim = [row.verdict == SAME for row in found.rows]
    whole = table_of(cells(found), dim)
    fits = Console(width=ANY_WIDTH).measure(whole).maximum <= to.width
    to.print(whole if fits else table_of(cells(found, NARROW), dim))
    for line in legend(found):
        to.print(Text(line, "dim"))
    for line in found.sentences:
        to.print(Text(line, "bold"))
    for note in found.notes:
        to.print(Text(note, "yellow"))


def written(found: SweepReport, form: str) -> str:
    """Return the report as csv, latex, markdown or json."""
    if form == "json":
        return json.dumps(found.to_json(), indent=1, ensure_ascii=False)
    if form == "csv":
        return csv_of([_numbers(row) for row in found.rows])
    said = [*legend(found), *found.sentences, *found.notes]
    if form == "latex":
        return latex_of(cells(found), said)
    return "\n\n".join([markdown_of(cells(found)), *said])


def legend(found: SweepReport) -> list[str]:
    if not any(row.seeds for row in found.rows):
        return []
    equal = f"at equal tokens: the last accepted round within {found.budget:,} tokens made and learned, what the cheapest method took"
    return [f"[ ]: 95 % {OVER_SEEDS}", f"{equal}; test: of the combination that dev chose; made, learned, time: of one trial"]


def cells(found: SweepReport, left_out: Sequence[str] = ()) -> list[list[str]]:
    values = [row.value for row in found.rows if row.value is not None]
    percent = all(0 <= value <= 1 for value in values)
    rows = [_row(row, found, percent) for row in found.rows]
    tested = any(row.test is not None for row in found.rows)
    kept = [title for title in rows[0] if title not in left_out and (title != "test" or tested)]
    if not any(row.seeds for row in found.rows):
        kept = [title for title in kept if any(row[title] for row in rows)]
    return [kept, *([row[title] for title in kept] for row in rows)]


def _row(row: Row, found: SweepReport, percent: bool) -> dict[str, str]:
    first = next((one.arm for one in found.rows if one.seeds), found.rows[0].arm)
    ends = [number_text(end, percent) for end in (row.low_seed, row.high_seed) if end is not None]
    seeds = " to ".join(ends)
    done = row.seeds > 0
    return {
        "": row.arm,
        found.metric: _mean_text(row.value, row.interval, percent) if done else row.why.partition(":")[0],
        "seeds": seeds,
        "base": "" if row.base is None else number_text(row.base, percent),
        f"vs. {first}": change_text(row.against, percent) if row.against else "",
        "verdict": row.verdict,
        "at equal tokens": "" if row.within is None else number_text(row.within, percent),
        "test": _mean_text(row.test, row.test_interval, percent),
        "trials": f"{row.done} of {row.wanted}",
        "made": count(row.generated) if done else "",
        "learned": count(row.trained) if done else "",
        "time": span(row.seconds) if done else "",
    }


def _mean_text(value: float | None, bounds: Interval | None, percent: bool) -> str:
    return "" if value is None else number_text(value, percent) + bounds_text(bounds, percent)


def _numbers(row: Row) -> dict[str, object]:
    bounds = {"": row.interval, "vs_first_": row.against and row.against.interval, "test_": row.test_interval}
    ends = {
        prefix: {f"{prefix}low": found.low if found else None, f"{prefix}high": found.high if found else None}
        for prefix, found in bounds.items()
    }
    return {
        "arm": row.arm,
        "control": row.control,
        "metric": row.metric,
        "value": row.value,
        **ends[""],
        "lowest_seed": row.low_seed,
        "highest_seed": row.high_seed,
        "base": row.base,
        "vs_first": row.against.value if row.against else None,
        **ends["vs_first_"],
        "verdict": row.verdict,
        "equal_tokens_value": row.within,
        "test": row.test,
        **ends["test_"],
        "trials": row.done,
        "trials_wanted": row.wanted,
        "chosen": " ".join(row.chosen),
        "generated": row.generated,
        "trained": row.trained,
        "seconds": round(row.seconds, 1),
        "why": row.why,
    }
