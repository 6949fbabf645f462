"""The documents as tests use them: their blocks, and what stands in their ```console blocks typed in its order.

A block of another language whose first line is a comment with the name of a file is that file. A line that begins with `$` is typed. What stands under it must be what is printed, line by line: `…` leaves something out, within a line
or as a line of its own, and figures are not compared, for those of a page are of a real model and those of a test of the fake one.
`^C` under a command interrupts it in the middle, and `Killed` ends it as kill -9 does.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from selfkd.backend import machine
from selfkd.backend.fake import Fake
from selfkd.cli.main import main

DOCS = Path(__file__).parent.parent / "docs"
INTERRUPT, KILL, EXIT_CODE = "^C", "Killed", "echo $?"
CALLS_BEFORE = 2  # that a fake model answers before it is stopped: in the middle of a round, and one round bears two stops
BAR = re.compile(r"(base|round +\d+) +(\d+/\d+|step \d+) |.* … +\d+ s$")  # a terminal shows it in place and takes it away
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ([\w./-]+\.\w+)\n")
FIGURE = re.compile(r"[+-]?\d[\d.,]*")


class Typed(NamedTuple):
    """A command of a page, and the lines that it shows of it."""

    line: str
    shown: tuple[str, ...]


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return [text for name, text in BLOCK.findall(page.read_text("utf-8")) if name == language]


def written_or_typed(page: Path) -> Iterator[Typed | Path]:
    """Yield the commands of a page, and the files that it shows once they are written into the working folder."""
    for language, text in BLOCK.findall(page.read_text("utf-8")):
        if language == "console":
            yield from _commands(text)
        elif named := FILE.match(text):
            Path(named[1]).write_text(text, "utf-8")
            yield Path(named[1])


def typed(page: Path) -> Iterator[Typed]:
    """Yield the commands of a page."""
    for block in blocks(page, "console"):
        yield from _commands(block)


def _commands(block: str) -> Iterator[Typed]:
    assert block.startswith("$ "), block
    for one in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, *shown = one.rstrip("\n").split("\n")
        yield Typed(line, tuple(shown))


def type_all(page: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Type all commands of a page in the working folder, on the fake model; return how many there were."""
    on_the_fake_model(monkeypatch)
    code = count = 0
    for one in (part for part in written_or_typed(page) if isinstance(part, Typed)):
        count += 1
        if one.line == EXIT_CODE:
            assert list(one.shown) == [str(code)], f"{page.name}: the exit code was {code}"
            continue
        printed, code = _typed(one, monkeypatch)
        what = f"{page.name}: $ {one.line}\n{printed}"
        assert code == 0 or one.shown, what
        assert looks_like(printed, [line for line in one.shown if line not in (INTERRUPT, KILL)]), what
    return count


def on_the_fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run start on the fake model, whatever machine file it names."""
    read = machine.read_machine
    monkeypatch.setattr(machine, "read_machine", lambda path: replace(read(path), backend="fake"))
    monkeypatch.setattr(sys, "argv", ["selfkd"])


def _typed(one: Typed, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    words = shlex.split(one.line, comments=True)
    if words[0] != "selfkd":
        done = subprocess.run(["bash", "-c", one.line], capture_output=True, text=True)
        return done.stdout + done.stderr, done.returncode
    if KILL in one.shown:
        done = subprocess.run(
            [sys.executable, "-c", f"import consoles; consoles.killed({words[1:]!r})"], capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, f"{one.line} was not killed\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr, -done.returncode
    if INTERRUPT not in one.shown:
        return said_by(words[1:])
    with monkeypatch.context() as patch:
        stop_in_the_middle(patch, signal.SIGINT)
        return said_by(words[1:])


def said_by(words: list[str]) -> tuple[str, int]:
    """Return what a command prints, on both streams, and its exit code."""
    to = io.StringIO()
    with redirect_stdout(to), redirect_stderr(to):
        code = main(words)
    return to.getvalue(), code


def killed(words: list[str]) -> None:
    """Run a command that is killed in the middle; for a process of its own."""
    patch = pytest.MonkeyPatch()
    on_the_fake_model(patch)
    stop_in_the_middle(patch, signal.SIGKILL)
    main(words)


def stop_in_the_middle(patch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """Have a fake model that is opened from now on send this process a signal, after some calls of it."""
    calls = iter(range(CALLS_BEFORE))

    def hook(call: str) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), number)

    patch.setattr("selfkd.backend.choose.Fake", lambda numerics: Fake(numerics, hook=hook))


# ---- what is shown, and what was printed ----


def looks_like(printed: str, shown: list[str]) -> bool:
    """Whether the shown lines are lines that were printed, one after the other; a line `…` leaves any number out.

    >>> looks_like("a 12 b\\nc\\nd\\n", ["a 7 b", "…", "d"]), looks_like("a\\nb\\nc\\n", ["a", "c"]), looks_like("all\\n", ["a…"])
    (True, False, True)
    """
    lines = [" ".join(line.split()) for line in printed.splitlines() if not BAR.match(line)]
    wanted = [" ".join(line.split()) for line in shown]
    pattern = "".join(r"(?:.*\n)*?" if line == "…" else f"{_of_line(line)}\n" for line in wanted if line)
    return re.search(f"^{pattern}", "".join(f"{line}\n" for line in lines if line), re.MULTILINE) is not None


def _of_line(line: str) -> str:
    left_out = [FIGURE.sub("\0", part) for part in line.split("…")]
    return ".*".join(re.escape(part).replace(re.escape("\0"), r"[+-]?\d[\d.,]*") for part in left_out)
