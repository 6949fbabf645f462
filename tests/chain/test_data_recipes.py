"""The shipped recipe iterative-dpo, walked with a scripted model, against what its paper says (arXiv 2405.07863).

Four prompts; each of `take` prompts a round is answered 8 times. `EIGHT` says how many of the answers are right, and which ones follows
from the order in which they are asked. By hand:

    prompt  right of 8   pairs
    a       8            none: all alike
    b       0            none: all alike
    c       3            1 right over 1 wrong
    d       5            1 right over 1 wrong

Two prompts in round 1, the other two in round 2, from the model of the last round; DPO is held against the base.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from judges import table

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.recipe.load import load
from selfkd.recipe.schema import Take

EIGHT = {"What is a?": 8, "What is b?": 0, "What is c?": 3, "What is d?": 5}


class Scripted(Fake):
    """Answers each prompt rightly as often as the table says, in turns, and notes what is asked and trained."""

    def __init__(self, solved: dict[str, int], of: int) -> None:
        super().__init__({}, self.said)
        self.solved, self.of, self.count = solved, of, Counter[str]()
        self.generated: list[tuple[str, str, Any]] = []
        self.trained: list[tuple[str, str | None, Any]] = []

    def said(self, messages: list[dict[str, str]], seed: int, skill: float) -> str:
        text = messages[-1]["content"]
        self.count[text] += 1
        right = (self.count[text] - 1) % self.of < self.solved.get(text, 0)
        return f"Try {self.count[text]}. The answer is {7 if right else 8}."

    def generate(self, model, chunks, sampling, *listener):
        self.generated += [(chunk.stream, model.digest, sampling) for chunk in chunks]
        return super().generate(model, chunks, sampling, *listener)

    def train(self, start, reference, rows, spec, out, *listener):
        self.trained.append((start.digest, reference and reference.digest, spec))
        return super().train(start, reference, rows, spec, out, *listener)


def walked(name: str, folder: Path, solved: dict[str, int], of: int, take: int, **more: Any) -> tuple[Run, Scripted]:
    recipe = load(name)
    prompts = {
        "take": Take(n=take),
        "train": [{"prompt": prompt, "answer": "7"} for prompt in solved],
        "dev": [{"prompt": "3 + 4", "answer": "7"}],
        "test": None,
    }
    recipe = recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update=prompts), **more})
    backend = Scripted(solved, of)
    run = Run.open(recipe, folder / "run", Machine(backend="fake"))
    walk(run, backend, run.begin())
    return run, backend


def weights(run: Run) -> list[str]:
    return [seal.models["policy"].digest for seal in run.sealed()]


def asked(run: Run, index: int) -> dict[str, int]:
    return dict(Counter(messages[-1]["content"] for messages in table(run, "sample", "samples", index)["teacher_messages"]))


@pytest.fixture(scope="module")
def pairing(tmp_path_factory) -> tuple[Run, Scripted]:
    solved = {name: EIGHT[f"What is {name[8]}?"] for name in ("What is a?", "What is c?", "What is b?", "What is d?")}
    return walked("iterative-dpo", tmp_path_factory.mktemp("dpo"), solved, 8, 2, rounds=2)


def test_iterative_dpo_pairs_a_best_answer_with_a_worst_where_they_differ(pairing):
    run, _ = pairing
    assert asked(run, 1) == {"What is a?": 8, "What is c?": 8} and asked(run, 2) == {"What is b?": 8, "What is d?": 8}
    for index, prompt in ((1, "What is c?"), (2, "What is d?")):
        [row] = table(run, "build", "rows", index).to_dicts()
        assert row["messages"][-1]["content"] == prompt and row["kind"] == "pair"
        assert "is 7" in row["chosen"] and "is 8" in row["rejected"]


def test_iterative_dpo_goes_on_from_the_last_round_and_is_held_against_the_base(pairing):
    run, backend = pairing
    made = weights(run)
    assert [one[:2] for one in backend.trained] == [(made[0], made[0]), (made[1], made[0])]
    assert {(spec.loss, spec.beta, spec.nll) for _, _, spec in backend.trained} == {("dpo", 0.1, 0.0)}
