"""What a person sees never stops a run: the display, the log, a full disk. Each may fail at every event; it is noted once."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chains import end, go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.attempt import Attempt, Watch
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.errors import Stopped
from selfkd.report.notebook import run as run_to_the_end


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    return end(go(recipe_in(folder), folder / "run"))


def watched(folder: Path, watch: Watch) -> Run:
    return run_to_the_end(recipe_in(folder), folder / "run", Machine(backend="fake"), watch)


def events(run: Run) -> list[dict[str, Any]]:
    lines = run.paths.events(1).read_text().splitlines()
    return [json.loads(line) for line in lines if line]


def warnings(run: Run) -> list[str]:
    return [event["text"] for event in events(run) if event["event"] == "warning"]


def raising(error: Exception) -> Callable[[dict[str, Any]], None]:
    def watch(event: dict[str, Any]) -> None:
        raise error

    return watch


class NoRoom:
    """A Path.open for which the disk of the log is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.names, self.real, self.refused = names, Path.open, 0
        monkeypatch.setattr(Path, "open", lambda path, *how, **more: self.open(path, *how, **more))

    def open(self, path: Path, *how: Any, **more: Any) -> Any:
        if path.name in self.names:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return self.real(path, *how, **more)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such colour"),
        BrokenPipeError(),
        OSError(errno.EIO, "terminal is gone"),
        UnicodeEncodeError("ascii", "█", 0, 1, "no"),
    ],
)
def test_a_display_that_raises_at_every_event_is_noted_once_and_the_run_ends_on_the_same_digest(tmp_path, undisturbed, error):
    run = watched(tmp_path, raising(error))
    assert end(run) == undisturbed
    assert len(warnings(run)) == 1
    assert f"the display failed ({type(error).__name__}" in warnings(run)[0]
    assert "Traceback" in (tmp_path / "run/logs/attempt-001/driver.log").read_text()


def test_a_log_that_cannot_be_written_at_any_event_is_told_once_and_the_run_ends_on_the_same_digest(
    tmp_path, undisturbed, monkeypatch
):
    seen: list[dict[str, Any]] = []
    disk = NoRoom(monkeypatch, "events.jsonl")
    assert end(watched(tmp_path, seen.append)) == undisturbed
    assert disk.refused == len([event for event in seen if event["event"] != "warning"]) > 20
    assert [event["text"] for event in seen if event["event"] == "warning"] == [
        f"events.jsonl failed (OSError: [Errno 28] No space left on device: '{tmp_path}/run/logs/attempt-001/events.jsonl'). "
        "The run goes on without."
    ]


def test_where_display_and_log_fail_at_every_event_stderr_says_so_and_the_run_ends_on_the_same_digest(
    tmp_path, undisturbed, monkeypatch, capsys
):
    NoRoom(monkeypatch, "events.jsonl", "driver.log")
    assert end(watched(tmp_path, raising(BrokenPipeError()))) == undisturbed
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 3 and any("events.jsonl failed" in line for line in said)


def test_without_a_display_a_log_that_fails_is_told_on_stderr(tmp_path, undisturbed, monkeypatch, capsys):
    NoRoom(monkeypatch, "events.jsonl")
    run = run_to_the_end(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake"))
    assert end(run) == undisturbed
    assert capsys.readouterr().err.count("events.jsonl failed") == 1


def test_a_disk_that_fills_up_and_is_emptied_again_tears_no_later_line(tmp_path):
    attempt = go(recipe_in(tmp_path), tmp_path / "run").begin()
    log = attempt.paths.events(attempt.number)
    log.write_text('{"event": "attempt"}\n{"event": "prog')  # what a full disk leaves
    attempt.broken.add("events.jsonl")
    attempt.event("sealed")
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "sealed"


@pytest.mark.parametrize("at", ["attempt", "round", "step", "progress", "made", "sealed", "done"])
def test_a_display_that_raises_at_one_kind_of_event_only_still_sees_the_others(tmp_path, undisturbed, at):
    seen: list[str] = []

    def watch(event: dict[str, Any]) -> None:
        seen.append(event["event"])
        if event["event"] == at:
            raise RuntimeError("at this one")

    run = watched(tmp_path, watch)
    assert end(run) == undisturbed
    assert seen[-1] == "done" and len(warnings(run)) == 1


@pytest.mark.nightly
def test_a_display_that_raises_at_any_one_event_changes_no_digest(tmp_path, undisturbed):
    count = len(events(watched(tmp_path / "counted", lambda event: None)))
    for at in range(count):
        left = iter(range(count))

        def watch(event: dict[str, Any], left=left, at=at) -> None:
            if next(left, None) == at:
                raise RuntimeError("once")

        assert end(watched(tmp_path / str(at), watch)) == undisturbed


@pytest.mark.parametrize("wish", [Stopped("stopped on request"), KeyboardInterrupt()])
def test_a_wish_to_stop_passes_through_whatever_shields_the_run(tmp_path, wish):
    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "made":
            raise wish

    with pytest.raises(type(wish)):
        watched(tmp_path, watch)
    last = json.loads((tmp_path / "run/logs/attempt-001/events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "stopped"


def test_a_failed_run_says_why_it_failed_though_its_log_cannot_be_written(tmp_path, monkeypatch):
    class Broken(Fake):
        def generate(self, *arguments: Any) -> Any:
            raise ValueError("the engine broke")

    run = Run.open(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake"))
    attempt = run.begin()
    NoRoom(monkeypatch, "events.jsonl", "driver.log")
    with pytest.raises(ValueError, match="the engine broke") as caught:
        walk(run, Broken({}), attempt)
    attempt.failed(caught.value)  # raises nothing of its own


def test_what_libraries_log_cannot_stop_a_run_where_driver_log_cannot_be_opened(tmp_path, capsys):
    run = Run.open(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake"))
    seen: list[str] = []
    attempt = Attempt.begin(run.paths, lambda event: seen.append(str(event.get("text", ""))))
    (attempt.logs / "driver.log").mkdir()  # nothing can be written there
    with attempt.logging():
        for number in range(3):
            logging.getLogger("a.library").warning("number %d", number)
    assert sum("driver.log failed" in text for text in seen) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_under_driver_log_is_told_once(tmp_path, capsys):
    run = Run.open(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake"))
    seen: list[str] = []
    attempt = Attempt.begin(run.paths, lambda event: seen.append(str(event.get("text", ""))))
    (attempt.logs / "driver.log").symlink_to("/dev/full")
    with attempt.logging():
        for number in range(3):
            logging.getLogger("a.library").warning("number %d", number)
    assert sum("driver.log failed (OSError: [Errno 28]" in text for text in seen) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_intervals_that_cannot_be_worked_out_do_not_stop_a_round(tmp_path, undisturbed, monkeypatch):
    def broken(*arguments: Any) -> Any:
        raise ImportError("no scipy here")

    monkeypatch.setattr("selfkd.chain.measured.measurements", broken)
    run = watched(tmp_path, lambda event: None)
    assert end(run) == undisturbed
    assert warnings(run) == [f"round {index}: no intervals were worked out: no scipy here" for index in range(3)]
