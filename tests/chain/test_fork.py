"""A fork: shares the earlier rounds, takes what it would make alike, makes the rest, and is whole without the run it came from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from chains import RECIPE, Faults, Killed, end, go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.chain.fork import fork
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.errors import ChainError, RecipeError, UsageError
from selfkd.report.verify import verify


def finished(folder: Path) -> Run:
    run = Run.at(folder)
    walk(run, Fake(run.numerics), run.begin())
    return run


@pytest.fixture
def old(tmp_path: Path) -> Run:
    return go(recipe_in(tmp_path, RECIPE, "rounds=3", "keep={last: 9}"), tmp_path / "runs" / "old")


def test_a_fork_that_changes_nothing_takes_every_step_and_ends_on_the_same_digest(old: Run, tmp_path: Path) -> None:
    found = fork(old.folder, tmp_path / "runs" / "new", 1)
    assert (list(found.steps), found.made, found.changed) == (["sample", "score", "select", "train", "measure"], 5, [])
    new = finished(tmp_path / "runs" / "new")
    assert [seal.digest for seal in new.sealed()] == [seal.digest for seal in old.sealed()]
    assert verify(new.folder).problems == []


def test_a_fork_takes_the_steps_before_the_one_that_differs_and_is_what_the_whole_run_would_have_been(
    old: Run, tmp_path: Path
) -> None:
    found = fork(old.folder, tmp_path / "runs" / "new", 1, ["select.per_prompt=1"])
    assert (list(found.steps), found.changed) == (["sample", "score"], ["steps.2.select.per_prompt: 2 was changed to 1"])
    new = finished(found.folder)
    assert [seal.digest for seal in new.sealed()[:2]] == [seal.digest for seal in old.sealed()[:2]]
    assert new.made(2)["sample"].digest == old.made(2)["sample"].digest
    assert new.sealed()[2].digest != old.sealed()[2].digest
    assert verify(new.folder).problems == []
    halfway = go(recipe_in(tmp_path, RECIPE, "rounds=1", "keep={last: 9}"), tmp_path / "runs" / "whole")
    whole = go(recipe_in(tmp_path, RECIPE, "rounds=3", "keep={last: 9}", "select.per_prompt=1"), halfway.folder, amend=True)
    assert end(new) == end(whole)


def test_the_new_run_needs_the_old_one_no_more_and_the_old_one_is_as_it_was(old: Run, tmp_path: Path) -> None:
    before = end(old)
    found = fork(old.folder, tmp_path / "runs" / "new", 1, ["sample.n=2"])
    finished(found.folder)
    assert end(Run.at(old.folder)) == before and verify(old.folder).problems == []
    shutil.rmtree(old.folder)
    assert verify(found.folder).problems == [] and Run.at(found.folder).sealed()[-1].round == 3
    assert Run.at(found.folder).info.more["forked"]["after"] == 1


def test_a_fork_after_the_base_and_one_after_the_last_round_with_more_rounds(old: Run, tmp_path: Path) -> None:
    first = fork(old.folder, tmp_path / "runs" / "first", 0, ["sample.temperature=0.5"])
    assert first.steps == [] and finished(first.folder).sealed()[-1].round == 3
    last = fork(old.folder, tmp_path / "runs" / "last", 3, ["rounds=5"])
    assert (list(last.steps), last.made) == ([], 0)
    assert len(finished(last.folder).sealed()) == 6
    assert verify(first.folder).problems == verify(last.folder).problems == []


def test_a_reward_that_was_edited_since_stays_as_frozen_and_a_new_one_is_frozen_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = "def right(completion, answer):\n    return float(answer in completion)\n"
    (tmp_path / "mine.py").write_text(mine)
    text = RECIPE.replace("score: reward/number.py:last_number", "score: {reward: mine.py:right, as: last_number}")
    old = go(recipe_in(tmp_path, text, "keep={last: 9}"), tmp_path / "runs" / "old")
    (tmp_path / "mine.py").write_text(mine.replace("in completion", "not in completion"))
    same = fork(old.folder, tmp_path / "runs" / "same", 1)
    assert len(same.steps) == 5 and end(finished(same.folder)) == end(old)
    (tmp_path / "other.py").write_text(mine.replace("in completion", "not in completion"))
    other = fork(old.folder, tmp_path / "runs" / "other", 1, ["score.reward=other.py:right"])
    assert list(other.steps) == ["sample"]
    (tmp_path / "other.py").unlink()
    assert finished(other.folder).sealed()[-1].round == 2 and verify(other.folder).problems == []


def test_an_amendment_that_came_later_is_no_part_of_the_fork(tmp_path: Path) -> None:
    go(recipe_in(tmp_path, RECIPE, "rounds=2", "keep={last: 9}"), tmp_path / "runs" / "old")
    old = go(recipe_in(tmp_path, RECIPE, "rounds=3", "keep={last: 9}", "sample.n=2"), tmp_path / "runs" / "old", amend=True)
    early = finished(fork(old.folder, tmp_path / "runs" / "early", 1, ["rounds=3"]).folder)
    assert early.samples(3).height == 36 and Run.at(old.folder).samples(3).height == 24
    late = fork(old.folder, tmp_path / "runs" / "late", 3, ["rounds=4"])
    assert finished(late.folder).samples(4).height == 24
    assert verify(early.folder).problems == verify(late.folder).problems == []


@pytest.mark.parametrize(
    ("after", "words", "error", "said"),
    [
        (9, [], UsageError, "round 9 is not sealed"),
        (1, ["seed=4"], ChainError, "fixed when a run is created"),
        (1, ["sample.temprature=1"], RecipeError, "temprature"),
        (1, ["score.reward=nowhere.py:last_number"], UsageError, "nowhere.py"),
    ],
)
def test_what_cannot_be_forked_leaves_nothing_behind(
    old: Run, tmp_path: Path, after: int, words: list[str], error: type, said: str
) -> None:
    with pytest.raises(error, match=said):
        fork(old.folder, tmp_path / "runs" / "new", after, words)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["old"]


def test_a_fork_of_a_fork_at_the_same_round_keeps_what_the_first_one_changed(old: Run, tmp_path: Path) -> None:
    first = finished(fork(old.folder, tmp_path / "runs" / "first", 1, ["select.per_prompt=1"]).folder)
    second = fork(first.folder, tmp_path / "runs" / "second", 1)
    assert len(second.steps) == 5 and second.changed == []
    assert end(finished(second.folder)) == end(first)


def test_damaged_weights_are_no_beginning(old: Run, tmp_path: Path) -> None:
    (Path(old.model("policy@round-1").path) / "weights.json").write_text('{"skill": 1.0}')
    with pytest.raises(ChainError, match="changed after they were committed"):
        fork(old.folder, tmp_path / "runs" / "new", 1)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["old"]


def test_a_round_whose_weights_were_taken_away_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    old = go(recipe_in(tmp_path, RECIPE, "rounds=3", "keep={last: 1, base: true}"), tmp_path / "runs" / "old")
    with pytest.raises(UsageError, match="not on disk any more") as refused:
        fork(old.folder, tmp_path / "runs" / "new", 1)
    assert "Rounds whose weights are there: 0, 3" in str(refused.value)


@pytest.mark.parametrize(("after", "words"), [(2, ["rounds=1"]), (3, ["select.per_prompt=1"]), (1, ["seed=4"])])
def test_what_cannot_be_changed_is_said_of_the_new_run_and_not_of_its_draft(
    old: Run, tmp_path: Path, after: int, words: list[str]
) -> None:
    into = tmp_path / "runs" / "new"
    with pytest.raises(ChainError) as refused:
        fork(old.folder, into, after, words)
    said = str(refused.value)
    assert str(into) in said and "-new" not in said and "selfkd resume" not in said and "Nothing was made" in said


def test_a_run_is_not_forked_into_itself_nor_over_a_link_to_nothing(old: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lies inside the run"):
        fork(old.folder, old.folder / "more" / "new", 1)
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="is there already"):
        fork(old.folder, tmp_path / "runs" / "link", 1)
    assert not (old.folder / "more").exists()


def test_a_name_that_is_taken_is_refused(old: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        fork(old.folder, old.folder, 1)


def test_killed_at_any_operation_a_fork_is_there_whole_or_not_at_all(old: Run, tmp_path: Path) -> None:
    with Faults() as count:
        fork(old.folder, tmp_path / "count" / "new", 1, ["sample.n=2"])
    for at in range(count.count):
        into = tmp_path / f"killed-{at}" / "new"
        with Faults(at), pytest.raises(Killed):
            fork(old.folder, into, 1, ["sample.n=2"])
        assert not into.exists() or verify(into).problems == []
    assert end(finished(tmp_path / "count" / "new")) == end(
        finished(fork(old.folder, tmp_path / "again", 1, ["sample.n=2"]).folder)
    )
