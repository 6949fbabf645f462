"""A small recipe on the fake backend, and ways to break its walk: what the chain tests share."""

from __future__ import annotations

import json
from pathlib import Path

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.core import storage
from selfkd.recipe.load import load
from selfkd.recipe.schema import Recipe

RECIPE = """
# A chain for tests: answer sums, keep the right ones, learn.
name: sums
model: fake
rounds: 2
chunk: 8
prompts:
  train: {file: train.jsonl, prompt: question, answer: answer}
  dev: {file: dev.jsonl, prompt: question, answer: answer}
steps:
  - sample: {n: 3, temperature: 0.8, max_tokens: 64}
  - score: reward/number.py:last_number
  - select: {where: "last_number = 1", per_prompt: 2}
  - train: {loss: sft}
  - measure: reward/number.py:last_number
"""


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def write_prompts(folder: Path, train: int = 12, dev: int = 6) -> None:
    for name, start, count in (("train", 10, train), ("dev", 60, dev)):
        rows = [{"question": f"What is {start + i} + {i}?", "answer": str(start + 2 * i)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_in(folder: Path, text: str = RECIPE, *overrides: str) -> Recipe:
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder)
    (folder / "sums.yaml").write_text(text)
    return load(str(folder / "sums.yaml"), overrides)


def go(recipe: Recipe, folder: Path, backend: Fake | None = None, amend: bool = False) -> Run:
    """Start the run, or go on with it, to its end."""
    run = Run.open(recipe, folder, Machine(backend="fake"), amend)
    walk(run, backend or Fake(run.numerics), run.begin())
    return run


def end(run: Run) -> str:
    return str(run.sealed()[-1].digest)


class Faults:
    """Counts file-system operations, and from the `at`-th on refuses all of them, as a dead process would."""

    def __init__(self, at: int | None = None, error: type[BaseException] | OSError = Killed, once: bool = False) -> None:
        self.at, self.error, self.once, self.count = at, error, once, 0

    def __call__(self, moment: str, action: str, path: Path) -> None:
        if self.at is None or self.count < self.at or (self.once and self.count > self.at):
            self.count += 1
            return
        self.count += 1
        raise self.error if isinstance(self.error, BaseException) else self.error()

    def __enter__(self) -> Faults:
        self._before, storage.hook = storage.hook, self
        return self

    def __exit__(self, *_: object) -> None:
        storage.hook = self._before
