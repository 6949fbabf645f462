"""What happened in an attempt, as lines; and that following ends with the driver, on a terminal, in a pipe and for a program."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from selfkd.core.lease import Lease
from selfkd.errors import UsageError
from selfkd.report import bar, logs


@pytest.fixture
def run(done, tmp_path) -> Path:
    """A copy of a finished run whose newest attempt left more logs, and whose events end with a torn line."""
    folder = Path(shutil.copytree(done, tmp_path / "run"))
    home = folder / "logs" / "attempt-002"
    (home / "ray").mkdir(parents=True)
    events = [
        {"t": 1, "event": "attempt", "host": "here", "pid": 7},
        {"t": 2, "event": "round", "round": 3, "last": 5},
        {"t": 3, "event": "step", "round": 3, "step": "sample", "verb": "sample"},
        {"t": 4, "event": "progress", "round": 3, "step": "sample", "done": 1, "total": 2},
        {"t": 5, "event": "made", "round": 3, "step": "sample", "seconds": 1.25},
        {"t": 6, "event": "warning", "text": "half of the rows are short"},
        {"t": 7, "event": "sealed", "round": 3, "accepted": False},
        {"t": 8, "event": "failed", "text": "no rows"},
    ]
    (home / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"t": 9, "ev')
    (home / "driver.log").write_text("Traceback: no rows\n")
    (home / "engine-0.log").write_text("generator, process 8\n[bold]not markup[/bold]\n")
    (home / "engine-0.beat").write_text("0 0 0")
    (home / "ray" / "raylet.out").write_text("started\n")
    return folder


def texts(lines) -> list[str]:
    return [line.text.partition("  ")[2] or line.text for line in lines]


def test_events_are_told_in_words_without_progress_and_without_a_torn_line(run):
    found = logs.read(logs.of(run))
    assert texts(found) == [
        "attempt begins: process 7 on here",
        "round 3 of 5",
        "round 3: sample begins",
        "round 3: sample is made, 1.2 s",
        "warning: half of the rows are short",
        "round 3 is sealed, rolled back",
        "failed: no rows",
        "Traceback: no rows",
    ]
    assert next(line.text for line in found if line.failed).endswith("half of the rows are short")


def test_the_newest_attempt_is_shown_and_an_older_one_by_its_number(run, done):
    assert logs.of(run).attempt == 2 and logs.of(run).attempts == (1, 2)
    first = logs.read(logs.of(run, 1))
    assert first == logs.read(logs.of(done)) and texts(first)[-1] == "round 2 is sealed"
    with pytest.raises(UsageError, match="there is no attempt 9") as error:
        logs.of(run, 9)
    assert "Attempts: 1, 2" in error.value.fix


def test_a_log_of_an_actor_is_shown_by_its_name_and_others_are_listed(run):
    found = logs.of(run)
    assert [line.text for line in logs.read(found, "engine-0", last=1)] == ["[bold]not markup[/bold]"]
    assert found.others(found.chosen(None)) == "engine-0, 1 file under ray/"
    with pytest.raises(UsageError, match=r"no log 'engin-0'\. Did you mean 'engine-0'"):
        logs.read(found, "engin-0")


def test_a_run_without_an_attempt_says_so(run):
    shutil.rmtree(run / "logs")
    with pytest.raises(UsageError, match="no attempt at this run was made yet"):
        logs.of(run)


def test_new_lines_are_followed_until_the_driver_ends_and_none_is_told_twice(run):
    heard: list[str] = []
    with (run / "logs/attempt-002/events.jsonl").open("a") as events:
        events.write('ent": "round", "round": 4, "last": 5}\n')
        events.flush()
        with Lease(run / "leases", run / "tmp"):
            thread = threading.Thread(target=lambda: heard.extend(texts(logs.follow(run, pause=0.01))))
            thread.start()
            _until(lambda: "round 4 of 5" in heard or thread.is_alive())
            events.write(json.dumps({"t": 10, "event": "sealed", "round": 4}) + "\n")
            events.flush()
            time.sleep(0.1)
            assert thread.is_alive()
        events.write(json.dumps({"t": 11, "event": "done"}) + "\n")
        events.flush()
        thread.join(5)
    assert not thread.is_alive()
    assert heard.count("round 4 is sealed") == 1 and heard.count("round 3 of 5") == 1


def _until(holds) -> None:
    ends = time.monotonic() + 5
    while not holds() and time.monotonic() < ends:
        time.sleep(0.01)


@pytest.mark.parametrize("terminal", [True, False])
def test_following_the_state_of_a_run_ends_when_its_driver_is_killed(run, terminal):
    """No driver says goodbye after SIGKILL: its process is looked for."""
    code = f"import time; from pathlib import Path; from selfkd.core.lease import Lease; p = Path({str(run)!r})\nwith Lease(p / 'leases', p / 'tmp'):\n print('up', flush=True); time.sleep(60)"
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert driver.stdout and driver.stdout.readline() == b"up\n"
    to, ended = Console(file=io.StringIO(), width=120, force_terminal=terminal), list[bar.Status]()
    thread = threading.Thread(target=lambda: ended.append(bar.follow(run, to, pause=0.02)))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    driver.kill()
    driver.wait()
    thread.join(10)
    assert [state.state for state in ended] == ["done"]
    assert isinstance(to.file, io.StringIO) and to.file.getvalue().count("round 2 ") == 1
    if not terminal:
        assert "\x1b" not in to.file.getvalue()


def test_a_program_is_told_of_changes_only_and_of_the_end(run):
    with Lease(run / "leases", run / "tmp"):
        found = bar.states(run, pause=0.01)
        assert next(found).state == "running"
        thread = threading.Thread(target=lambda: rest.extend(found))
        rest: list[bar.Status] = []
        thread.start()
        time.sleep(0.1)
        assert rest == []
    thread.join(5)
    assert [state.state for state in rest] == ["done"]
