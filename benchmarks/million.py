"""One million samples through score, select, build and seal on the fake backend: seconds, and the peak of memory.

The samples are written beforehand, as if a generator had made them; what is timed is what a round does with them.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from selfkd.backend.base import Completion, Reply, write_chunk
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.recipe.load import load

PROMPTS, PER_PROMPT = 125_000, 8
REWARD = '''def right(completion: str, answer: str) -> float:
    """1.0 when the completion ends with the answer."""
    return float(completion.endswith(answer))
'''
RECIPE = f"""
name: million
model: fake
rounds: 1
chunk: 50000
prompts:
  train: {{file: train.parquet, prompt: question, answer: answer}}
steps:
  - sample: {{n: {PER_PROMPT}}}
  - score: right.py:right
  - select: {{where: "right = 1", per_prompt: 2}}
  - build: sft
  - train: sft
"""


class Quick(Fake):
    """Answers a whole chunk by column arithmetic: the answers must not be what is timed."""

    def generate(self, model, chunks, sampling, on_progress=None):
        for chunk in chunks:
            rows = chunk.requests.select(
                "tiebreak", pl.col("teacher_messages").list.first().struct.field("content")
            ).iter_rows()
            replies = [
                Completion(f"I add and find {content[-4:] if u < 0.4 else 'no'}", (1, 2, 3), "stop", -1.0)
                for u, content in rows
            ]
            yield Reply(chunk.key, write_chunk(chunk, model, replies, model.digest, {}), model.digest, 3 * len(replies), 0.0)


def main(prompts: int = PROMPTS) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = [f"What is it? {1000 + i % 9000}" for i in range(prompts)]
        answers = [question[-4:] for question in questions]
        frame = pl.DataFrame({"question": [f"{i} {q}" for i, q in enumerate(questions)], "answer": answers})
        frame.write_parquet(folder / "train.parquet")
        (folder / "right.py").write_text(REWARD)
        (folder / "million.yaml").write_text(RECIPE)
        run = Run.open(load(str(folder / "million.yaml")), folder / "run", Machine(backend="fake"))
        began = time.monotonic()
        walk(run, Quick({}), run.begin())
        total = time.monotonic() - began
        seconds = {step: commit.notes["seconds"] for step, commit in run.made(1).items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {name: seconds[name] for name in ("score", "select", "build")}
    outside = {"sample": seconds["sample"], "train": seconds["train"]}
    return {
        "samples": prompts * PER_PROMPT,
        **found,
        "seal and the rest": round(total - sum(seconds.values()), 1),
        **outside,
        "peak_gib": round(peak, 2),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]) if len(sys.argv) > 1 else PROMPTS)))
