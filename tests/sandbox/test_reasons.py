"""A reason is one line, and the same each time a program ends so."""

from __future__ import annotations

import pytest

from selfkd.sandbox import Limits
from selfkd.sandbox.jail import Ended
from selfkd.sandbox.reasons import limit_with_size, one_line, reason

LIMITS = Limits(seconds=2, memory=64 << 20)


def ended(status: int, limit: str | None = None) -> Ended:
    return Ended(status, limit, b"", b"", 1.0, 1.0, 1)


@pytest.mark.parametrize(
    ("end", "stderr", "expected"),
    [
        (ended(0), "a warning", ""),
        (ended(0, "time"), "", "time limit (2 s)"),
        (ended(-9, "memory"), "", "memory limit (64 MB)"),
        (ended(-11), "", "ended by SIGSEGV"),
        (ended(-70), "", "ended by signal 70"),
        (ended(3), "", "exit status 3"),
        (ended(1), "Traceback\n  line\nValueError: x\n\n", "exit status 1: ValueError: x"),
    ],
)
def test_the_first_cause_is_the_reason(end: Ended, stderr: str, expected: str) -> None:
    assert reason(end, LIMITS, stderr) == expected


def test_a_limit_is_named_with_its_size() -> None:
    assert limit_with_size("cpu", LIMITS) == "cpu limit (2 s of processor time)"
    assert limit_with_size("file_size", LIMITS) == "file size limit (16 MB in one file)"
    assert limit_with_size("stopped", LIMITS) == "stopped"


def test_hostile_text_becomes_one_short_line() -> None:
    assert one_line("a\x1b[2J\nb\ud800") == "a [2J b"
    assert len(one_line("x" * 1000)) == 300
