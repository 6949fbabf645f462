"""Every way out that a message of a run offers is typed as it stands there, each on its own copy of the folder, and works."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chains import RECIPE, Killed, write_prompts

from selfkd.backend.fake import Fake
from selfkd.cli.main import main
from selfkd.core.lease import Lease

RUN = ["run", "sums.yaml", "--on", "fake.yaml"]
OWN = RECIPE.replace("reward/number.py:last_number", "mine.py:right").replace("last_number", "right")
RIGHT = "def right(completion, answer):\n    return float(completion.rstrip().endswith(' ' + answer))\n"
BROKEN = "def right(completion, answer):\n    raise ValueError('not yet')\n"
PATIENT = RECIPE.replace("rounds: 2", "rounds: 6\nstop: {patience: 1, metric: dev/chars}")
FRUGAL = RECIPE.replace("rounds: 2", "rounds: 4\nstop: {tokens: 100}")
KEEPS_ONE = RECIPE.replace("rounds: 2", "rounds: 4\nkeep: {last: 1, best: false, base: false}")


@pytest.fixture
def home(tmp_path) -> Path:
    """A working directory of its own inside `tmp_path`, so that it can be copied beside itself."""
    folder = tmp_path / "home"
    folder.mkdir()
    write_prompts(folder)
    (folder / "fake.yaml").write_text("backend: fake\n")
    return folder


def written(text: str) -> None:
    Path("sums.yaml").write_text(text)


def killed_in_training(monkeypatch: pytest.MonkeyPatch, times: int, *words: str) -> None:
    """Type the run; its process dies in the so manyeth training."""
    left = iter(range(times - 1))

    def train(self, *given):
        if next(left, None) is None:
            raise Killed
        return whole(self, *given)

    whole = Fake.train
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Fake, "train", train)
        main([*RUN, *words])


def offered(text: str, words: list[str]) -> Iterator[list[str]]:
    """Every command that a message names, or makes of the command that was typed."""
    for found in re.findall(r"`selfkd ([^`]+)`", text) + re.findall(
        r"(?<!`)selfkd ((?:status|lint|run) [^`\n]*?)(?:   |$)", text, re.M
    ):
        yield shlex.split(found)
    if "restore it" in text or "Restore" in text:
        yield RUN
    for rounds, amend in re.findall(r"(rounds=\d+)( --amend)?", re.sub(r"rounds=\d+ comes too late", "", text)):
        yield [*(word for word in words if not word.startswith("rounds=")), rounds, *amend.split()]
    if re.search(r"repeat the command with --amend", text):
        yield [*words, "--amend"]
    if "--name X" in text:
        yield [*words, "--name", "X"]
    if "--runs DIR" in text:
        yield [*without_name(words), "--runs", "elsewhere"]


def without_name(words: list[str]) -> list[str]:
    at = words.index("--name") if "--name" in words else len(words)
    return words[:at] + words[at + 2 :]


def try_each(said: Callable[..., str], text: str, words: list[str], at_least: int) -> None:
    """Type each way out in a copy of the working directory, and verify the run."""
    ways = list(offered(text, words))
    assert len(ways) >= at_least, text
    here = Path.cwd()
    for number, way in enumerate(ways):
        copy = Path(shutil.copytree(here, here.parent / f"way-{number}"))
        os.chdir(copy)
        said(*way)
        for run in [*copy.glob("runs/*/run.json"), *copy.glob("elsewhere/*/run.json")]:
            said("verify", str(run.parent))
    os.chdir(here)


# ---- recipes that changed ----


def test_a_change_of_what_is_not_made_yet_can_be_taken_back_resumed_amended_or_run_apart(said, monkeypatch):
    written(RECIPE)
    killed_in_training(monkeypatch, 1)
    words = [*RUN, "measure.limit=3"]
    text = said(*words, code=1)
    assert "measure.limit: 3 was added" in text and "--amend" in text
    try_each(said, text, words, 4)


@pytest.mark.parametrize(
    ("word", "reason"),
    [("seed=1", "fixed when a run is created"), ("sample.n=4", "01-sample.json  was made by a different recipe")],
)
@pytest.mark.parametrize("amend", [[], ["--amend"]])
def test_what_cannot_be_amended_can_be_taken_back_resumed_or_run_apart(said, monkeypatch, word, reason, amend):
    written(RECIPE)
    killed_in_training(monkeypatch, 1)
    words = [*RUN, word, *amend]
    text = said(*words, code=1)
    assert reason in text and "with --amend" not in text
    try_each(said, text, words, 3)


def test_a_finished_run_says_how_a_change_can_take_effect(said):
    written(RECIPE)
    said(*RUN)
    words = [*RUN, "sample.n=4"]
    text = said(*words, code=1)
    assert "rounds=3 --amend" in text
    try_each(said, text, words, 4)


def test_a_model_that_is_gone_can_be_named_in_a_run_apart(said, monkeypatch):
    written(KEEPS_ONE)
    killed_in_training(monkeypatch, 4)
    words = [*RUN, "train.from=base", "--amend"]
    text = said(*words, code=1)
    assert "`keep` had them taken away" in text
    try_each(said, text, words, 3)


def test_too_few_rounds_name_the_numbers_that_work(said, monkeypatch):
    written(RECIPE)
    killed_in_training(monkeypatch, 3, "rounds=5")
    text = said(*RUN, code=1)
    assert "round 2 is sealed already, on the way to round 5" in text
    try_each(said, text, RUN, 3)


def test_a_broken_reward_is_mended_with_amend(said):
    Path("mine.py").write_text(BROKEN)
    written(OWN)
    text = said(*RUN, code=1)
    assert "Fix the reward and repeat the command with --amend" in text
    Path("mine.py").write_text(RIGHT)
    try_each(said, text, RUN, 1)


# ---- runs that ended ----


def go_on(text: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.endswith("# go on"))
    return shlex.split(line.split("#")[0])[1:]


@pytest.mark.parametrize(
    ("recipe", "reason"), [(PATIENT, "dev/chars did not improve"), (FRUGAL, "tokens were generated, budget 100")]
)
def test_a_run_that_stopped_early_goes_on_by_the_command_that_it_prints(said, recipe, reason):
    written(recipe)
    text = said(*RUN)
    assert reason in text
    before = len(list(Path("runs/sums").glob("round-*/sealed.json")))
    again = said(*go_on(text))
    assert len(list(Path("runs/sums").glob("round-*/sealed.json"))) > before
    assert f"Stopped after round {before - 1}" in again and "then it was asked to go on" in again
    said("verify", "runs/sums")


def test_a_run_whose_patience_ended_is_offered_more_patience_and_makes_three_more_rounds(said):
    written(RECIPE.replace("rounds: 2", "rounds: 9\nstop: {patience: 1, metric: dev/chars}"))
    words = go_on(said(*RUN))
    before = len(list(Path("runs/sums").glob("round-*/sealed.json")))
    assert not any(word.startswith("rounds=") for word in words) and words[-1] == "--amend"
    assert "stop.patience=4" in words
    said(*words)
    assert len(list(Path("runs/sums").glob("round-*/sealed.json"))) >= before + 3


def test_one_round_is_not_called_rounds(said, monkeypatch):
    written(RECIPE.replace("rounds: 2", "rounds: 9\nstop: {patience: 1, metric: dev/chars}"))
    assert "did not improve for 1 round\n" in said(*RUN)
    written(RECIPE)
    killed_in_training(monkeypatch, 1, "--name", "one")
    assert re.search(r"runs/one is as it was committed: 1 round, \d+ steps?, ", said("verify", "runs/one"))


def test_the_commands_that_resume_prints_work_and_are_called_what_they_do(said):
    written(RECIPE)
    said(*RUN)
    lines = said("resume", "runs/sums").split("Next:\n")[1].splitlines()
    assert not any(line.endswith("# go on") for line in lines)
    for line in lines:
        said(*shlex.split(line.split("#")[0])[1:])


def test_the_recipes_own_rounds_after_more_were_made_change_nothing(said):
    written(RECIPE)
    said(*RUN, "rounds=3")
    said(*RUN)
    assert re.search(r"runs/sums +fake +done +3 of 3", said("status"))


# ---- places ----


def test_beside_a_living_driver_one_may_watch_or_run_apart(said):
    written(RECIPE)
    said(*RUN, "rounds=1")
    with Lease(Path("runs/sums/leases"), Path("runs/sums/tmp")):
        text = said(*RUN, code=1)
    assert "another driver holds this run" in text
    try_each(said, text, RUN, 1)


@pytest.mark.parametrize("name", ["../evil", "a/b", "/evil", ".."])
def test_a_name_never_leads_out_of_the_folder_of_runs(said, tmp_path, name):
    written(RECIPE)
    words = [*RUN, "--name", name]
    text = said(*words, code=2)
    assert f"'{name}' is not the name of one folder" in text
    assert not Path("runs").exists() and not (tmp_path / "evil").exists()
    try_each(said, text, words, 1)


def test_a_file_system_without_links_is_left_for_another(said, monkeypatch, tmp_path):
    written(RECIPE)
    link = os.link

    def refuse(source, target):
        if "elsewhere" not in str(target):
            raise OSError(errno.EPERM, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", refuse)
    text = said(*RUN, code=1)
    assert "this file system cannot link files" in text
    try_each(said, text, RUN, 1)


def test_doctor_says_that_a_file_system_cannot_link(monkeypatch, tmp_path):
    from selfkd.cli.doctor import _folder

    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (check,) = _folder(tmp_path)
    assert check.level == "fail" and "cannot link files" in check.fact and "--runs DIR" in check.fix


def test_an_edited_prompt_file_is_said_and_the_way_to_use_it_works(said):
    written(RECIPE)
    said(*RUN)
    Path("train.jsonl").write_text(Path("train.jsonl").read_text().replace("What is", "How much is"))
    text = said(*RUN)
    assert "prompts.train: train.jsonl was changed since the run was created" in text
    try_each(said, text.split("\n")[0], RUN, 1)
