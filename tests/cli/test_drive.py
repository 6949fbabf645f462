"""The two signals that stop a run, whatever a library does with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

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
