"""Shipped recipes walked with a scripted model: raft, reinforce-rej, iterative-dpo and easy-to-hard, against what their papers say.

Four prompts; each of `take` prompts a round is answered n times. `SOLVED` says how many of the answers are right, and which ones follows
from the order in which they are asked. By hand:

    prompt  right of 8   raft keeps       iterative-dpo pairs         right of 4   reinforce-rej learns, with rewards
    a       8            1 right one      none: all alike             4            nothing: always solved
    b       0            none             none: all alike             0            nothing: never solved
    c       3            1 right one      1 right over 1 wrong        1            1 at +1, 3 at -1
    d       5            1 right one      1 right over 1 wrong        3            3 at +1, 1 at -1

raft (arXiv 2304.06767) and iterative DPO (2405.07863): two prompts in round 1, the other two in round 2, from the model of the last round;
DPO is held against the base. Reinforce-Rej (2504.11343): the ratio is to the model that answered, the start of the round.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from judges import table

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.recipe.load import load
from selfkd.recipe.schema import Take

EIGHT = {"What is a?": 8, "What is b?": 0, "What is c?": 3, "What is d?": 5}
FOUR = {"What is a?": 4, "What is b?": 0, "What is c?": 1, "What is d?": 3}


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


def learned(run: Run, step: str, index: int) -> list[tuple[str, bool]]:
    """Return (prompt, whether the chosen answer is right) of each row."""
    rows = table(run, step, "rows", index)
    return sorted((messages[-1]["content"], "is 7" in text) for messages, text in rows.select("messages", "chosen").iter_rows())


# ---- raft ----


@pytest.fixture(scope="module")
def raft(tmp_path_factory) -> tuple[Run, Scripted]:
    return walked("raft", tmp_path_factory.mktemp("raft"), EIGHT, 8, 2, rounds=2)


def test_raft_draws_new_prompts_and_answers_each_eight_times(raft):
    run, backend = raft
    assert asked(run, 1) == {"What is a?": 8, "What is b?": 8} and asked(run, 2) == {"What is c?": 8, "What is d?": 8}
    drawn = {(digest, one.temperature) for stream, digest, one in backend.generated if stream == "sample"}
    assert drawn == {(digest, 1.0) for digest in weights(run)[:2]}


def test_raft_learns_the_best_answer_of_each_prompt_that_has_one(raft):
    run, _ = raft
    assert learned(run, "train", 1) == [("What is a?", True)]
    assert learned(run, "train", 2) == [("What is c?", True), ("What is d?", True)]


def test_raft_goes_on_from_the_model_of_the_last_round(raft):
    run, backend = raft
    assert [(start, reference) for start, reference, _ in backend.trained] == [(weights(run)[0], None), (weights(run)[1], None)]
    assert {spec.loss for _, _, spec in backend.trained} == {"sft"}


# ---- reinforce-rej ----


@pytest.fixture(scope="module")
def rejecting(tmp_path_factory) -> tuple[Run, Scripted]:
    return walked("reinforce-rej", tmp_path_factory.mktemp("rej"), FOUR, 4, 4, rounds=1)


def test_reinforce_rej_leaves_out_what_is_always_and_what_is_never_solved(rejecting):
    run, _ = rejecting
    rows = table(run, "build", "rows")
    found = Counter((messages[-1]["content"], label) for messages, label in rows.select("messages", "label").iter_rows())
    assert found == {("What is c?", 1.0): 1, ("What is c?", -1.0): 3, ("What is d?", 1.0): 3, ("What is d?", -1.0): 1}
    assert set(rows["weight"]) == {1.0}  # no baseline, no normalisation
    assert all((label == 1.0) == ("is 7" in text) for label, text in rows.select("label", "chosen").iter_rows())


def test_reinforce_rej_takes_the_ratio_to_the_model_that_answered(rejecting):
    run, backend = rejecting
    [(start, reference, spec)] = backend.trained
    assert start == reference == weights(run)[0] == next(one for stream, one, _ in backend.generated if stream == "sample")
    assert (spec.function.name, spec.rows, dict(spec.function.params)) == ("reinforce", "label", {"clip": 0.2})


# ---- iterative-dpo ----


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


# ---- easy-to-hard ----


class Adding(Fake):
    """Adds turned numbers rightly, and writes a digit too few where the first digit of the first number is 9."""

    def __init__(self) -> None:
        super().__init__({}, self.said)
        self.trained: list[tuple[str, int]] = []

    def said(self, messages: list[dict[str, str]], seed: int, skill: float) -> str:
        one, other = messages[-1]["content"].rstrip("=").split("+")
        result = str(int(one[::-1]) + int(other[::-1])).zfill(len(one) + 1)[::-1]
        return result[:-1] if one[0] == "9" else result

    def train(self, start, reference, rows, spec, out, *listener):
        self.trained.append((start.digest, sum(pl.read_parquet(path).height for path in rows)))
        return super().train(start, reference, rows, spec, out, *listener)


def test_easy_to_hard_adds_a_digit_a_round_filters_by_length_and_keeps_all_rounds(tmp_path):
    """12 sums of 4, 5 and 6 digits, 12 a round; 240 easy ones each time. What begins with 9 is written too short and dropped."""
    overrides = ["prompts.take.n=12", "prompts.train.params={first: 4, last: 6, each: 12}", "rounds=3"]
    recipe, backend = load("easy-to-hard", overrides), Adding()
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    walk(run, backend, run.begin())
    kept = []
    for index in (1, 2, 3):
        samples = table(run, "sample", "samples", index)
        shown = [messages[-1]["content"] for messages in samples["teacher_messages"]]
        assert {len(text.split("+")[0]) for text in shown} == {3 + index} and len(shown) == 12
        short = sum(text.startswith("9") for text in shown)
        assert ("select" in run.made(index)) and run.made(index)["select"].tables["drops"].rows == short
        kept.append(12 - short)
    made = weights(run)
    assert len(set(made)) == 4 and [start for start, _ in backend.trained[1:]] == made[:3]
    assert [count for _, count in backend.trained] == [240, *(240 + sum(kept[:index]) for index in (1, 2, 3))]
