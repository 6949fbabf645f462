"""A whole chain on the real engine and the real trainer, a tiny Llama, and ways to kill it: for tests on a CPU and for checks on a card."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tiny import tiny_model

from selfkd.chain.run import Run

RECIPE = """
model: {model}
rounds: {rounds}
context: 160
chunk: 8
exact: {exact}
prompts:
  train: {{file: train.jsonl, prompt: question, answer: answer}}
  dev: {{file: dev.jsonl, prompt: question, answer: answer}}
steps:
  - sample: {{n: 4, temperature: 1.0, max_tokens: 24}}
  - score: vowels.py:vowels
  - select: "vowels > 0"
  - build: {{kind: sft, as: plain, cut: keep}}
  - train: {{loss: sft, of: plain, trl: {{learning_rate: 5.0e-4, num_train_epochs: 2}}}}
  - build: {{kind: pair, as: pairs, cut: keep, chosen: "vowels = max(vowels) OVER (PARTITION BY prompt)", rejected: "vowels = min(vowels) OVER (PARTITION BY prompt)"}}
  - train: {{loss: dpo, nll: 1.0, of: pairs, trl: {{learning_rate: 1.0e-4}}}}
  - measure: {{reward: vowels.py:vowels, max_tokens: 24}}
"""
REWARD = '''def vowels(completion):
    """Any answer of a tiny random model has some: a reward that is neither always right nor always wrong."""
    return float(sum(letter in "aeiou" for letter in completion))
'''
WAIT = 240.0
KILLS = 4  # of `kill_each`


def make_home(folder: Path, exact: str = "auto", machine: str = "threads: 1\n", rounds: int = 2) -> Path:
    """Fill a folder with the model, the prompts, the reward, the recipe and a machine file, as a user would have them."""
    tiny_model(folder / "tiny", tied=True)
    (folder / "vowels.py").write_text(REWARD)
    for name, count in (("train", 6), ("dev", 4)):
        rows = [{"question": f"{name} {i}?", "answer": "a"} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chain.yaml").write_text(RECIPE.format(model=folder / "tiny", exact=exact, rounds=rounds))
    (folder / "one.yaml").write_text(machine)
    return folder


def start(home: Path, name: str, on: str | None = "one.yaml", recipe: Sequence[str] = ("chain.yaml",)) -> subprocess.Popen[str]:
    """Start the run in a process group of its own, which a test may kill. `recipe` is what is typed of it."""
    command = [sys.executable, "-m", "selfkd", "run", *recipe, "--name", name, *(("--on", on) if on else ())]
    return subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)


def finish(
    home: Path, name: str, on: str | None = "one.yaml", recipe: Sequence[str] = ("chain.yaml",), wait: float = WAIT
) -> Run:
    process = start(home, name, on, recipe)
    said, _ = process.communicate(timeout=wait)
    assert process.returncode == 0, said
    return Run.at(home / "runs" / name)


def until(run: Path, seen: Callable[[dict[str, Any]], bool], process: subprocess.Popen[str], wait: float = WAIT) -> None:
    """Wait for an event of the newest attempt."""
    deadline = time.monotonic() + wait
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


def kill_group(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_each(home: Path, name: str, pause: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Make the run, killing engine, driver with all it has, rank, and driver alone; yield whom after each. Ends with the run.

    `pause` is waited for before each kill, so that it comes at another instant.
    """
    run, process = home / "runs" / name, start(home, name)
    until(run, begins(1, "sample"), process)
    pause()
    os.kill(pid_in(run, "engine-0.log", "generator"), signal.SIGKILL)  # the driver replaces it, and goes on
    yield "engine"
    until(run, begins(1, "train"), process)
    pause()
    kill_group(process)
    yield "driver and its group"
    process = start(home, name)
    until(run, begins(1, "train-2"), process)
    pause()
    os.kill(pid_in(run, "trainer-0.log", "rank 0"), signal.SIGKILL)  # one repetition, and goes on
    yield "rank"
    until(run, begins(2, "sample"), process)
    pause()
    process.kill()
    yield "driver"
    finish(home, name)
