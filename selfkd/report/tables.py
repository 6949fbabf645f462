"""The terminal: one line per finished round, one bar for the step in progress, the table of rounds at the end.

Takes events and statuses as they are and prints them; reads nothing itself except through `selfkd.report.status`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfkd.core.stats import Change
from selfkd.report.status import STAGES, Measured, Round, Status

WIDE = 120
ROOM = 104  # columns that the table of rounds takes with everything in it
BAR = 20
FAINT = 0.5  # below this share of an update in the engine, most of what was learned is not served


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process with 1; `selfkd show … | head` is no failure


def console() -> Console:
    """A console as wide as its terminal; a file or pipe, which has no width, gets one that holds the table of rounds."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    return _Console(width=width, highlight=False, emoji=False)


def step_line(step: Mapping[str, Any], steps: int | None, idle: str = "") -> Text:
    """One line for a step in progress, from its newest event."""
    index, number = int(step.get("round", 0)), step.get("number")
    line = Text(f"{'base' if index == 0 else f'round {index}':<8} ")
    line.append(f"{number}/{steps} " if number and steps else f"step {number} " if number else "")
    line.append(str(step.get("step", "")), "bold")
    done, total = step.get("done"), step.get("total")
    if not done or not total:
        return line.append(f"  {idle}", "dim")
    filled = round(BAR * min(1.0, done / total))
    line.append("  " + "█" * filled, "green").append("░" * (BAR - filled), "dim")
    line.append(f"  {done}/{total} {step.get('unit', '')}")
    if step.get("rate"):
        line.append(f"  {step['rate']:.0f} tok/s")
    if step.get("loss") is not None:
        line.append(f"  loss {step['loss']:.3f}")
    return line.append(f"  left {span(step['left'])}") if step.get("left") is not None else line


def round_line(done: Round, split: str) -> Text:
    """The one line that stays of a finished round."""
    line = Text(f"{_name(done):<8} ")
    measured = done.measured.get(split)
    if measured:
        line.append(f"{_mean(measured)}   ", "bold")
        line.append(f"{_change(measured.change, _percent([measured]))}   " if measured.change else "")
    if done.kept is not None:
        line.append(f"kept {done.kept} of {done.samples}   ")
    line.append("  ".join(f"{stage} {span(spent)}" for stage, spent in done.seconds.items() if spent >= 0.5), "dim")
    line.rstrip()
    return line if done.accepted else line.append(f"   rolled back: {done.why}", "yellow")


# -------------------------------------------------------------------------------------------------- the table of rounds


def print_rounds(state: Status, to: Console) -> None:
    """The table of rounds, what it rests on, and every warning a reader needs before believing it."""
    if not state.rounds:
        to.print("No round is sealed yet.")
        return
    to.print(rounds_table(state.rounds, state.split, to.width))
    for line in _notes(state):
        to.print(line)


def rounds_table(rounds: Sequence[Round], split: str, width: int = WIDE) -> Table:
    """A row for the base and one per round. A terminal too narrow for the seconds by stage gets their sum."""
    wide = width >= ROOM
    shown = [done.measured[split] for done in rounds if split in done.measured]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    titles = [
        f"{split}/{shown[0].score}"[:18] if shown else "",
        "vs. base",
        "kept",
        *(("tokens", *STAGES, "other") if wide else ("seconds",)),
    ]
    for title in (*titles, "survived"):
        table.add_column(title, justify="right", no_wrap=True)
    for done in rounds:
        table.add_row(*_cells(done, split, wide, _percent(shown)))
    return table


def _cells(done: Round, split: str, wide: bool, percent: bool) -> list[str | Text]:
    measured = done.measured.get(split)
    kept = f"{done.kept / done.samples:.0%}" if done.samples and done.kept is not None else ""
    seconds = [f"{done.seconds[stage]:.0f}" for stage in (*STAGES, "other")]
    survived = "" if done.survived is None else f"{done.survived:.0%}"
    return [
        Text(_name(done) + ("" if done.accepted else " ✗"), "" if done.accepted else "yellow"),
        _mean(measured, percent) if measured else "",
        _change(measured.change, percent) if measured and measured.change else "",
        f"{done.kept}/{done.samples} {kept}" if wide and kept else kept,
        *([count(done.tokens), *seconds] if wide else [f"{sum(done.seconds.values()):.0f}"]),
        Text(survived, "red" if done.survived is not None and done.survived < FAINT else ""),
    ]


def _notes(state: Status) -> list[Text]:
    """What stands under the table: other splits, rolled-back rounds, faint updates, unproved swaps, the reason for stopping."""
    lines = [
        Text(
            "± and [ ]: 95 % intervals; vs. base: on the same prompts; kept: samples no step dropped; stages in seconds", "dim"
        )
    ]
    if any(done.survived is not None for done in state.rounds):
        lines.append(Text("survived: the share of the update that reaches the engine's weights", "dim"))
    others = sorted({split for done in state.rounds for split in done.measured} - {state.split})
    for split in others:
        values = [(_name(done), done.measured[split]) for done in state.rounds if split in done.measured]
        said = [
            f"{name} {_mean(value)}{' ' + _change(value.change, _percent([value])) if value.change else ''}"
            for name, value in values
        ]
        name = split if split.endswith(f"/{values[0][1].score}") else f"{split}/{values[0][1].score}"
        lines.append(Text(f"{name}: " + "  →  ".join(said)))
    for done in state.rounds:
        if not done.accepted:
            lines.append(Text(f"{_name(done)} was rolled back: {done.why}", "yellow"))
        if done.survived is not None and done.survived < FAINT:
            text = f"{_name(done)}: only {done.survived:.0%} of the update reaches the engine. Raise trl.learning_rate, or leave `dither` on."
            lines.append(Text(text, "red"))
        elif done.unproved:
            lines.append(Text(f"{_name(done)}: the weight swap was not proved: {done.unproved}", "yellow"))
        if done.stop:
            lines.append(Text(f"Stopped after {_name(done)}: {done.stop}"))
    return lines


# ---------------------------------------------------------------------------------------------------------- all the runs


def runs_table(states: Sequence[Status]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("run", "model", "state", "rounds", "base", "last", "change"):
        table.add_column(title)
    for state in states:
        measured = [done.measured[state.split] for done in state.rounds if state.split in done.measured]
        base, last = (_mean(measured[0]), _mean(measured[-1])) if measured else ("", "")
        change = measured[-1].change if measured else None
        said = _change(change, _percent(measured)) if change else ""
        rounds = f"{max(0, len(state.rounds) - 1)} of {state.rounds_wanted}"
        table.add_row(str(state.folder), state.model, state.state, rounds, base, last if len(measured) > 1 else "", said)
    return table


def print_status(state: Status, to: Console) -> None:
    head = Text(f"{state.name} · {state.model} · {rounds_of(state.rounds_wanted)} · ").append(state.state, "bold")
    to.print(head.append(f" ({state.note.splitlines()[0]})" if state.note else ""))
    print_rounds(state, to)
    if state.progress:
        to.print(step_line(state.progress, None, "started"))
    if state.log:
        to.print(Text(f"Log: {state.log}", "dim"))


# ----------------------------------------------------------------------------------------------------------------- words


def _name(done: Round) -> str:
    return "base" if done.index == 0 else f"round {done.index}"


def _percent(measured: Sequence[Measured]) -> bool:
    """Scores between 0 and 1 read as percentages, others as they are."""
    return all(0.0 <= one.value <= 1.0 for one in measured if one.value is not None)


def _mean(measured: Measured, percent: bool | None = None) -> str:
    if measured.value is None:
        return "unscored"
    half = measured.interval or 0.0
    if _percent([measured]) if percent is None else percent:
        return f"{measured.value:.1%}".replace("%", " %") + f" ±{100 * half:.1f}"
    return f"{measured.value:.3g} ±{half:.2g}"


def _change(moved: Change, percent: bool) -> str:
    scale, form = (100, "+.1f") if percent else (1, "+.3g")
    low, high = (f"{scale * bound:{form[1:]}}" for bound in (moved.low, moved.high))
    return f"{scale * moved.value:{form}} [{low}, {high}]"


def rounds_of(number: int) -> str:
    return "1 round" if number == 1 else f"{number} rounds"


def span(seconds: float) -> str:
    """45 s, 14 m, 2 h 05 m."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} m" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} m"


def count(number: int) -> str:
    """950, 38 k, 1.2 M."""
    if number < 10_000:
        return str(number)
    return f"{number / 1e3:.0f} k" if number < 1_000_000 else f"{number / 1e6:.1f} M"
