"""How a comparison of runs is written: a table for the terminal, CSV for a spreadsheet, LaTeX for a paper, JSON for a program."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfkd.report.compare import SAME, Arm, Comparison
from selfkd.report.tables import (
    ANY_WIDTH,
    against_base,
    change_text,
    count,
    empty_table,
    mean_text,
    number_text,
    percent_of,
    span,
)

LEGEND = "[ ]: 95 % intervals, changes on the same prompts"
SPENT = "made, learned, time: until the end of that round"
LATEX_SIGNS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def print_comparison(found: Comparison, to: Console) -> None:
    """Print a table, in a terminal too narrow for all of it without what was spent and the change against the base."""
    whole = _table(found)
    fits = Console(width=ANY_WIDTH).measure(whole).maximum <= to.width
    to.print(whole if fits else _table(found, wide=False))
    for line in (f"{LEGEND}; {SPENT}" if fits else f"{LEGEND}; a wider terminal shows more", _equal_tokens(found)):
        to.print(Text(line, "dim"))
    for note in found.notes:
        to.print(Text(note, "yellow"))


def _table(found: Comparison, wide: bool = True) -> Table:
    table = empty_table()
    titles, *rows = _cells(found, wide)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for arm, row in zip(found.arms, rows, strict=True):
        table.add_row(*row, style="dim" if arm.verdict == SAME else "")
    return table


def as_json(found: Comparison) -> str:
    return json.dumps(found.to_json(), indent=1, ensure_ascii=False)


def as_csv(found: Comparison) -> str:
    """Return plain numbers, one row per run: shares as they are, empty where there is no figure."""
    out = io.StringIO()
    rows = [_numbers(arm) for arm in found.arms]
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def as_latex(found: Comparison) -> str:
    """Return a tabular with booktabs' rules; its notes are comments before it."""
    titles, *rows = _cells(found)
    lines = [f"% {' '.join(line.split())}" for line in (f"{LEGEND}; {SPENT}", _equal_tokens(found), *found.notes)]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}", r"\toprule", _latex_row(titles), r"\midrule"]
    return "\n".join([*lines, *map(_latex_row, rows), r"\bottomrule", r"\end{tabular}"])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    """Return text as LaTeX prints it.

    >>> _escaped("50.0 % of a_b")
    '50.0 \\\\% of a\\\\_b'
    """
    return re.sub(r"[\\~^&%$#_{}]", lambda found: LATEX_SIGNS.get(found[0], f"\\{found[0]}"), text)


def _equal_tokens(found: Comparison) -> str:
    return f"at equal tokens: the last accepted round within {found.budget:,} tokens made and learned, which is what the cheapest run took"


def _cells(found: Comparison, wide: bool = True) -> list[list[str]]:
    """Return the titles, and a row of texts for each run."""
    percent = percent_of([arm.measured for arm in found.arms])
    rows = [_row(arm, found, percent) for arm in found.arms]
    left_out = () if wide else ("vs. base", "made", "learned", "time")
    kept = [title for title in rows[0] if title not in left_out]
    return [kept, *([row[title] for title in kept] for row in rows)]


def _row(arm: Arm, found: Comparison, percent: bool) -> dict[str, str]:
    within = arm.within
    value = "" if within is None or within.value is None else f"{number_text(within.value, percent)} (round {within.round})"
    return {
        "": arm.run,
        "round": str(arm.round),
        found.metric: mean_text(arm.measured, percent),
        "vs. base": against_base(arm.measured, percent),
        f"vs. {found.arms[0].run}": change_text(arm.against, percent) if arm.against else "",
        "verdict": arm.verdict,
        "at equal tokens": value,
        "made": count(arm.generated),
        "learned": count(arm.trained),
        "time": span(arm.seconds),
    }


def _numbers(arm: Arm) -> dict[str, object]:
    base, against = arm.measured.change, arm.against
    return {
        "run": arm.run,
        "round": arm.round,
        "metric": arm.measured.name,
        "value": arm.measured.value,
        **_bounds("", arm.measured),
        "vs_base": base and base.value,
        **_bounds("vs_base_", base),
        "vs_first": against and against.value,
        **_bounds("vs_first_", against),
        "verdict": arm.verdict,
        "prompts": arm.measured.scored,
        "equal_tokens_value": arm.within and arm.within.value,
        "equal_tokens_round": arm.within and arm.within.round,
        "generated": arm.generated,
        "trained": arm.trained,
        "seconds": round(arm.seconds, 3),
        "digest": arm.digest,
    }


def _bounds(prefix: str, found: object) -> dict[str, float | None]:
    interval = getattr(found, "interval", None)
    return {f"{prefix}low": interval and interval.low, f"{prefix}high": interval and interval.high}
