"""What the tests of the command line share: a place of their own, and one way to type a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import selfkd
from selfkd.cli.main import main


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("PYTHONPATH", str(Path(selfkd.__file__).parent.parent))  # for commands run as processes of their own
    monkeypatch.setattr(sys, "argv", ["selfkd"])


@pytest.fixture
def said(capsys) -> Callable[..., str]:
    """What a command printed, checked for its exit code; errors go to stderr and never show a traceback."""

    def run(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(list(words)) == code
        out = capsys.readouterr()
        assert "Traceback" not in out.out + out.err
        assert bool(out.err) == (code != 0) or code == 1
        return out.out + out.err

    return run
