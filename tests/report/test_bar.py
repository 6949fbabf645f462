"""The lines of a run that goes on, as a pipe gets them."""

from __future__ import annotations

import io
import re
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from selfkd.report import bar, tables
from selfkd.report.bar import RunDisplay


def watched(done: Path, events: list[dict], seconds: list[float]) -> str:
    """What a pipe gets of `events`, one at each of `seconds`."""
    to = Console(width=120, record=True, file=io.StringIO(), force_terminal=False)
    now = iter(seconds)
    current = [0.0]
    shown = RunDisplay(done, lambda index: 7, to, lambda: current[0])
    with shown:
        for event in events:
            current[0] = next(now)
            shown.show(event)
    return to.export_text()


def answered(count: int) -> dict:
    return {"event": "progress", "round": 2, "step": "sample", "done": count, "total": 100, "unit": "answers", "rate": 2310.0}


def test_a_pipe_gets_a_line_at_once_and_then_at_most_every_ten_seconds(done):
    step = {"event": "step", "round": 2, "step": "sample", "verb": "sample", "stage": "generate", "number": 1}
    lines = watched(done, [step, *(answered(count) for count in (0, 10, 20, 60, 70))], [0, 1, 5, 8, 20, 21]).splitlines()
    assert lines[0].startswith("round 2  1/7 sample  starting engine")
    assert len(lines) == 2
    assert lines[1].endswith("60/100 answers  2310 tok/s  left 13 s  after 19 s")


def test_answers_found_from_an_earlier_attempt_do_not_make_the_time_left_look_short(done):
    step = {"event": "step", "round": 2, "step": "sample", "verb": "sample", "stage": "generate", "number": 1}
    text = watched(done, [step, answered(80), answered(90)], [0, 0, 20])
    assert "90/100 answers  2310 tok/s  left 20 s" in text


def test_a_sealed_round_leaves_one_line(done):
    text = watched(done, [{"event": "sealed", "round": 2}], [1])
    assert text.startswith("round 2")
    assert "kept" in text and "of 36" in text


def test_a_pipe_is_told_that_the_engine_starts_even_right_after_another_line(done):
    load = {"event": "step", "round": 0, "step": "load", "verb": "load", "stage": "other", "number": 1}
    measure = {"event": "step", "round": 0, "step": "measure", "verb": "measure", "stage": "measure", "number": 2}
    lines = watched(done, [load, measure], [0, 1]).splitlines()
    assert lines[1].startswith("base     2/7 measure  starting engine")


# ---- nothing is reported for long ----


@pytest.fixture
def quick(monkeypatch) -> None:
    """A second of the clock is a hundredth of one."""
    monkeypatch.setattr(bar, "BEAT_SECONDS", 0.01)


def sped_up() -> float:
    return time.monotonic() * 100


def lines_after(to: Console, count: int) -> list[str]:
    ends = time.monotonic() + 10
    while to.file.getvalue().count("\n") < count and time.monotonic() < ends:
        time.sleep(0.01)
    return to.file.getvalue().splitlines()


def pipe() -> Console:
    return Console(width=120, file=io.StringIO(), force_terminal=False)


def test_a_pipe_hears_of_a_silent_step_and_of_what_comes_before_the_first_one(done, quick):
    to = pipe()
    with RunDisplay(done, lambda index: 7, to, sped_up, begins="starting Ray") as display:
        assert int(re.fullmatch(r"starting Ray …  (\d+) s", lines_after(to, 1)[0])[1]) >= 15
        display.show({"event": "step", "round": 1, "step": "train", "verb": "train", "stage": "train", "number": 5})
        lines = lines_after(to, 4)
    assert re.fullmatch(r"round 1  5/7 train  \d+ s", lines[1])  # at once
    seconds = [int(re.fullmatch(r"round 1  5/7 train  (\d+) s", line)[1]) for line in lines[2:4]]
    assert seconds[0] >= 15 and seconds[1] - seconds[0] >= 15


def test_a_pipe_is_not_told_twice_of_what_was_just_reported(done):
    to = pipe()
    now = [0.0]
    with RunDisplay(done, lambda index: 7, to, lambda: now[0], begins="starting Ray") as display:
        display.print("Ctrl-C is safe")
        now[0] = 14.0
        display._beat()
        assert to.file.getvalue() == "Ctrl-C is safe\n"
        now[0] = 15.0
        display._beat()
        assert to.file.getvalue() == "Ctrl-C is safe\nstarting Ray …  15 s\n"


def test_a_file_whose_disk_fills_while_nothing_is_reported_is_told_by_the_next_event(done, quick):
    def broken(text: str) -> int:
        raise OSError(28, "No space left on device")

    to = pipe()
    with RunDisplay(done, lambda index: 7, to, sped_up, begins="starting Ray") as display:
        to.file.write = broken
        ends = time.monotonic() + 10
        while not display._pulse.error and time.monotonic() < ends:
            time.sleep(0.01)
        with pytest.raises(OSError, match="No space left"):
            display.show(answered(1))
        display.show(answered(2))  # the file is of no use any more: nothing is written, nothing raised


def test_whoever_waits_for_a_run_to_be_made_hears_of_it(quick):
    to = pipe()
    with bar.waiting("reading prompts and rewards", to, sped_up):
        lines = lines_after(to, 2)
    assert [re.sub(r"\d+ s", "n s", line) for line in lines[:2]] == ["reading prompts and rewards …  n s"] * 2
    with bar.waiting("nothing that takes long", to):
        pass
    assert len(to.file.getvalue().splitlines()) == len(lines)


def test_waiting_at_a_terminal_that_is_gone_stops_nothing():
    screen = Screen()
    screen.error = OSError(5, "Input/output error")
    with bar.waiting("reading prompts and rewards", Console(width=120, file=screen, force_terminal=True)):
        time.sleep(0.6)


class Screen(io.StringIO):
    """A terminal that can be taken away."""

    error: Exception | None = None

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.error:
            raise self.error
        return super().write(text)


def on(screen: Screen, done: Path) -> RunDisplay:
    return RunDisplay(done, lambda index: 7, Console(width=120, file=screen, force_terminal=True))


def until_drawn(display: RunDisplay) -> None:
    ends = time.monotonic() + 10
    while not (display.live and display.live.error) and time.monotonic() < ends:
        time.sleep(0.05)


def test_a_bar_that_cannot_be_drawn_is_told_by_the_next_event_and_its_thread_leaves_no_trace(done, monkeypatch):
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    screen = Screen()
    with on(screen, done) as display:
        screen.error = OSError(5, "Input/output error")
        until_drawn(display)
        with pytest.raises(OSError, match="Input/output error"):
            display.show(answered(1))
        assert display.live is None
        display.show(answered(2))  # the screen is gone: nothing is written, nothing raised
    assert died == []


def test_a_bar_with_a_fault_of_its_own_is_taken_away_and_lines_are_printed_instead(done):
    screen = Screen()
    display = on(screen, done)
    with display:
        display.steps_of = lambda index: 1 // 0
        display.current = answered(1)
        until_drawn(display)
        with pytest.raises(ZeroDivisionError):
            display.show({"event": "made"})
        assert display.live is None
        display.show({"event": "warning", "text": "still here"})
    assert "still here" in screen.getvalue()


def test_a_screen_that_is_gone_before_the_bar_opens_stops_nothing(done):
    screen = Screen()
    screen.error = OSError(5, "Input/output error")
    with on(screen, done) as display:
        with pytest.raises(OSError, match="Input/output error"):
            display.show(answered(1))
        display.show(answered(2))


def test_the_first_frame_counts_from_the_opening_of_the_bar_and_not_from_the_start_of_the_machine(done, monkeypatch):
    monkeypatch.setattr(bar._Bar, "start", lambda self: self.console.print(self.get_renderable()))  # as on a busy machine
    screen = Screen()
    to = Console(width=120, file=screen, force_terminal=True)
    with RunDisplay(done, lambda index: 7, to, clock=lambda: 27_720.0, begins="starting Ray"):
        pass
    assert "starting Ray …  0 s" in screen.getvalue()


def test_after_the_last_optimiser_step_the_line_says_what_still_takes_time():
    event = {"round": 1, "step": "train", "number": 4, "unit": "steps", "total": 28, "loss": 0.1}
    assert "writes and checks the weights  9 s" in tables.step_line({**event, "done": 28}, 5, "9 s").plain
    assert "writes" not in tables.step_line({**event, "done": 27}, 5, "9 s").plain
    assert "writes" not in tables.step_line({**answered(512), "total": 512}, 5, "9 s").plain


def test_an_update_that_was_stopped_inside_is_said_to_begin_again():
    event = {"round": 1, "step": "train", "unit": "steps", "done": 25, "total": 28}
    assert tables.begins_again(event) == "train begins again: 25 of 28 steps were made when it was stopped."
    assert tables.begins_again({**event, "unit": "answers"}) == ""
    assert tables.begins_again({}) == ""
