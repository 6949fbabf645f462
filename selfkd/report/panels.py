"""Rows on a terminal: one panel each, for samples and for training rows. Prints what `selfkd.report.rows` found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from selfkd.report.rows import Found
from selfkd.rewards.contract import told

SHOWN_CHARACTERS = 2000  # of one text: the thousandth line of a repetition loop says no more than the hundredth


def print_rows(found: Found, to: Console) -> None:
    """Print one panel per row, under a line that says how many there are in all."""
    to.print(Text(f"{found.title}: {found.matched} of {found.total}, showing {found.first.height}", "bold"))
    for row in found.first.iter_rows(named=True):
        to.print(_training_row(row) if found.table == "rows" else _sample(row, found.scores, found.reasons))


def _sample(row: Mapping[str, Any], scores: Sequence[str], reasons: Mapping[tuple[str, str], str]) -> Panel:
    parts: list[RenderableType] = [_field("prompt", last_user(row["messages"]))]
    if row["teacher_messages"] and row["messages"] and row["teacher_messages"] != row["messages"]:
        parts.append(_field("teacher saw", _teacher_text(row["teacher_messages"])))
    if row["answer"] is not None:
        parts.append(_field("answer", row["answer"]))
    values = "   ".join(f"{name} {_number(row[name])}" for name in scores)
    length = f"{row['tokens']} tokens, {'cut at the limit' if row['finish_reason'] == 'length' else row['finish_reason']}"
    foot = Text(f"{values}   " if values else "").append(_fate(row)).append(f"   {length}   {row['model']}", "dim")
    failed = [(name, reasons[row["id"], name]) for name in scores if row[name] is None and (row["id"], name) in reasons]
    whys = [Text(told(name, why), "yellow") for name, why in failed]
    answer = (Rule(style="dim"), Text(_cut(row["text"])), Rule(style="dim"))
    return _panel(f"{row['stream']} {row['id']}", *parts, *answer, foot, *whys)


def _fate(row: Mapping[str, Any]) -> Text:
    if row["aside"] and row["why"] is None:
        return Text(f"judges {', '.join(row['parents'])}")
    if row["kept"] is None and row["why"] is None:
        return Text("held out")
    return Text("kept", "green") if row["kept"] else Text(f"dropped by {row['why']}", "yellow")


def _training_row(row: Mapping[str, Any]) -> Panel:
    messages = [_field(message["role"], message["content"]) for message in row["messages"] or ()]
    if row["teacher_messages"]:
        messages.append(_field("teacher sees", _teacher_text(row["teacher_messages"])))
    if row["ranked"] is not None:
        learned = [_field(_number(answer["score"]), answer["text"]) for answer in row["ranked"]]
    elif row["rejected"] is None:
        learned = [_field("completion", row["chosen"])]
    else:
        learned = [_field("chosen", row["chosen"]), _field("rejected", row["rejected"])]
    origin = ", ".join(row["samples"] or ()) or "no sample"
    ended = "" if row["chosen_ended"] else "   not ended: no end token to learn"
    numbers = [("label", row["label"])] * (row["label"] is not None)
    numbers += [(column["name"], column["value"]) for column in row["columns"] or ()]
    said = "".join(f"   {name} {_number(value)}" for name, value in numbers)
    foot = Text(f"{row['role']}   weight {_number(row['weight'])}{said}   from {origin}{ended}", "dim")
    return _panel(f"{row['kind']} {row['id']}", *messages, Rule(style="dim"), *learned, Rule(style="dim"), foot)


def _panel(title: str, *parts: RenderableType) -> Panel:
    return Panel(Group(*parts), title=title, title_align="left", border_style="dim")


def _field(name: str, text: str) -> Text:
    return Text(f"{name}: ", "dim").append(Text(_cut(text), ""))


def last_user(messages: Sequence[Mapping[str, str]] | None) -> str:
    contents = [message["content"] for message in messages or () if message["role"] == "user"]
    return contents[-1] if contents else json.dumps(messages, ensure_ascii=False)


def _teacher_text(asked: Sequence[Mapping[str, str]]) -> str:
    """Return all that a teacher saw: its one message, or every turn with its role."""
    return last_user(asked) if len(asked) == 1 else "\n".join(f"[{turn['role']}] {turn['content']}" for turn in asked)


def _cut(text: str | None) -> str:
    if text is None:
        return ""
    rest = len(text) - SHOWN_CHARACTERS
    return text if rest <= 0 else f"{text[:SHOWN_CHARACTERS]} … ({rest} more characters)"


def _number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.4g}"
