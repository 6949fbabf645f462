"""What this machine says of bfloat16: a child process that times a matmul, and a GPU's own tool."""

from __future__ import annotations

import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from selfkd.backend import bf16
from selfkd.core.accelerator import Accelerator, Card


@pytest.mark.skipif(not find_spec("torch"), reason="needs torch")
def test_the_child_times_both_formats_and_this_process_never_holds_torch() -> None:
    code = "import sys; from selfkd.backend.bf16 import slowdown; print(slowdown(1)); sys.exit('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) > 0


@pytest.mark.parametrize(
    ("program", "limit", "said"),
    [
        ("#!/bin/sh\nexit 3\n", 5.0, "not timed: exit status 3"),
        ("#!/bin/sh\necho one >&2\necho 'ImportError: libtorch' >&2\nexit 1\n", 5.0, "not timed: ImportError: libtorch"),
        ("#!/bin/sh\nexec sleep 5\n", 0.1, "not timed: torch took more than 0 s"),
    ],
)
def test_a_child_that_fails_or_hangs_is_a_reason_and_no_error(
    program: str, limit: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "installed_version", lambda package: "2.13.0")
    monkeypatch.setattr(sys, "executable", str(executable(tmp_path / "python", program)))
    monkeypatch.setattr(bf16, "LIMIT", limit)
    assert bf16.slowdown(1) == said


def test_without_torch_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "installed_version", lambda package: "")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert bf16.slowdown(1) == "not timed: torch is not installed"


@pytest.mark.parametrize(("capabilities", "has"), [([(8, 0)], True), ([(9, 0), (7, 5)], False), ([(7, 5)], False), ([], None)])
def test_cards_have_bfloat16_by_their_compute_capability(
    capabilities: list[tuple[int, int]], has: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = tuple(Card(str(at), "a card", sm, 80, 80) for at, sm in enumerate(capabilities))
    monkeypatch.setattr(bf16, "accelerator", lambda: Accelerator("cuda" if cards else "cpu", cards))
    assert bf16.gpu_here() is has


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
