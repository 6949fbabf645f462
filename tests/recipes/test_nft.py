"""The shipped recipe nft, walked with a scripted model.

Derived by hand from Chen et al. 2025 (arXiv 2505.18116), algorithm 1, and its released code: 16 answers at T 1 to each problem of the batch by the
model of the round; prompts that are always or never solved are left out; every other answer is a row with its label, right or wrong, and its
prompt's rate of right ones; the loss is held against the model that drew the answers; 512 rows a step, lr 1e-6.

    problem   round   16 answers                                        rate    rows
    1 + 1     1       4 right, 12 wrong                                 4/16    16, of which 4 with label 1
    2 + 2     1       all right                                         1       none
    3 + 3     2       all wrong                                         0       none
    4 + 4     2       8 right and whole, 2 right and cut, 6 wrong       8/16    16: a cut one counts as wrong
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

RIGHT = {"1 + 1": 4, "2 + 2": 16, "3 + 3": 0, "4 + 4": 10}


def says(messages: list[dict[str, str]], time: int) -> str:
    asked = next((sum_ for sum_ in RIGHT if f"What is {sum_}?" in messages[-1]["content"]), "")
    if not asked:
        return "#### 7"
    result = 2 * int(asked[0]) + (time >= RIGHT[asked])
    return f"Answer {time}. #### {result}" + "\nand so on" * (99 if asked == "4 + 4" and time in (8, 9) else 0)


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": f"What is {sum_}?", "answer": str(2 * int(sum_[0]))} for sum_ in RIGHT]
    return golden("nft", says, tmp_path_factory.mktemp("nft"), rows, overrides=["rounds=2"], take=2, test=None)


def test_the_model_of_the_round_answers_16_times_at_temperature_1(walked):
    first, second, _ = walked.weights()
    assert walked.asked("sample") == {(first, 1.0, 1.0), (second, 1.0, 1.0)}
    assert [walked.table(index, "sample", "samples").height for index in (1, 2)] == [32, 32]


@pytest.mark.parametrize(("index", "prompt", "right"), [(1, "What is 1 + 1?", 4), (2, "What is 4 + 4?", 8)])
def test_answers_of_prompts_that_are_solved_sometimes_become_rows_with_label_and_rate(walked, index, prompt, right):
    rows = walked.backend.updates[index - 1].rows
    assert rows.height == 16 and {messages[-1]["content"] for messages in rows["messages"]} == {prompt}
    assert Counter(rows["label"]) == {1.0: right, 0.0: 16 - right}
    numbers = {(one["name"], one["value"]) for row in rows["columns"].to_list() for one in row}
    assert numbers == {("rate", right / 16)} and set(rows["weight"]) == {1.0}
    assert all(("#### 2" in text or "#### 8" in text) for text in rows.filter(rows["label"] == 1)["chosen"])


def test_the_loss_is_held_against_the_model_that_drew_the_answers(walked):
    first, second, _ = walked.weights()
    assert [(update.start, update.reference) for update in walked.backend.updates] == [(first, first), (second, second)]
    for spec in (update.spec for update in walked.backend.updates):
        assert spec.loss == "nft" and spec.rows == "label" and spec.keeps_state
        assert dict(spec.function.params) == {"negative": 1, "normalize": 1, "clamp": 1.0, "length": 1000}
        assert (spec.trl["learning_rate"], spec.trl["lr_scheduler_type"]) == (1e-6, "constant")
        assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 512
