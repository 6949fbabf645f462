"""What a shell completes: asked of a real bash; zsh and fish where they are installed, and their words in any case."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from selfkd.cli import completion
from selfkd.cli.main import COMMANDS

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
found=$(complete -p selfkd); found=${found##*-F }; ${found%% *}
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "selfkd.bash"
    path.write_text(completion.script("bash", COMMANDS))
    return path


@pytest.fixture
def completed(bash_script: Path, home: Path):
    """What a bash offers for the last of some words."""

    def ask(*words: str) -> set[str]:
        command = ["bash", "--norc", "-c", ASK, "bash", str(bash_script), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home)
        assert done.returncode == 0 and not done.stderr.replace("bash: warning", ""), done.stderr
        return set(done.stdout.split())

    return ask


def test_bash_completes_commands_and_their_options(completed):
    assert completed("selfkd", "") == set(COMMANDS)
    assert completed("selfkd", "st") == {"status"}
    assert completed("selfkd", "show", "--") >= {"--round", "--where", "--training-rows", "--help"}
    assert "--plan" not in completed("selfkd", "show", "--")
    assert completed("selfkd", "completion", "") == {"bash", "zsh", "fish"}
    assert completed("selfkd", "init", "rows.jsonl", "--kind", "ch") == {"choice"}


def test_bash_completes_recipes_runs_topics_and_files(completed, home: Path):
    for name in ("star-1", "sums", "other"):
        (home / "runs" / name).mkdir(parents=True)
    (home / "mine.yaml").touch()
    (home / "notes.txt").touch()
    assert completed("selfkd", "run", "rest") == {"rest", "rest-em", "restore"}
    assert completed("selfkd", "lint", "mi") == {"mine.yaml"}
    assert completed("selfkd", "lint", "no") == set()
    assert completed("selfkd", "status", "s") == {"star-1", "sums"}
    assert completed("selfkd", "compare", "sums", "o") == {"other"}
    assert completed("selfkd", "show", "runs/o") == {"runs/other"}
    assert completed("selfkd", "run", "star", "--steps-of", "st") == {"star-1"}
    assert completed("selfkd", "run", "star", "--on", "no") == {"notes.txt"}
    assert completed("selfkd", "help", "meas") == {"measure"}


def test_the_command_prints_the_script_of_a_shell(said, bash_script: Path):
    assert said("completion", "bash") == bash_script.read_text() + "\n"
    assert "invalid choice: 'csh'" in said("completion", "csh", code=2)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_the_script_and_know_its_words(shell: str, tmp_path: Path):
    text = completion.script(shell, COMMANDS)
    for word in (*COMMANDS, "training-rows", "rest-em", "_selfkd_runs", "measure"):
        assert word in text, word
    assert "@" not in "".join(line for line in text.splitlines() if "compadd" in line or "printf" in line)
    if not shutil.which(shell):
        return  # its words are known all the same; only it can say that it reads them
    path = tmp_path / "script"
    path.write_text(text)
    assert subprocess.run([shell, "-n", str(path)], capture_output=True, text=True).stderr == ""
