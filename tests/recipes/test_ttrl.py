"""The shipped recipe ttrl, walked with a scripted model.

Derived by hand from Zuo et al. 2025 (arXiv 2504.16084), section 2: the test questions are the training set, without their answers; 64 answers vote,
32 of them learn, with reward 1 where they agree with the majority and 0 where not. As rounds: rows with that as their label and the share
of agreement among those that learn as their rate; a loss whose gradient is GRPO's at the model of the round, held against it; lr 5e-7, 8
questions (256 answers) a step.

    question   64 answers                                        majority   rows
    1 + 1      40 say 2, 24 say 3                                2          32, label 1 for each "2"
    2 + 2      50 say 9 (wrong, and nobody knows), 14 say 4      9          32, label 1 for each "9"
    3 + 3      32 say 6, 32 say 7                                tied       none (that is ours)
    4 + 4      64 say 8                                          8          none: GRPO's advantage is 0 where all have one reward
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

VOTES = {
    "1 + 1": ["2"] * 40 + ["3"] * 24,
    "2 + 2": ["9"] * 50 + ["4"] * 14,
    "3 + 3": ["6"] * 32 + ["7"] * 32,
    "4 + 4": ["8"] * 64,
}
WON = {"What is 1 + 1?": "2", "What is 2 + 2?": "9"}
PROMPTS = [{"prompt": f"What is {sum_}?", "answer": str(2 * int(sum_[0])), "hint": "the sum"} for sum_ in VOTES]


def says(messages: list[dict[str, str]], time: int) -> str:
    asked = next(sum_ for sum_ in VOTES if sum_ in messages[-1]["content"])
    return f"Answer {time}: \\boxed{{{VOTES[asked][time % 64]}}}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    return golden("ttrl", says, tmp_path_factory.mktemp("ttrl"), PROMPTS, PROMPTS, overrides=["rounds=1"], test=None)


def test_the_prompts_are_those_that_are_measured_and_no_step_has_their_answers(walked):
    train, dev = walked.run.split("train"), walked.run.split("dev")
    assert train.scan("prompts").collect()["messages"].to_list() == dev.scan("prompts").collect()["messages"].to_list()
    assert train.prompts["answer"].null_count() == 4 and dev.prompts["answer"].null_count() == 0
    assert set(train.scan("prompts").collect()["meta"]) == {"{}"}


def test_64_answers_of_the_model_of_the_round_vote(walked):
    assert walked.asked("sample") == {(walked.weights()[0], 1.0, 1.0)}
    assert walked.table(1, "sample", "samples").height == 4 * 64


def test_32_of_them_learn_with_the_majority_as_what_is_right(walked):
    [update] = walked.backend.updates
    for prompt, won in WON.items():
        rows = update.rows.filter([messages[-1]["content"] == prompt for messages in update.rows["messages"]])
        labels = [float(f"{{{won}}}" in text) for text in rows["chosen"]]
        assert rows.height == 32 and rows["label"].to_list() == labels
        assert {row[0]["name"] for row in rows["columns"].to_list()} == {"rate"}
        assert {row[0]["value"] for row in rows["columns"].to_list()} == {sum(labels) / 32}
        assert 0 < sum(labels) < 32
    assert update.rows.height == 64


def test_the_loss_has_grpo_s_gradient_at_the_model_of_the_round_which_is_its_reference(walked):
    [update] = walked.backend.updates
    first, spec = walked.weights()[0], update.spec
    assert (update.start, update.reference, spec.loss) == (first, first, "nft") and spec.keeps_state
    assert dict(spec.function.params) == {"normalize": 2}
    assert (spec.trl["learning_rate"], spec.trl["lr_scheduler_type"]) == (5e-7, "constant")
    assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 8 * 32
