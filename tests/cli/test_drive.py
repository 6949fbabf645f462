"""The two signals that stop a run, whatever a library does with them; and that a dead terminal does not stop one."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, write_prompts

from selfkd.cli.drive import Interrupts
from selfkd.errors import Stopped


def test_ctrl_c_twice_ends_at_once_even_where_cleaning_up_hangs():
    code = """if True:
        import time
        from selfkd.cli.drive import Interrupts
        with Interrupts():
            try:
                print("ready", flush=True)
                time.sleep(60)
            finally:
                print("cleaning", flush=True)
                time.sleep(60)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 75
    assert time.monotonic() - began < 5
    process.stdout.close()


def test_two_sigterms_at_once_are_one_wish():
    """`timeout` signals the process and its group; cleaning up must not be cut short by that."""
    code = """if True:
        import os, signal
        from selfkd.cli.drive import Interrupts
        from selfkd.errors import Stopped
        with Interrupts():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Stopped:
                os.kill(os.getpid(), signal.SIGTERM)
                print("cleaned up")"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "cleaned up\n"


def test_a_stop_that_a_library_swallowed_is_raised_again_at_the_next_event():

    with Interrupts() as interrupts:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except Exception:
            pass
        with pytest.raises(Stopped):
            interrupts.check()


def test_the_handler_of_a_library_is_put_aside_at_the_next_event():

    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # what ray.init does
        interrupts.check()
        assert signal.getsignal(signal.SIGTERM) == interrupts._stop
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_handler_is_left_alone_in_other_threads():
    """A library's thread that logs may reach the display; Python sets handlers in the main thread only."""
    raised: list[Exception] = []

    def check() -> None:
        try:
            interrupts.check()
        except Exception as error:
            raised.append(error)

    with Interrupts() as interrupts:
        thread = threading.Thread(target=check)
        thread.start()
        thread.join()
    assert raised == []


# ---- a terminal that is gone ----


def started(stdout: Any, **more: Any) -> subprocess.Popen:
    """`selfkd run` of the small chain in the working directory, as a process."""
    write_prompts(Path())
    Path("sums.yaml").write_text(RECIPE)
    Path("fake.yaml").write_text("backend: fake\n")
    command = [sys.executable, "-m", "selfkd", "run", "sums.yaml", "--on", "fake.yaml"]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, **more)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    errors = process.communicate()[1]
    return process.returncode, errors


def warnings() -> list[str]:
    events = Path("runs/sums/logs/attempt-001/events.jsonl").read_text().splitlines()
    return [event["text"] for event in map(json.loads, events) if event["event"] == "warning"]


def is_whole() -> bool:
    return Path("runs/sums/round-002/sealed.json").is_file()


def test_a_run_whose_reader_left_goes_on_to_its_end():
    process = started(subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()  # selfkd run … | head -0
    process.stdout = None
    code, errors = ended(process)
    assert (code, is_whole()) == (0, True)
    assert "Traceback" not in errors and "The run is done; its table could not be shown" in errors
    assert len(warnings()) == 1 and "the display failed (BrokenPipeError" in warnings()[0]


def test_a_run_whose_terminal_was_closed_goes_on_to_its_end():
    """As after a lost connection under nohup: every write is EIO, also in the thread that draws the bar."""
    ours, theirs = pty.openpty()
    process = started(theirs)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    code, errors = ended(process)
    assert (code, is_whole()) == (0, True)
    assert "Traceback" not in errors and "Exception in thread" not in errors
    assert len(warnings()) == 1 and "[Errno 5]" in warnings()[0]


def test_a_run_whose_output_fills_a_disk_goes_on_to_its_end():
    with Path("/dev/full").open("w") as full:
        code, errors = ended(started(full))
    assert (code, is_whole()) == (0, True)
    assert "No space left on device" in errors and "Traceback" not in errors


def test_a_run_without_any_output_goes_on_to_its_end():
    code, errors = ended(started(subprocess.DEVNULL, preexec_fn=lambda: (os.close(1), None)[1]))
    assert (code, is_whole(), errors) == (0, True, "")


def test_a_terminal_that_knows_ascii_only_gets_question_marks(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = started(subprocess.PIPE)
    out, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert out.startswith("sums ? fake ? 2 rounds") and warnings() == []


def test_what_is_only_read_still_fails_where_it_cannot_be_written():
    assert started(subprocess.DEVNULL).wait() == 0
    with Path("/dev/full").open("w") as full:
        found = subprocess.run([sys.executable, "-m", "selfkd", "status"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert found.returncode == 1
    assert "No space left on device" in found.stderr and "Traceback" not in found.stderr
