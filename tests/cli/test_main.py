"""Words that are no command, and every way to ask for help."""

from __future__ import annotations

import errno
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfkd.cli.main import COMMANDS, _parser, main
from selfkd.steps import VERBS


def test_help_lists_every_command_and_verb(said):
    text = said("help")
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize("topic", [*COMMANDS, *VERBS, "recipe", "machine"])
def test_help_explains_every_command_every_verb_the_recipe_and_the_machine(said, topic):
    assert len(said("help", topic).splitlines()) > 3


def test_help_of_the_recipe_begins_with_its_title(said):
    assert said("help", "recipe").startswith("# Recipes\n")


def test_help_of_a_verb_names_every_field(said):
    text = said("help", "sample")
    assert all(field.alias or name in text for name, field in VERBS["sample"].model_fields.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stauts"], "no command 'stauts'. Did you mean 'status'?"),
        (["help", "smaple"], "no topic 'smaple'. Did you mean 'sample'?"),
        (["run", "nothing.yaml"], "no recipe 'nothing.yaml'"),
        (["show"], "RUN"),
        (["run", "sums.yaml", "--nmae", "x"], "--nmae"),
        (["show", "runs/sums", "-n", "-1"], "argument -n: '-1' is not a whole number of 1 or more"),
        (["show", "runs/sums", "-n", "0"], "argument -n: '0' is not a whole number of 1 or more"),
        (["try", "reward/number.py:last_number", "rows.jsonl", "-n", "x"], "argument -n: 'x' is not a whole number"),
        (["run", "sums.yaml", "--name", "../evil"], "--name  '../evil' is not the name of one folder"),
    ],
)
def test_wrong_words_are_usage_errors_that_say_what_is_meant(said, words, message):
    assert message in said(*words, code=2)


def test_no_command_prints_the_list_and_fails(capsys):
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().out


def test_the_list_of_commands_comes_without_loading_anything_heavy():
    code = "import sys, selfkd.cli.main; selfkd.cli.main.main(['help']); sys.exit(', '.join({'polars', 'pydantic', 'rich', 'yaml'} & set(sys.modules)) or 0)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_arguments_of_a_command_are_the_parameters_of_its_function(name):
    destinations = {action.dest for action in _parser(name)._actions if action.dest != "help"}
    assert sorted(destinations) == sorted(inspect.signature(COMMANDS[name].act).parameters)


def test_the_verbs_are_listed_in_the_order_of_their_table(said):
    assert f"or a verb: {', '.join(VERBS)}\n" in said("help")


def test_a_folder_of_runs_that_is_a_file_is_named(said):
    Path("runs.txt").write_text("")
    assert "runs.txt  is a file, not a folder of runs" in said("run", "quickstart", "--runs", "runs.txt", code=2)


def test_an_error_of_the_system_says_where_before_what(said):
    Path("closed").mkdir()
    Path("closed/quickstart.yaml").symlink_to("/proc/no/such/folder")
    text = said("cp", "quickstart", "closed", code=1)
    assert text.startswith("closed/quickstart.yaml  No such file or directory (FileNotFoundError)\n")


@pytest.mark.parametrize("target", ["notes.txt", "notes.txt/deep"])
def test_a_recipe_is_not_copied_onto_a_file(said, target):
    Path("notes.txt").write_text("mine")
    assert "notes.txt  is a file, and the copy needs a folder" in said("cp", "quickstart", target, code=2)
    assert Path("notes.txt").read_text() == "mine"


def test_a_recipe_that_was_copied_already_is_said_to_be_there(said):
    said("cp", "quickstart", ".")
    before = Path("quickstart.yaml").read_bytes()
    assert said("cp", "quickstart", ".", code=2).startswith("quickstart.yaml  is there already\n")
    assert Path("quickstart.yaml").read_bytes() == before


@pytest.mark.parametrize("command", [["run", "--plan"], ["lint"]])
def test_a_recipe_that_hides_a_shipped_one_is_named(said, command):
    name, *flags = command
    line = "'star' is star.yaml here, not the shipped recipe of that name.\n"
    said("cp", "quickstart", ".")
    assert line not in said(name, "quickstart.yaml", *flags)
    Path("quickstart.yaml").rename("star.yaml")
    assert said(name, "star", *flags).startswith(line)
    assert line not in said(name, "star.yaml", *flags)


@pytest.mark.parametrize(
    ("number", "way_out"),
    [("EACCES", "may not read or write there"), ("EROFS", "Runs can lie elsewhere: --runs DIR"), ("ENOSPC", "Free some disk")],
)
def test_a_place_that_cannot_be_written_is_named_with_what_to_do(monkeypatch, capsys, number, way_out):
    def refused(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), "there")

    monkeypatch.setattr("selfkd.recipe.library.copy", refused)
    assert main(["cp", "quickstart", "there"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("there  ") and way_out in said and "SELFKD_DEBUG" not in said


def test_resume_says_which_command_takes_a_change(said):
    text = said("resume", "runs/sums", "rounds=6", code=2)
    assert "takes no rounds=6" in text and "selfkd run RECIPE rounds=6" in text
