"""Checkpoints asked side by side: the same words and the same seed to each, and nothing written into the run."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from chains import RECIPE, write_prompts

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import talk
from selfkd.chain.run import Run
from selfkd.cli.main import main


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_prompts(folder)
    (folder / "sums.yaml").write_text(RECIPE.replace("rounds: 2", "rounds: 2\nkeep: {last: 9}"))
    (folder / "fake.yaml").write_text("backend: fake\n")
    here = Path.cwd()
    os.chdir(folder)
    assert main(["run", "sums.yaml", "--on", "fake.yaml"]) == 0
    assert main(["run", "sums.yaml", "keep={last: 1}", "--name", "pruned", "--on", "fake.yaml"]) == 0
    os.chdir(here)
    return folder


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, list[dict[str, str]], int, float]]:
    """Who is asked what, with which seed and temperature, in order."""
    found = []
    generate = Fake.generate

    def watched(self, model, chunks, sampling, *listener):
        for row in chunks[0].requests.iter_rows(named=True):
            found.append((model.digest, row["teacher_messages"], row["seed"], sampling.temperature))
        return generate(self, model, chunks, sampling, *listener)

    monkeypatch.setattr(Fake, "generate", watched)
    return found


def files_of(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_same_prompt_and_seed_go_to_every_checkpoint_and_nothing_is_written(said, asked):
    before = files_of(Path("runs/sums"))
    text = said("chat", "sums", "--rounds", "base,2", "--prompt", "What is 1 + 1?", "--seed", "7", "--temperature", "0.5")
    base, newest = (Run.at(Path("runs/sums")).named(f"policy@{when}").digest for when in ("base", "round-2"))
    words = [{"role": "user", "content": "What is 1 + 1?"}]
    assert asked == [(base, words, 7, 0.5), (newest, words, 7, 0.5)]
    assert f"base · policy@{base[:12]}" in text and f"2 · policy@{newest[:12]}" in text
    assert files_of(Path("runs/sums")) == before


def test_answers_stand_side_by_side_where_there_is_room_and_one_below_the_other_elsewhere(said, monkeypatch):
    words = ("chat", "sums", "--rounds", "base,1", "--prompt", "What is 1 + 1?")
    monkeypatch.setenv("COLUMNS", "100")
    assert any("base · " in line and "1 · " in line.partition("base · ")[2] for line in said(*words).splitlines())
    monkeypatch.setenv("COLUMNS", "60")
    assert not any("base · " in line and "╭" in line.partition("base · ")[2] for line in said(*words).splitlines())


def test_each_checkpoint_goes_on_from_its_own_answers_until_it_is_told_to_forget(said, asked, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 1 + 1?\nAnd 2 + 2?\n/new\nWho are you?\n"))
    said("chat", "sums", "--rounds", "base,1", "--system", "Be brief.")
    roles = [[message["role"] for message in messages] for _, messages, *_ in asked]
    assert roles[0] == roles[1] == roles[4] == ["system", "user"]
    assert roles[2] == roles[3] == ["system", "user", "assistant", "user"]
    own = [messages[2]["content"] for _, messages, *_ in asked[2:4]]
    assert all(answer for answer in own)


def test_a_program_gets_a_document_for_each_question(capsys):
    capsys.readouterr()
    assert main(["chat", "sums", "--rounds", "base,now", "--prompt", "What is 1 + 1?", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert [answer["name"] for answer in found["answers"]] == ["base", "now"] and found["prompt"] == "What is 1 + 1?"
    assert all(answer["text"] and answer["tokens"] for answer in found["answers"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["sums", "--rounds", "base,7"], 1, "'round-7' is never there to use"),
        (["sums", "--rounds", ","], 2, "names no checkpoint"),
        (["sums", "--rounds", "policy@"], 2, "'policy@' names no checkpoint"),
        (["sums", "--rounds", "critic@2"], 1, "no model 'critic@round-2'"),
        (["pruned", "--rounds", "1"], 1, "the weights of 'policy@round-1' are not on disk any more"),
        (["nothing"], 2, "no run here"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_asked(said, asked, words, code, message):
    assert message in said("chat", *words, "--prompt", "Hello?", code=code)
    assert asked == []


def test_checkpoints_of_the_same_weights_are_said_to_be_so(said):
    assert "now and 2 are the same weights" in said("chat", "sums", "--rounds", "2,now", "--prompt", "Hello?")


def test_weights_that_were_changed_do_not_answer(said):
    weights = next(Path("runs/sums").glob("round-002/*/policy-*/weights.json"))
    content = weights.read_text()
    weights.write_text(content.replace("0.", "0.9", 1))
    assert "were changed after they were committed" in said("chat", "sums", "--rounds", "2", "--prompt", "Hello?", code=1)
    weights.write_text(content)


def test_a_run_made_elsewhere_is_asked_in_this_process_in_its_own_number_format(home):
    run = Run.at(home / "runs" / "sums")
    run.machine = Machine(backend="ray", generators=4, trainers=2)
    run.numerics = {**run.numerics, "dtype": "float32"}
    here = talk._where(run, None)
    assert (here.backend, here.generators, here.trainers, here.generator) == ("local", 1, 1, "transformers")
    assert here.dtype == "float32" and here.max_model_len == run.recipe.context
    assert talk._where(run, Machine(generator="vllm")).generator == "vllm"
