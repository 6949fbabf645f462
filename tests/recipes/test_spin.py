"""The shipped recipe spin, walked with a scripted model.

Derived by hand from Chen et al. 2024 (arXiv 2401.01335), algorithm 1, and its released code: each prompt is answered once by the model of the
round at T 1; the human answer is chosen, its own is rejected; DPO's logistic loss starts from that model and is held against it; from the
second round on the pairs of the round before are learned again beside the new ones.

    round   pairs (chosen > rejected) of each of 2 prompts         start = reference
    1       human > own 1                                          base
    2       human > own 2, human > own 1                           model of round 1
    3       human > own 3, human > own 2 (own 1 is gone)           model of round 2
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

from selfkd.recipe.load import load

HUMAN = {"Say hello.": "Good day to you.", "Say goodbye.": "Farewell, and come back."}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    return f"Own {1 + time} to '{text}'" if text in HUMAN else "7"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in HUMAN.items()]
    return golden("spin", says, tmp_path_factory.mktemp("spin"), rows, overrides=["rounds=3"])


def test_the_model_of_the_round_answers_each_prompt_once_at_temperature_1(walked):
    weights = walked.weights()
    assert walked.asked("own") == {(digest, 1.0, 1.0) for digest in weights[:3]}
    assert {one.sampling.max_tokens for one in walked.backend.asked if one.stream == "own"} == {256}
    assert [walked.table(index, "sample", "samples").height for index in (1, 2, 3)] == [2, 2, 2]


def test_the_human_answer_wins_against_the_own_ones_of_this_round_and_of_the_one_before(walked):
    for index, update in enumerate(walked.backend.updates, 1):
        found = {(m[-1]["content"], c, r) for m, c, r in update.rows.select("messages", "chosen", "rejected").iter_rows()}
        times = [index] if index == 1 else [index, index - 1]
        assert found == {(prompt, human, f"Own {time} to '{prompt}'") for prompt, human in HUMAN.items() for time in times}
        assert update.rows.height == 2 * len(times)


def test_each_round_starts_from_the_last_one_and_is_held_against_it(walked):
    weights = walked.weights()
    assert [(update.start, update.reference) for update in walked.backend.updates] == [(one, one) for one in weights[:3]]
    assert {(update.spec.loss, update.spec.nll) for update in walked.backend.updates} == {("dpo", 0.0)}


def test_rate_and_beta_change_as_in_the_code():
    recipe = load("spin")
    trains = [step for index in range(1, 5) for step in recipe.steps_of(index) if step.verb == "train"]
    assert [(train.trl["learning_rate"], train.beta) for train in trains] == [
        (5e-7, 0.1),
        (5e-7, 0.1),
        (1e-7, 0.1),
        (1e-7, 5.0),
    ]
    words = ("optim", "lr_scheduler_type", "warmup_steps")
    assert {tuple(train.trl[word] for word in words) for train in trains} == {("rmsprop", "linear", 0.1)}
    assert recipe.long == "drop"  # a part of UltraChat's prompts is longer than 1,024 tokens
    assert trains[0].trl["per_device_train_batch_size"] * trains[0].trl["gradient_accumulation_steps"] == 64
