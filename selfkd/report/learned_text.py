"""Training rows on a terminal, token by token: what is learned told from what is masked, by colour or, without colour, by brackets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from selfkd.core.wording import counted
from selfkd.report.as_prompted import CONTROL, UNDATED, pieces, undated
from selfkd.report.history import History
from selfkd.report.learned import AGAINST, Learned, Side, Update, no_update, spans, split, updates_of
from selfkd.report.rows import Found

LEARNED, LESS, MASKED = "bold green", "bold red", "dim"
BRACKETS, ASCII = ("⟦", "⟧"), ("[[", "]]")  # around what is learned, where there is no colour; where they cannot be written


def rows_in_tokens(found: Found, tok: Any, folder: Path) -> list[tuple[Learned, list[Update]]]:
    """Return the rows that were found in tokens, each as the first update that was given it learned it, and all that were given it."""
    history, rows = History.of(folder), found.first.to_dicts()
    known = updates_of(history, found.index, [row["id"] for row in rows])
    return [(split(row, tok, next(iter(known[row["id"]]), no_update(history))), known[row["id"]]) for row in rows]


def print_learned(found: Found, tok: Any, folder: Path, ids: bool, to: Console) -> None:
    """Print each row token by token; with `ids` the numbers too, and which of them are learned."""
    to.print(Text(f"{found.title}: {found.matched} of {found.total}, showing {found.first.height}", "bold"))
    to.print(_legend(to), soft_wrap=True)
    if undated(tok):
        to.print(Text(UNDATED, "yellow"), soft_wrap=True)
    records = found.first.to_dicts()
    for record, (row, given) in zip(records, rows_in_tokens(found, tok, folder), strict=True):
        to.print(Rule(Text(f"{record['kind']} {row.id}", "dim"), align="left", style="dim"))
        to.print(_fate(record, row, given), soft_wrap=True)
        for side in row.sides:
            _print_side(side, tok, ids, to)
        if row.teacher:
            _print_teacher(row.teacher, tok, to)


def _plain(to: Console) -> bool:
    return to.no_color or to.color_system is None


def _brackets(to: Console) -> tuple[str, str]:
    try:
        "".join(BRACKETS).encode(to.encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return BRACKETS


def _legend(to: Console) -> Text:
    if _plain(to):
        begins, ends = _brackets(to)
        return Text(
            f"{begins}learned{ends}; all else is masked: read, not learned. Of a rejected answer {begins}made less likely{ends}."
        )
    parts = [
        ("learned", LEARNED),
        ("made less likely", LESS),
        ("masked: read, not learned", MASKED),
        ("control token", CONTROL),
    ]
    return Text(" · ").join(Text(words, style) for words, style in parts)


def _fate(record: Mapping[str, Any], row: Learned, given: Sequence[Update]) -> Text:
    """Return what became of a row: its weight, and which updates learned it or left it out."""
    weight = 1.0 if record["weight"] is None else record["weight"]
    label = f" · label {record['label']:.4g}" if record["label"] is not None else ""
    text = Text(f"weight {weight:.4g}{label}")
    for update in given:
        said = (
            f"left out by {update.where}: {update.refused}" if update.refused else f"learned in {update.where} ({update.loss})"
        )
        text.append(f" · {said}", "yellow" if update.refused else "")
    if not given:
        text.append(" · no update was given it yet", "yellow")
    if row.refused and all(not update.refused for update in given):
        text.append(f" · refused: {row.refused}", "yellow")
    return text


def _print_side(side: Side, tok: Any, ids: bool, to: Console) -> None:
    less = side.name == AGAINST
    said = "made less likely" if less else "learned"
    to.print(Text(f"── {side.name}, {counted(len(side.ids), 'token')}, {side.count} {said}", "dim"), soft_wrap=True)
    to.print(_coloured(side, tok, LESS if less else LEARNED, None if not _plain(to) else _brackets(to)), soft_wrap=True)
    if ids:
        to.print(Text(json.dumps(list(side.ids)), "dim"), soft_wrap=True)
        to.print(Text(f"learned: {json.dumps([int(one) for one in side.learned])}", "dim"), soft_wrap=True)


def _coloured(side: Side, tok: Any, style: str, brackets: tuple[str, str] | None) -> Text:
    text, inside = Text(), False
    for span in spans(tok, side):
        if brackets and span.learned != inside:
            text.append(brackets[0] if span.learned else brackets[1])
        inside = span.learned
        control = " underline" if span.control else ""
        text.append(span.text, style + control if span.learned else CONTROL if span.control else MASKED)
    return text.append(brackets[1]) if brackets and inside else text


def _print_teacher(ids: Sequence[int], tok: Any, to: Console) -> None:
    to.print(Text(f"── prompt of the teacher, {counted(len(ids), 'token')}, none learned", "dim"), soft_wrap=True)
    text = Text()
    for piece in pieces(tok, (), ids):
        text.append(piece.text, CONTROL if piece.control else MASKED)
    to.print(text, soft_wrap=True)


def as_data(found: Found, tok: Any, folder: Path) -> list[dict[str, Any]]:
    """Return the same for a program, a mapping for each row that was found."""
    data = []
    for row, given in rows_in_tokens(found, tok, folder):
        sides = [
            {
                "name": side.name,
                "ids": list(side.ids),
                "learned": list(side.learned),
                "spans": [vars(one) for one in spans(tok, side)],
            }
            for side in row.sides
        ]
        data.append(
            {"updates": [vars(one) for one in given], "refused": row.refused, "sides": sides, "teacher": list(row.teacher)}
        )
    return data
