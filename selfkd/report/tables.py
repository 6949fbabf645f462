"""What a terminal shows of a run: a line per finished round, a line for the step in progress, the table of rounds, all the runs.

Prints statuses and events as they are; reads nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfkd.chain.measured import Measured
from selfkd.core.stats import Change, Interval
from selfkd.report import adapters, filters
from selfkd.report.status import COLUMNS, RoundSummary, Status

WIDEST_SCORE = 18  # letters of the column of scores
FILE_WIDTH = 120  # characters a line, where the output is a file or a pipe and has no width of its own
ANY_WIDTH = 10_000  # characters: no table is wider
LEGEND = "[ ]: 95 % intervals; vs. base: on the same prompts; kept: samples no step dropped; stages in seconds"
BAR_WIDTH = 20  # characters
UPDATE = "steps"  # the unit of a training's progress
FEW_KEPT = 0.02  # below this share of the samples, what a round learns rests on few lucky answers
LOW_SURVIVAL = 0.5  # below this share of an update in the engine, most of what was learned is not served
MUCH_CUT = 0.1  # above this share of answers cut at the limit, a change may be one of length
SHOWN_SECONDS = 0.5  # a stage that took less is left out of a round's line


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process with 1; `selfkd show … | head` is no failure


def console() -> Console:
    """Return a console as wide as its terminal; a file or pipe gets a width that holds the table of rounds."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return _Console(width=width, highlight=False, emoji=False)


def step_line(step: Mapping[str, Any], steps: int | None, spent: str = "", doing: str = "") -> Text:
    """Return one line for a step in progress, from its newest event: 'round 2  1/7 sample  ███░  5120/7473 answers  left 6 m'.

    `steps` is how many steps the round has, where that is known, and `spent` how long this one took so far: a figure that moves
    where no other does. `doing` says what a step without figures waits for.
    """
    index, number = int(step.get("round", 0)), step.get("number")
    line = Text(f"{_round_name(index):<8} ")
    if number:
        line.append(f"{number}/{steps} " if steps else f"step {number} ")
    line.append(str(step.get("step", "")), "bold")
    done, total = step.get("done"), step.get("total")
    if not done or not total:
        return line.append(f"  {doing}{spent}", "dim")
    filled = round(BAR_WIDTH * min(1.0, done / total))
    line.append("  " + "█" * filled, "green").append("░" * (BAR_WIDTH - filled), "dim")
    line.append(f"  {done}/{total} {step.get('unit', '')}")
    if step.get("rate"):
        line.append(f"  {step['rate']:.0f} tok/s")
    if step.get("loss") is not None:
        line.append(f"  loss {step['loss']:.3f}")
    if step.get("left") is not None:
        line.append(f"  left {span(step['left'])}")
    if step.get("unit") == UPDATE and done >= total:
        return line.append(f"  writes and checks the weights  {spent}", "dim")
    return line.append(f"  after {spent}", "dim") if spent else line


def begins_again(step: Mapping[str, Any]) -> str:
    """Return the line that an update stopped in the middle is made from its beginning, from its newest event; '' for any other step."""
    if step.get("unit") != UPDATE or not step.get("done"):
        return ""
    return f"{step['step']} begins again: {step['done']} of {step['total']} steps were made when it was stopped."


def round_line(summary: RoundSummary, split: str) -> Text:
    """Return the one line that stays of a finished round."""
    line = Text(f"{_round_name(summary.index):<8} ")
    measured = summary.measured.get(split)
    if measured:
        line.append(f"{mean_text(measured)}   ", "bold")
        against = against_base(measured, percent_of([measured]))
        line.append(f"{against}   " if against else "")
        line.append(f"{_scored(measured)}   " if _scored(measured) else "", "yellow")
    if summary.kept is not None:
        line.append(f"kept {summary.kept} of {summary.samples}   ")
    stages = [f"{stage} {span(seconds)}" for stage, seconds in summary.seconds.items() if seconds >= SHOWN_SECONDS]
    line.append("  ".join(stages), "dim")
    line.rstrip()
    return line if summary.accepted else line.append(f"   rolled back: {summary.why}", "yellow")


# -------------------------------------------------------------------------------------------------- the table of rounds


def print_rounds(state: Status, to: Console) -> None:
    """Print the table of rounds, what it rests on, and every warning a reader needs before believing it."""
    if not state.rounds:
        to.print("No round is sealed yet.")
        return
    to.print(rounds_table(state.rounds, state.split, to.width))
    for line in lines_of(state):
        to.print(line)


def rounds_table(rounds: Sequence[RoundSummary], split: str, width: int = FILE_WIDTH) -> Table:
    """Return a row for the base and one per round. A terminal too narrow for the seconds by stage gets their sum."""
    whole = _rounds_table(rounds, split, wide=True)
    return whole if Console(width=ANY_WIDTH).measure(whole).maximum <= width else _rounds_table(rounds, split, wide=False)


def rounds_cells(rounds: Sequence[RoundSummary], split: str, wide: bool = True) -> list[list[str | Text]]:
    """Return the titles of the table's columns, and under them a row for the base and one per round."""
    measured = _measured(rounds, split)
    score = f"{split}/{measured[0].score}" if measured else ""
    score = score if len(score) <= WIDEST_SCORE else f"{score[: WIDEST_SCORE - 1]}…"
    titles: list[str | Text] = ["", score, "vs. base", "kept", *(("tokens", *COLUMNS) if wide else ("seconds",)), "survived"]
    return [titles, *(_cells(summary, split, wide, percent_of(measured)) for summary in rounds)]


def _rounds_table(rounds: Sequence[RoundSummary], split: str, wide: bool) -> Table:
    (_, *titles), *rows = rounds_cells(rounds, split, wide)
    table = empty_table()
    table.add_column("", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def empty_table() -> Table:
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))


def _measured(rounds: Sequence[RoundSummary], split: str) -> list[Measured]:
    return [summary.measured[split] for summary in rounds if split in summary.measured]


def _cells(summary: RoundSummary, split: str, wide: bool, percent: bool) -> list[str | Text]:
    measured = summary.measured.get(split)
    share = f"{summary.kept / summary.samples:.0%}" if summary.samples and summary.kept is not None else ""
    stages = [f"{summary.seconds[stage]:.0f}" for stage in COLUMNS]
    survived = "" if summary.survived is None else f"{summary.survived:.0%}"
    return [
        Text(_round_name(summary.index) + ("" if summary.accepted else " ✗"), "" if summary.accepted else "yellow"),
        mean_text(measured, percent) if measured else "",
        against_base(measured, percent) if measured else "",
        f"{summary.kept}/{summary.samples} {share}" if wide and share else share,
        *([count(summary.tokens), *stages] if wide else [f"{sum(summary.seconds.values()):.0f}"]),
        Text(survived, "red" if _little_survived(summary) else ""),
    ]


def _little_survived(summary: RoundSummary) -> bool:
    return summary.survived is not None and summary.survived < LOW_SURVIVAL


def lines_of(state: Status) -> list[Text]:
    """Return the lines under the table: what its columns mean, the other splits, and what went wrong in a round."""
    lines = [Text(LEGEND, "dim")]
    if any(summary.survived is not None for summary in state.rounds):
        lines.append(
            Text(
                "survived: the share of the update that reaches the engine's weights; above 100% where rounding adds to it",
                "dim",
            )
        )
    lines += [Text(f"best: {state.best}")] if state.best else []
    splits = {split for summary in state.rounds for split in summary.measured}
    lines += [Text(f"{_round_name(summary.index)}, {said}") for summary in state.rounds for said in summary.checked]
    lines += [Text(said) for said in adapters.lines([(summary.index, summary.adapters) for summary in state.rounds])]
    lines += [_split_line(state.rounds, split) for split in sorted(splits - {state.split})]
    lines += [line for split in sorted(splits) for line in _cut_line(state.rounds, split)]
    lines += [line for summary in state.rounds for line in _told_lines(summary)]
    for summary in state.rounds:
        said = [*summary.apart, *filters.lines(summary.filters)]
        lines += [Text(f"{_round_name(summary.index)}: {one}") for one in said]
    return lines + [line for summary in state.rounds for line in warnings(summary, summary is state.rounds[-1])]


def _split_line(rounds: Sequence[RoundSummary], split: str) -> Text:
    """Return 'test/correct: base 20.0 % [15.6, 25.3]  →  round 2 25.0 % [20.1, 30.6] +5.0 [1.0, 9.0]'."""
    values = [(_round_name(summary.index), summary.measured[split]) for summary in rounds if split in summary.measured]
    shown = [f"{name} {mean_text(value)} {against_base(value, percent_of([value]))}".rstrip() for name, value in values]
    return Text(f"{_titled(split, values[0][1])}: " + "  →  ".join(shown))


def _cut_line(rounds: Sequence[RoundSummary], split: str) -> Iterator[Text]:
    """Yield 'dev: 80 % of answers were cut … at the base, 0 % at round 2' where that is so much at one end that figures rest on it."""
    known = [summary for summary in rounds if split in summary.cut]
    ends = [known[0], known[-1]] if len(known) > 1 else known
    if any(summary.cut[split] > MUCH_CUT for summary in ends):
        shares = ", ".join(f"{_round_name(summary.index)} {100 * summary.cut[split]:.0f} %" for summary in ends)
        said = f"{split}: answers cut at max_tokens of the measure step: {shares}; they are scored as they stand, so figures may tell of length"
        yield Text(said, "yellow")


def _told_lines(summary: RoundSummary) -> Iterator[Text]:
    """Yield 'round 1: judge: unread 0.02, length 0.41, at_highest 0.3' for each step that told numbers of itself."""
    for step in dict.fromkeys(name.partition("/")[0] for name in summary.told):
        own = {name.removeprefix(f"{step}/"): value for name, value in summary.told.items() if name.startswith(f"{step}/")}
        shown = ", ".join(f"{name} {'unknown' if value is None else f'{value:.3g}'}" for name, value in own.items())
        yield Text(f"{_round_name(summary.index)}: {step}: {shown}")


def _titled(name: str, measured: Measured) -> str:
    """Return dev/correct: a further score of a measure step has it in its name already."""
    return name if name.endswith(f"/{measured.score}") else f"{name}/{measured.score}"


def warnings(summary: RoundSummary, newest: bool) -> Iterator[Text]:
    """Yield what a reader of the table must know of a round.

    Why it was rolled back, that prompts have no score, that its update hardly survived or its swap was not proved, what
    it was made with where the run began with something else, why the run stopped.
    """
    name = _round_name(summary.index)
    for warning in summary.warnings:
        yield Text(warning, "yellow")
    for title, measured in summary.measured.items():
        if measured.differently:
            said = "was measured differently from the base, so they are not compared"
            yield Text(f"{name}: {_titled(title, measured)} {said}", "yellow")
        if _scored(measured):
            yield Text(f"{name}: {_titled(title, measured)} {_scored(measured)}", "yellow")
    if summary.samples and summary.kept is not None and 0 < summary.kept < FEW_KEPT * summary.samples:
        fact = f"{name} kept {summary.kept} of {summary.samples} samples, and all that it learned is in those."
        yield Text(f"{fact} Look at what drops the others: selfkd show --where 'NOT kept'", "yellow")
    if not summary.accepted:
        yield Text(f"{name} was rolled back: {summary.why}", "yellow")
    if _little_survived(summary):
        fact = f"{name}: only {summary.survived:.0%} of the update reaches the engine."
        yield Text(f"{fact} Raise trl.learning_rate, or leave `dither` on.", "red")
    elif summary.unproved:
        yield Text(f"{name}: the weight swap was not proved: {summary.unproved}", "yellow")
    if summary.moved:
        yield Text(f"{name} was not made with what the run began with: {summary.moved}", "yellow")
    if summary.stop:
        yield Text(f"Stopped after {name}: {summary.stop}" + ("" if newest else "; then it was asked to go on"))


# ---------------------------------------------------------------------------------------------------------- all the runs


def runs_table(states: Sequence[Status]) -> Table:
    """Return a row per run: where it stands, and its score before, after and by how much it changed."""
    table = empty_table()
    for title in ("run", "model", "state", "rounds", "base", "last", "change"):
        table.add_column(title)
    for state in states:
        rounds = f"{max(0, len(state.rounds) - 1)} of {state.rounds_wanted}"
        table.add_row(str(state.folder), state.model, state.state, rounds, *_first_and_last(state))
    return table


def _first_and_last(state: Status) -> tuple[str, str, str]:
    measured = _measured(state.rounds, state.split)
    if not measured:
        return "", "", ""
    last = measured[-1]
    change = against_base(last, percent_of(measured))
    return mean_text(measured[0]), mean_text(last) if len(measured) > 1 else "", change


def print_status(state: Status, to: Console) -> None:
    control = f"control {state.control} · " if state.control else ""
    said = f"{state.name} · {control}{state.model} · {rounds_of(state.rounds_wanted)} · "
    head = Text(said).append(state.state, "bold")
    to.print(head.append(f" ({state.note.splitlines()[0]})" if state.note else ""))
    print_rounds(state, to)
    if state.progress:
        to.print(step_line(state.progress, None, doing="started"))
    if state.log:
        to.print(Text(f"Log: {state.log}", "dim"))


# ----------------------------------------------------------------------------------------------------------------- words


def _round_name(index: int) -> str:
    return "base" if index == 0 else f"round {index}"


def percent_of(measured: Sequence[Measured]) -> bool:
    """Whether all scores lie between 0 and 1; such read as percentages, others as they are."""
    return all(0.0 <= one.value <= 1.0 for one in measured if one.value is not None)


def mean_text(measured: Measured, percent: bool | None = None) -> str:
    """Return '20.0 % [13.3, 28.9]': the two bounds, for their distances from the mean differ; none where there is no interval."""
    if measured.value is None:
        return "unscored"
    percent = percent_of([measured]) if percent is None else percent
    return number_text(measured.value, percent) + bounds_text(measured.interval, percent)


def number_text(value: float, percent: bool) -> str:
    return f"{100 * value:.1f} %" if percent else f"{value:.3g}"


def against_base(measured: Measured, percent: bool) -> str:
    """Return the change against the base, '≠' where the two were not measured in the same way."""
    if measured.differently:
        return "≠"
    return change_text(measured.change, percent) if measured.change else ""


def change_text(change: Change, percent: bool) -> str:
    value = f"{100 * change.value:+.1f}" if percent else f"{change.value:+.3g}"
    return value + bounds_text(change.interval, percent)


def bounds_text(interval: Interval | None, percent: bool) -> str:
    if interval is None:
        return ""
    if percent:
        return f" [{100 * interval.low:z.1f}, {100 * interval.high:z.1f}]"
    return f" [{interval.low:.3g}, {interval.high:.3g}]"


def _scored(measured: Measured) -> str:
    """Return how many prompts were scored, where that is fewer than were asked: the mean is then of those only."""
    return f"scored {measured.scored} of {measured.prompts} prompts" if measured.scored < measured.prompts else ""


def rounds_of(number: int) -> str:
    return "1 round" if number == 1 else f"{number} rounds"


def span(seconds: float) -> str:
    """Return 45 s, 14 m, 2 h 05 m."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} m" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} m"


def count(number: int) -> str:
    """Return 950, 38 k, 1.2 M."""
    if number < 10_000:
        return str(number)
    return f"{number / 1e3:.0f} k" if number < 1_000_000 else f"{number / 1e6:.1f} M"
