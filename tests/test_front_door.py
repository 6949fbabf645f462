"""`import selfkd` as a notebook meets it: eight names, loaded when they are first asked for, and a run read as frames."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import consoles
import pytest
from chains import RECIPE, write_prompts

import selfkd
from selfkd.errors import BusyError, ChainError, UsageError


def test_the_front_door_offers_these_names_and_no_others():
    assert selfkd.__all__ == sorted(selfkd.HOMES) == ["Machine", "Recipe", "Run", "lint", "load", "open", "run", "verify"]
    assert set(dir(selfkd)) == {*selfkd.__all__, "__version__"}
    for name in selfkd.__all__:
        assert callable(getattr(selfkd, name)), name
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        selfkd.trane  # noqa: B018


def test_importing_it_loads_nothing_and_its_types_are_for_others_to_use():
    code = "import sys, selfkd; sys.exit(', '.join({m for m in sys.modules if m.startswith('selfkd.')} | {'polars', 'pydantic'} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert (Path(selfkd.__file__).parent / "py.typed").is_file()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a recipe and prompts, where a notebook might run."""
    write_prompts(tmp_path)
    (tmp_path / "sums.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_notebook_loads_lints_runs_reads_and_verifies(here):
    recipe = selfkd.load("sums.yaml", ["rounds=2"])
    assert isinstance(recipe, selfkd.Recipe) and selfkd.lint(recipe).problems == []
    seen = []
    run = selfkd.run(recipe, "runs/sums", selfkd.Machine(backend="fake"), watch=lambda event: seen.append(event["event"]))
    assert isinstance(run, selfkd.Run) and run.rounds == 2
    assert seen[0] == "attempt" and seen[-1] == "done" and seen.count("sealed") == 3
    assert selfkd.verify("runs/sums").problems == []

    metrics = selfkd.open("runs/sums").metrics()
    assert metrics["round"].to_list() == [0, 1, 2] and metrics["accepted"].all()
    assert metrics["dev/last_number"].to_list() == [seal.metrics["dev/last_number"] for seal in run.sealed()]

    wrong = run.samples(round=1, where="last_number = 0")
    assert wrong.height > 0 and not wrong["kept"].any() and wrong["why"].str.starts_with("select: ").all()
    assert run.samples(round=1).height == 36 and run.samples(step="measure")["kept"].null_count() == 6
    assert set(run.rows()["chosen"]) <= set(run.samples()["text"])
    assert Path(run.model("policy@base").path).is_dir() and run.model("policy@base") != run.model("policy")
    assert run.model("policy@round-1").digest == run.sealed()[1].models["policy"].digest


def test_running_again_goes_on_or_does_nothing(here):
    machine = selfkd.Machine(backend="fake")
    first = selfkd.run("sums.yaml", "runs/sums", machine)
    assert selfkd.run("sums.yaml", "runs/sums", machine).sealed() == first.sealed()
    assert first.paths.attempts() == [1]  # nothing to do: no second attempt
    assert selfkd.run(selfkd.load("sums.yaml", ["rounds=3"]), "runs/sums", machine).rounds == 3


def test_what_a_watcher_raises_stops_the_run_and_it_goes_on(here):
    def refuse(event):
        if event["event"] == "step" and event["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        selfkd.run("sums.yaml", "runs/sums", selfkd.Machine(backend="fake"), refuse)
    assert selfkd.open("runs/sums").rounds == 0
    assert selfkd.run("sums.yaml", "runs/sums", selfkd.Machine(backend="fake")).rounds == 2


def test_a_second_driver_is_refused_before_an_attempt_begins(here):
    from selfkd.core.lease import Lease

    run = selfkd.Run.open(selfkd.load("sums.yaml"), Path("runs/sums"), selfkd.Machine(backend="fake"))
    with Lease(run.paths.leases, run.paths.tmp), pytest.raises(BusyError, match="another driver holds this run"):
        selfkd.run("sums.yaml", "runs/sums", selfkd.Machine(backend="fake"))
    assert run.paths.attempts() == []


def test_what_is_not_there_is_said(here):
    with pytest.raises(UsageError, match="no run here"):
        selfkd.open("runs/none")
    run = selfkd.run(selfkd.load("sums.yaml", ["rounds=1"]), "runs/sums", selfkd.Machine(backend="fake"))
    with pytest.raises(UsageError, match="there is no round 7"):
        run.samples(round=7)
    with pytest.raises(ChainError, match=r"no model 'student'\. Roles: policy"):
        run.model("student")


def test_the_code_of_the_notebook_page_runs_as_printed(here, monkeypatch):
    (here / "mine.py").write_text(
        "def right(completion: str, answer: str) -> float:\n    return float(completion.endswith(answer))\n"
    )
    (here / "mine.yaml").write_text(
        RECIPE.replace("reward/number.py:last_number", "mine.py:right").replace("last_number", "right")
    )
    monkeypatch.setattr("selfkd.report.notebook.read_machine", lambda path: selfkd.Machine(backend="fake"))
    blocks = consoles.blocks(consoles.DOCS / "notebook.md", "python")
    scope: dict = {}
    for block in blocks:
        exec(block, scope)
    assert len(blocks) == 8 and scope["run"].samples(round=1).height == 12 * 4


def test_a_model_that_retention_took_away_is_said_to_be_gone(here):
    (here / "sums.yaml").write_text(RECIPE.replace("rounds: 2", "rounds: 3\nkeep: {last: 1, best: false, base: true}"))
    run = selfkd.run("sums.yaml", "runs/sums", selfkd.Machine(backend="fake"))
    with pytest.raises(ChainError, match=r"weights of 'policy@round-1' are not on disk any more[\s\S]*keep"):
        run.model("policy@round-1")
    with pytest.raises(ChainError, match=r"no model 'policy@bset'\. Did you mean 'best'"):
        run.model("policy@bset")


def test_names_of_files_serve_where_a_notebook_has_no_object_yet(here):
    (here / "fake.yaml").write_text("backend: fake\n")
    assert selfkd.lint("sums.yaml").ok
    run = selfkd.run(selfkd.load("sums.yaml", "rounds=1"), "runs/sums", "fake.yaml")
    assert run.machine.backend == "fake" and run.rounds == 1


def test_a_notebook_forks_goes_on_scores_otherwise_and_shows_a_run(here):
    run = selfkd.run("sums.yaml", "runs/sums", selfkd.Machine(backend="fake"))
    scores = run.scores(round=1, where="value = 1")
    assert set(scores["name"]) == {"last_number"} and set(scores["step"]) == {"score"} and set(scores["value"]) == {1.0}
    assert run.verify(data=True).again == 4

    other = run.fork("runs/other", after=1, overrides="select.per_prompt=1")
    seen = []
    ended = other.go_on(watch=lambda event: seen.append(event["event"]))
    assert isinstance(ended, selfkd.Run) and ended.rounds == 2 and seen[-1] == "done"
    assert other.go_on().sealed()[-1].digest == ended.sealed()[-1].digest != run.sealed()[-1].digest

    (here / "mine.py").write_text("def none(completion):\n    return 0.0\n")
    assert run.rescore("mine.py:none", "last_number", round=1).rows["kept_now"].sum() == 0


def test_a_run_shows_itself_as_a_table_of_its_rounds(here):
    run = selfkd.run("sums.yaml", "runs/sums", selfkd.Machine(backend="fake"))
    shown = run._repr_html_()
    assert shown.count("<tr>") == 1 + 3 and "round 2" in shown and "dev/last_number" in shown
    empty = selfkd.Run.at(run.folder)
    (run.folder / "run.json").unlink()
    assert "no run here" in empty._repr_html_()
