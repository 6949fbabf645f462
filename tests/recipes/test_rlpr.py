"""The shipped recipe rlpr, walked with a scripted model whose probabilities are written here.

Derived by hand from Yu et al. 2025 (arXiv 2506.18254): for a response z (reasoning) and y (answer), the reward is the mean over the tokens
of the gold answer y* of their probabilities behind z, r; less r', the same without z; not below 0. Prompts of small spread are left out.
GRPO is stood in for by the best against the worst response of a prompt, where they are 0.1 apart and the best is 0.1 above r'.

    prompt  r of its responses (A, B, C, and D without ####)  r'    pair
    one     0.9   0.5   0.2                                   0.3   A over C
    two     0.45  0.5   0.48                                  0.3   none: 0.05 apart
    three   0.25  0.1   0.15                                  0.3   none: the best is below what it knows without reasoning
    four    0.9   0.5   0.2   A at length                     0.3   none: the guard on length, which is ours
"""

from __future__ import annotations

import pytest
from golden import Golden, Scripted, golden

REACHED = {"one": (0.9, 0.5, 0.2), "two": (0.45, 0.5, 0.48), "three": (0.25, 0.1, 0.15), "four": (0.9, 0.5, 0.2)}
GOLD = {"one": "11", "two": "22", "three": "33", "four": "44"}
GUESSED = 0.3


def says(messages: list[dict[str, str]], time: int) -> str:
    letter = "ABCD"[time % 4]
    if letter == "D":
        return f"Reason {letter}."
    at_length = "on and on " * 5 if letter == "A" and messages[-1]["content"].startswith("four") else ""
    return f"Reason {at_length}{letter}.\n#### 7"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    asked: list[dict] = []

    def logprobs(self, model, rows, on_progress=None):
        for row in rows.iter_rows(named=True):
            asked.append({**row, "model": model.digest})
            prompt = row["messages"][-1]["content"].split("?")[0]
            reason = row["given"].removesuffix("####").strip()
            chance = REACHED[prompt]["ABC".index(reason[-2])] if reason else GUESSED
            yield row["id"], 2 * chance, 2  # two tokens of a gold answer: the sum of their probabilities

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scripted, "logprobs", logprobs)
        rows = [{"prompt": f"{name}?", "answer": answer} for name, answer in GOLD.items()]
        found = golden("rlpr", says, tmp_path_factory.mktemp("rlpr"), rows, overrides=["sample.n=4", "rounds=1"])
    found.scored = asked
    return found


def test_the_gold_answer_stands_behind_the_reasoning_and_the_answer_of_the_model_is_gone(walked):
    reasoned = [row for row in walked.scored if row["given"] != "####"]
    assert len(reasoned) == 12 and {row["model"] for row in walked.scored} == {walked.weights()[0]}
    for row in reasoned:
        name = row["messages"][-1]["content"].split("?")[0]
        assert row["text"] == f"{row['given']} {GOLD[name]}" and row["given"].startswith("Reason ")
        assert (row["sums"], row["finish_reason"], row["token_ids"]) == ("probability", "length", None)


def test_without_reasoning_the_gold_answer_alone_is_scored(walked):
    alone = [row for row in walked.scored if row["given"] == "####"]
    assert len(alone) == 12 and {row["text"] for row in alone} == {f"#### {answer}" for answer in GOLD.values()}


def test_the_reward_is_the_mean_probability_and_an_answer_that_cannot_be_told_has_none(walked):
    reached = walked.table(1, "score", "scores")
    assert sorted(reached["value"]) == pytest.approx(sorted(value for values in REACHED.values() for value in values))
    assert set(walked.table(1, "score-2", "scores")["value"]) == {GUESSED}


def test_the_one_pair_is_the_best_over_the_worst_of_the_prompt_that_teaches_something(walked):
    [row] = walked.table(1, "build", "rows").iter_rows(named=True)
    assert (row["chosen"], row["rejected"]) == ("Reason A.\n#### 7", "Reason C.\n#### 7")
    assert row["messages"][-1]["content"].startswith("one?") and "write ####" in row["messages"][-1]["content"]


def test_it_goes_on_from_the_round_before_which_is_the_reference_too(walked):
    [update] = walked.backend.updates
    assert (update.start, update.reference) == (walked.weights()[0],) * 2
    assert (update.spec.loss, update.spec.beta, update.spec.trl["learning_rate"]) == ("dpo", 0.1, 5e-7)
