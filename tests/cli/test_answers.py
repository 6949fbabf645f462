"""What every reading command answers to a program: one document a line, of one shape, errors too."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from chains import RECIPE, write_prompts

from selfkd.cli import answers
from selfkd.cli.main import COMMANDS, _parser, main

SHAPE = ["selfkd", "command", "ok", "exit", "data", "error"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A recipe, a machine file, a reward with rows, and a finished run."""
    folder = tmp_path_factory.mktemp("home")
    write_prompts(folder)
    (folder / "sums.yaml").write_text(RECIPE)
    (folder / "fake.yaml").write_text("backend: fake\n")
    (folder / "rows.jsonl").write_text('{"prompt": "1 + 1", "completion": "It is 2.", "answer": "2"}\n')
    (folder / "loud.py").write_text("def loud(completion):\n    print('loud')\n    return len(completion)\n")
    here = Path.cwd()
    os.chdir(folder)
    assert main(["run", "sums.yaml", "--on", "fake.yaml"]) == 0
    os.chdir(here)
    return folder


@pytest.fixture
def told(capsys):
    """The one document that a command writes, checked for its shape and its exit code."""

    def run(*words: str, code: int = 0):
        capsys.readouterr()
        assert main([*words, "--json"]) == code
        [line] = capsys.readouterr().out.splitlines()
        found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert list(found) == SHAPE and found["command"] == words[0]
        assert (found["exit"], found["ok"]) == (code, code == 0)
        return found

    return run


READERS = {
    "run": (["sums.yaml", "--plan"], "lines"),
    "sweep": (["sums.yaml", "--metric", "dev/last_number", "--plan"], "trials"),
    "status": (["sums"], "rounds"),
    "show": (["sums"], "rows"),
    "trace": (["sums", "best"], "origins"),
    "compare": (["sums", "sums"], "arms"),
    "verify": (["sums"], "problems"),
    "lint": (["sums.yaml"], "columns"),
    "try": (["loud.py:loud", "rows.jsonl"], "rows"),
    "recipes": ([], "recipes"),
    "doctor": ([], "checks"),
    "score": (["sums", "--with", "loud.py:loud", "--as", "last_number"], "rows"),
    "gc": (["sums"], "leftovers"),
    "logs": (["sums"], "lines"),
    "chat": (["sums", "--rounds", "now", "--prompt", "1 + 1"], "answers"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reading_command_answers_in_the_one_shape(told, name, monkeypatch):
    words, field = READERS[name]
    if name == "doctor":  # what it checks is tested in test_doctor.py, and takes long
        from selfkd.cli.doctor import Check

        monkeypatch.setattr("selfkd.cli.doctor.checks", lambda runs: iter([Check("ok", "Python", "3.11")]))
    if name == "compare":
        words = ["sums", str(Path("runs/../runs/sums"))]
    found = told(name, *words)
    assert found["error"] is None and field in found["data"]


def test_every_command_either_answers_in_json_or_reads_nothing():
    silent = {"init", "resume", "export", "report", "track", "fork", "completion", "cp", "help"}
    assert {name for name in COMMANDS if answers.FLAG in _parser(name)._option_string_actions} == set(COMMANDS) - silent
    assert set(READERS) == set(COMMANDS) - silent


def test_a_list_of_runs_names_those_that_cannot_be_read(told):
    Path("runs/broken").mkdir()
    Path("runs/broken/run.json").write_text("{")
    found = told("status")["data"]
    assert [run["name"] for run in found["runs"]] == ["sums"] and "is not readable" in found["unreadable"][0]
    Path("runs/broken/run.json").unlink()


@pytest.mark.parametrize(
    ("words", "kind", "what"),
    [
        (["status", "nothing"], "UsageError", "no run here"),
        (["show", "sums", "--where", "nmber = 1"], "RecipeError", "no column 'nmber'"),
        (["trace", "sums", "ffffffffffff"], "UsageError", "nothing in this run is called"),
        (["lint", "nothing.yaml"], "UsageError", "no recipe 'nothing.yaml'"),
        (["verify"], "UsageError", "RUN"),
        (["run", "sums.yaml"], "UsageError", "is for --plan"),
        (["stauts"], "UsageError", "no command 'stauts'"),
    ],
)
def test_an_error_has_its_kind_what_where_and_what_to_do(told, words, kind, what):
    error = told(*words, code=2)["error"]
    assert error["kind"] == kind and what in error["what"] and set(error) == {"kind", "what", "where", "fix", "notes"}


def test_mistakes_and_damage_are_what_was_found_and_no_success(told):
    Path("bad.yaml").write_text(RECIPE.replace("last_number = 1", "last_nmber = 1"))
    found = told("lint", "bad.yaml", code=2)
    assert found["error"] is None and "last_nmber" in found["data"]["problems"][0]
    victim = next(Path("runs/sums/round-001/01-sample").iterdir())
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + b"x")
    assert told("verify", "sums", code=1)["data"]["problems"]
    victim.write_bytes(content)


def test_an_error_of_somebody_else_is_a_document_too(told, monkeypatch):
    def broken(*given):
        raise RuntimeError("a disk that sighs")

    monkeypatch.setattr("selfkd.report.status.read", broken)
    error = told("status", "sums", code=1)["error"]
    assert error == {"kind": "RuntimeError", "what": "a disk that sighs", "where": "", "fix": "", "notes": []}


def test_what_a_users_code_prints_does_not_stand_among_the_documents(told, capsys):
    Path("mapped.py").write_text("def rows():\n    print('reading')\n    return [{'prompt': '1 + 1', 'answer': '2'}] * 3\n")
    text = RECIPE.replace("{file: train.jsonl, prompt: question, answer: answer}", "{function: mapped.py:rows}")
    Path("mapped.yaml").write_text(text)
    told("lint", "mapped.yaml")


def test_a_run_that_is_followed_answers_once_more_than_it_changes(told):
    assert told("status", "sums", "--follow")["data"]["state"] == "done"


def test_numbers_that_are_none_are_null():
    assert answers.plain({"loss": float("nan"), "kl": float("inf"), "kept": 0.5}) == {"loss": None, "kl": None, "kept": 0.5}
