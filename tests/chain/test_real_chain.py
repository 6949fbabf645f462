"""A whole chain on the real engine and the real trainer, a tiny Llama: killed anywhere, it ends on the undisturbed digest."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from selfkd.chain.run import Run
from selfkd.core.accelerator import accelerator
from selfkd.report.verify import verify

pytestmark = pytest.mark.real

RECIPE = """
model: {model}
rounds: 2
context: 160
chunk: 8
prompts:
  train: {{file: train.jsonl, prompt: question, answer: answer}}
  dev: {{file: dev.jsonl, prompt: question, answer: answer}}
steps:
  - sample: {{n: 4, temperature: 1.0, max_tokens: 24}}
  - score: vowels.py:vowels
  - select: "vowels > 0"
  - build: {{kind: sft, as: plain, cut: keep}}
  - train: {{loss: sft, of: plain, trl: {{learning_rate: 5.0e-4, num_train_epochs: 2}}}}
  - build: {{kind: pair, cut: keep, chosen: "vowels = max(vowels) OVER (PARTITION BY prompt)", rejected: "vowels = min(vowels) OVER (PARTITION BY prompt)"}}
  - train: {{loss: dpo, nll: 1.0, of: rows, trl: {{learning_rate: 1.0e-4}}}}
  - measure: {{reward: vowels.py:vowels, max_tokens: 24}}
"""
REWARD = '''def vowels(completion):
    """Any answer of a tiny random model has some: a reward that is neither always right nor always wrong."""
    return float(sum(letter in "aeiou" for letter in completion))
'''
WAIT = 240.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, the prompts, the reward and the recipe, as a user would have it."""
    folder = tmp_path_factory.mktemp("home")
    tiny_model(folder / "tiny", tied=True)
    (folder / "vowels.py").write_text(REWARD)
    for name, count in (("train", 6), ("dev", 4)):
        rows = [{"question": f"{name} {i}?", "answer": "a"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chain.yaml").write_text(
        RECIPE.format(model=folder / "tiny").replace("kind: pair,", "kind: pair, as: pairs,").replace("of: rows", "of: pairs")
    )
    (folder / "one.yaml").write_text("threads: 1\n")
    (folder / "slow.yaml").write_text("threads: 1\ngenerator: transformers\n")
    return folder


def start(home: Path, name: str, on: str = "one.yaml") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "selfkd", "run", "chain.yaml", "--name", name, "--on", on]
    return subprocess.Popen(
        command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(home: Path, name: str, on: str = "one.yaml") -> Run:
    process = start(home, name, on)
    said, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, said
    return Run.at(home / "runs" / name)


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Run:
    return finish(home, "undisturbed")


def until(run: Path, seen: Callable[[dict[str, Any]], bool], process: subprocess.Popen[str]) -> None:
    """Wait for an event of the newest attempt."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        newest = max(run.glob("logs/attempt-*/events.jsonl"), default=None)
        lines = newest.read_text().splitlines() if newest and process.pid in _pids(newest) else []
        if any(seen(json.loads(line)) for line in lines if line.endswith("}")):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("the event did not come")


def _pids(log: Path) -> list[int]:
    return [event["pid"] for event in map(json.loads, log.read_text().splitlines()[:1]) if "pid" in event]


def begins(index: int, step: str) -> Callable[[dict[str, Any]], bool]:
    return lambda event: (event["event"], event.get("round"), event.get("step")) == ("step", index, step)


def pid_in(run: Path, log: str, words: str) -> int:
    """The process named in the newest attempt's log of an engine or a rank."""
    found = re.findall(rf"{words}, process (\d+)", max(run.glob(f"logs/attempt-*/{log}")).read_text())
    return int(found[-1])


def test_the_chain_learns_from_both_losses_and_every_swap_is_proved(undisturbed: Run) -> None:
    sealed = undisturbed.sealed()
    assert len({record.models["policy"].digest for record in sealed}) == 3
    for index in (1, 2):
        notes = undisturbed.made(index)["measure"].notes
        assert notes["swap"]["proved"] is True and notes["swap"]["survived"] > 0.5
    assert verify(undisturbed.folder).problems == []


def test_killed_driver_engine_and_trainer_the_same_command_ends_on_the_same_digest(home: Path, undisturbed: Run) -> None:
    run = home / "runs" / "killed"
    process = start(home, "killed")
    until(run, begins(1, "sample"), process)
    os.kill(pid_in(run, "engine-0.log", "generator"), signal.SIGKILL)  # the driver replaces it, and goes on
    until(run, begins(1, "train"), process)
    os.killpg(process.pid, signal.SIGKILL)
    process = start(home, "killed")
    until(run, begins(1, "train-2"), process)
    os.kill(pid_in(run, "trainer-0.log", "rank 0"), signal.SIGKILL)  # one repetition, and goes on
    until(run, begins(2, "sample"), process)
    process.kill()
    assert finish(home, "killed").sealed()[-1].digest == undisturbed.sealed()[-1].digest
    assert verify(run).problems == []


def test_two_engines_and_a_stop_in_the_middle_end_on_the_same_digest(home: Path, undisturbed: Run) -> None:
    (home / "one.yaml").write_text("threads: 1\ngenerators: 2\n")
    process = start(home, "stopped")
    until(home / "runs" / "stopped", begins(1, "sample"), process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert finish(home, "stopped").sealed()[-1].digest == undisturbed.sealed()[-1].digest


def test_a_chain_by_transformers_killed_with_its_engine_ends_on_its_own_digest(home: Path) -> None:
    whole, run = finish(home, "slow", "slow.yaml"), home / "runs" / "slow-killed"
    process = start(home, "slow-killed", "slow.yaml")
    until(run, begins(1, "sample"), process)
    os.kill(pid_in(run, "engine-0.log", "generator"), signal.SIGKILL)  # the driver replaces it, and goes on
    until(run, begins(2, "sample"), process)
    os.killpg(process.pid, signal.SIGKILL)
    ended = finish(home, "slow-killed", "slow.yaml")
    assert ended.sealed()[-1].digest == whole.sealed()[-1].digest
    assert [seal.notes["level"] for seal in ended.sealed()] == ["exact"] * 3
    assert all(ended.made(index)["measure"].notes["swap"]["proved"] is True for index in (1, 2))
    assert verify(run).problems == []


@pytest.mark.gpu
@pytest.mark.skipif(not accelerator().on_cards, reason="no CUDA device")
@pytest.mark.parametrize("turns", ["share", "split"])
def test_on_a_gpu_engine_and_trainer_take_turns_and_every_swap_is_proved(home: Path, turns: str) -> None:
    if turns == "split" and len(accelerator().cards) < 2:
        pytest.skip("split needs two cards")
    (home / "one.yaml").write_text(f"threads: 1\nturns: {turns}\n")
    run = finish(home, f"gpu-{turns}")
    swaps = [run.made(index)["measure"].notes["swap"] for index in (1, 2)]
    assert [swap["proved"] for swap in swaps] == [True, True]
    assert len({record.models["policy"].digest for record in run.sealed()}) == 3
    assert verify(run.folder).problems == []
