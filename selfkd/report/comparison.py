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
FORMULA = ("=", "+", "-", "@", "\t", "\r")
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
    return table_of(cells(found, wide), [arm.verdict == SAME for arm in found.arms], wraps=not wide)


def table_of(cells: Sequence[Sequence[str]], dim: Sequence[bool], wraps: bool = False) -> Table:
    """Return a table of titles and rows, of which those are dim that show no difference. One that `wraps` cuts no cell off."""
    table = empty_table()
    titles, *rows = cells
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=not wraps, overflow="fold")
    for row, faint in zip(rows, dim, strict=True):
        table.add_row(*row, style="dim" if faint else "")
    return table


def as_json(found: Comparison) -> str:
    return json.dumps(found.to_json(), indent=1, ensure_ascii=False)


def as_csv(found: Comparison) -> str:
    """Return plain numbers, one row per run: shares as they are, empty where there is no figure."""
    return csv_of([_numbers(arm) for arm in found.arms])


def csv_of(rows: Sequence[dict[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain_cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue().rstrip("\n")


def plain_cell(value: object) -> object:
    """Return a cell that no spreadsheet takes for a formula: such a text gets an apostrophe before it.

    >>> plain_cell("=1+1"), plain_cell("star"), plain_cell(-0.5)
    ("'=1+1", 'star', -0.5)
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def markdown_of(cells: Sequence[Sequence[str]]) -> str:
    titles, *rows = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))


def as_latex(found: Comparison) -> str:
    """Return a tabular with booktabs' rules; its notes are comments before it."""
    return latex_of(cells(found), (*legend(found), *found.notes))


def legend(found: Comparison) -> list[str]:
    """Return what the columns of the whole table mean."""
    return [f"{LEGEND}; {SPENT}", _equal_tokens(found)]


def as_markdown(found: Comparison) -> str:
    """Return a table as Markdown, with a line for each note."""
    return "\n\n".join([markdown_of(cells(found)), f"{LEGEND}; {SPENT}.", f"{_equal_tokens(found)}.", *found.notes])


def latex_of(cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    titles, *rows = cells
    lines = [f"% {' '.join(line.split())}" for line in notes]
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


def cells(found: Comparison, wide: bool = True) -> list[list[str]]:
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
        "control": arm.control,
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
