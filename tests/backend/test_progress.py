"""A chain on Ray whose every slow call reports how far it is: each report reaches the step that it belongs to, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toys import Toy, fetch, learn

from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.recipe.load import load

RECIPE = """
model: toy
rounds: 1
prompts:
  train: {file: train.jsonl, prompt: question, answer: answer}
steps:
  - sample: {max_tokens: 8}
  - train: sft
  - score: {logprob: policy@base, as: fluency}
"""


def test_scoring_by_log_probability_after_training_is_reported_as_scoring(cluster: Any, tmp_path: Path) -> None:
    from selfkd.backend.ray.dispatcher import RayBackend

    (tmp_path / "train.jsonl").write_text('{"question": "sleep 1.5", "answer": "x"}\n')
    (tmp_path / "toy.yaml").write_text(RECIPE)
    machine = Machine(backend="ray", threads=1)
    run = Run.open(load(str(tmp_path / "toy.yaml")), tmp_path / "run", machine)
    backend = RayBackend(machine, run.numerics, tmp_path / "log", engine=Toy, trainer=learn, loader=fetch, ahead=False)
    try:
        walk(run, backend, run.begin())
    finally:
        backend.close()
    reports = [event for event in events(run) if event["event"] == "progress" and event["round"] == 1]
    units = {step: {event["unit"] for event in reports if event["step"] == step} for step in ("sample", "train", "score")}
    assert units == {"sample": {"answers"}, "train": {"steps"}, "score": {"samples"}}


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for path in run.folder.glob("logs/*/events.jsonl") for line in path.read_text().splitlines()]
