"""Chains whose end is known on paper, walked by the loop itself: what is sampled, replayed, filtered and trained on is the engine's doing.

Only the model is ours: a regression (Gerstgrasser et al. 2024, arXiv 2404.01413) and a table of answers (Song et al. 2024,
arXiv 2412.02674; Huang et al. 2024, arXiv 2412.01951).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains import go
from learners import Learner, skill

from selfkd.core import digest
from selfkd.recipe.load import load


def prompts_in(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


# ---- a regression that learns its own answers ----

CHAINS, DIM, PER_CHAIN, ROUNDS = 150, 2, 16, 4
REPLACE = """
name: collapse
model: fake
rounds: 4
chunk: 4096
keep: {last: 9}
prompts: {train: {file: train.jsonl, prompt: question}}
steps:
  - sample: {max_tokens: 64}
  - train: {loss: sft}
"""
ACCUMULATE = REPLACE.replace("  - train", "  - replay\n  - train")


class Regression(Learner):
    """Chain k answers x with x·w_k plus noise of variance 1, and learns w_k by least squares; the truth is 0."""

    def first(self) -> list[list[float]]:
        return [[0.0] * DIM for _ in range(CHAINS)]

    def learn(self, now: Any, rows: list[tuple[str, str]]) -> list[list[float]]:
        of: dict[int, list[tuple[list[float], float]]] = {}
        for asked, said in rows:
            chain, x = read(asked)
            of.setdefault(chain, []).append((x, float(said)))
        return [
            list(map(float, np.linalg.lstsq(np.array([x for x, _ in of[k]]), np.array([y for _, y in of[k]]))[0]))
            for k in range(CHAINS)
        ]


def read(asked: str) -> tuple[int, list[float]]:
    chain, *x = asked.split()
    return int(chain), [float(one) for one in x]


def noisy(messages: list[dict[str, str]], seed: int, weights: Any) -> str:
    chain, x = read(messages[-1]["content"])
    noise = math.sqrt(-2 * math.log(1 - digest.uniform(seed, "r"))) * math.cos(2 * math.pi * digest.uniform(seed, "a"))
    return repr(round(sum(a * b for a, b in zip(x, weights[chain], strict=True)) + noise, 9))


@pytest.mark.parametrize(
    ("text", "grows"), [(REPLACE, lambda n: n), (ACCUMULATE, lambda n: sum(1 / i**2 for i in range(1, n + 1)))]
)
def test_a_chain_that_replaces_its_data_collapses_and_one_that_accumulates_does_not_as_the_closed_form_says(
    tmp_path: Path, text: str, grows: Any
) -> None:
    drawn = np.random.default_rng(5).standard_normal((CHAINS, PER_CHAIN, DIM))
    rows = [{"question": " ".join([str(k), *(f"{value:.6f}" for value in x)])} for k in range(CHAINS) for x in drawn[k]]
    prompts_in(tmp_path, rows)
    (tmp_path / "r.yaml").write_text(text)
    run = go(load(str(tmp_path / "r.yaml")), tmp_path / "run", Regression({}, noisy))
    for index in range(1, ROUNDS + 1):
        errors = [sum(value**2 for value in weights) for weights in skill(run, index)]
        expected = grows(index) * DIM / (PER_CHAIN - DIM - 1)
        error = np.std(errors, ddof=1) / math.sqrt(CHAINS)
        assert abs(np.mean(errors) - expected) < 3 * error, (
            f"round {index}: {np.mean(errors):.3f}, not {expected:.3f} ± {error:.3f}"
        )


# ---- a table of answers ----

PROMPTS, ANSWERS = 120, 12
TABLE = """
name: table
model: fake
rounds: 6
chunk: 4096
keep: {{last: 9}}
prompts: {{train: {{file: train.jsonl, prompt: question, answer: answer}}}}
steps:
  - sample: {{n: 12, max_tokens: 16}}
  - score: {{reward: {reward}, as: right, max_failed: 1}}
  - select: "right = 1"
  - train: {{loss: sft}}
"""


def base_table() -> np.ndarray:
    """Return p(answer | prompt): half of the prompts lean to the right answer, which is 0; the others know it and do not say it."""
    drawn = np.random.default_rng(3)
    table = drawn.dirichlet([0.4] * ANSWERS, PROMPTS)
    table[: PROMPTS // 2, 0] += drawn.uniform(0.0, 0.6, PROMPTS // 2)
    table[:, 0] += 0.02
    return np.asarray(table / table.sum(1, keepdims=True))


class Table(Learner):
    def first(self) -> list[list[float]]:
        return [list(map(float, row)) for row in base_table()]

    def learn(self, now: Any, rows: list[tuple[str, str]]) -> list[list[float]]:
        """Half of the old table and half of what was kept, for each prompt of which something was."""
        counts = np.zeros((PROMPTS, ANSWERS))
        for asked, said in rows:
            counts[int(re.findall(r"\d+", asked)[0]), int(said.rsplit(" ", 1)[1]) - 1] += 1
        table, seen = np.array(now), counts.sum(1, keepdims=True)
        mixed = np.where(seen > 0, 0.5 * table + 0.5 * counts / np.maximum(seen, 1), table)
        return [list(map(float, row)) for row in mixed]


def drawn_from(messages: list[dict[str, str]], seed: int, table: Any) -> str:
    row = np.cumsum(table[int(re.findall(r"\d+", messages[-1]["content"])[0])])
    return f"Answer: {1 + int(np.searchsorted(row, digest.uniform(seed) * row[-1], side='right'))}"


def walked(folder: Path, reward: str) -> list[np.ndarray]:
    """Return the table before the first round and after the last."""
    folder.mkdir()
    prompts_in(folder, [{"question": f"Prompt {number}?", "answer": "1"} for number in range(PROMPTS)])
    (folder / "t.yaml").write_text(TABLE.format(reward=reward))
    run = go(load(str(folder / "t.yaml")), folder / "run", Table({}, drawn_from))
    return [np.array(skill(run, index)) for index in (0, 6)]


def pass_at(table: np.ndarray, k: int) -> float:
    return float(np.mean(1 - (1 - table[:, 0]) ** k))


def test_a_vote_raises_pass_at_1_to_the_plurality_of_the_base_and_destroys_pass_at_64_and_a_verifier_does_not(
    tmp_path: Path,
) -> None:
    base, voted = walked(tmp_path / "vote", "reward/vote.py:majority")
    _, verified = walked(tmp_path / "gold", "reward/number.py:last_number")
    plurality = float(np.mean(base.argmax(1) == 0))
    assert pass_at(voted, 1) > pass_at(base, 1) + 0.05
    assert abs(pass_at(voted, 1) - plurality) < 0.06
    assert pass_at(voted, 64) < pass_at(base, 64) - 0.2
    assert abs(pass_at(voted, 64) - pass_at(voted, 1)) < 0.15  # what it does not say at once it does not say
    assert pass_at(verified, 64) > pass_at(base, 64) - 0.02
    assert pass_at(verified, 1) > pass_at(voted, 1) + 0.1
