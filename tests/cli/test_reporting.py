"""`selfkd report`: where a page goes, what it takes, and the commands that it offers."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from chains import go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.cli import main, reporting
from selfkd.recipe.load import load


@pytest.fixture
def done(tmp_path, monkeypatch) -> Path:
    go(recipe_in(tmp_path), tmp_path / "runs/sums")
    monkeypatch.chdir(tmp_path)
    return Path("runs/sums")


def test_a_run_is_found_by_its_name_and_its_page_is_named_after_it(done, capsys):
    assert main.main(["report", "sums"]) == 0
    assert Path("sums.html").read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.startswith("sums.html  ")


def test_a_page_is_written_over_and_a_file_of_others_never(done, capsys):
    assert main.main(["report", "sums"]) == main.main(["report", "sums"]) == 0
    Path("mine.html").write_text("<html>mine")
    assert main.main(["report", "sums", "--out", "mine.html"]) == 2
    assert "mine.html  is there, and no report wrote it" in capsys.readouterr().err
    assert Path("mine.html").read_text() == "<html>mine"
    assert main.main(["report", "sums", "--out", "nowhere/page.html"]) == 2
    assert sorted(path.name for path in Path().iterdir() if path.suffix == ".html") == ["mine.html", "sums.html"]


def test_markdown_goes_to_the_terminal_or_to_a_file_that_may_be_written_again(done, capsys):
    assert main.main(["report", "sums", "--md"]) == 0
    assert "# sums" in capsys.readouterr().out
    for _ in range(2):
        assert main.main(["report", "sums", "--md", "--out", "sums.md"]) == 0


def test_several_runs_make_one_page(done, capsys):
    go(load("sums.yaml", ["seed=1"]), Path("runs/other"))
    assert main.main(["report", "sums", "other"]) == 0
    assert "2 runs side by side" in Path("report.html").read_text()


def test_the_commands_of_a_page_are_commands_and_the_first_makes_the_same_run_again(done):
    offered = reporting.run_commands(done)
    for words in (shlex.split(line) for line in list(offered.values())[:-1]):
        name = next(word for word in words if word in main.COMMANDS)
        main._parser(name).parse_intermixed_args([word.replace("K", "1") for word in words[words.index(name) + 1 :]])
    again = shlex.split(offered["make it again"])
    recipe = load(again[again.index("run") + 1])
    run = Run.open(recipe, Path("runs") / again[-1], Machine(backend="fake"))
    walk(run, Fake(run.numerics), run.begin())
    assert [seal.metrics for seal in run.sealed()] == [seal.metrics for seal in Run.at(done).sealed()]
    assert run.rows(2).equals(Run.at(done).rows(2))


def test_the_best_model_lies_where_the_page_says(done):
    [line] = [line for line in reporting.run_commands(done).values() if line.startswith("selfkd.open")]
    import selfkd

    assert Path(eval(line, {"selfkd": selfkd})).is_dir()


def test_what_is_no_run_is_refused_as_status_refuses_it(done, capsys):
    assert main.main(["report", "nothing"]) == 2
    assert "no run here" in capsys.readouterr().err
