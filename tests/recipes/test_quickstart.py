"""The shipped recipe quickstart, walked with a scripted model.

It has no paper of its own; by its head: the teacher is the same model shown four solved sums, the student sees the bare question; four answers
to each of this round's new sums, right ones in the asked form, at most two of a sum; training goes on from the last round.

    sum      round   four answers                                   rows
    1 + 1    1       right, right, right, wrong                     2
    2 + 2    1       right result without the line, and wrong       0
    3 + 3    2       right, and three wrong                         1
    4 + 4    2       all right                                      2
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

SAYS = {
    "1 + 1": ("Answer: 2", "So\nAnswer: 2", "Then\nAnswer: 2", "Answer: 3"),
    "2 + 2": ("4", "it is 4", "Answer: 5", "Answer: 6"),
    "3 + 3": ("Answer: 6", "Answer: 7", "Answer: 8", "Answer: 9"),
    "4 + 4": tuple(f"Way {way}\nAnswer: 8" for way in range(4)),
}


def says(messages: list[dict[str, str]], time: int) -> str:
    return SAYS.get(messages[-1]["content"], ("Answer: 7",) * 99)[time]


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": sum_, "answer": str(2 * int(sum_[0]))} for sum_ in SAYS]
    return golden("quickstart", says, tmp_path_factory.mktemp("quickstart"), rows, overrides=["rounds=2"], take=2)


def test_the_teacher_is_the_model_of_the_round_shown_four_solved_sums(walked):
    first, second, _ = walked.weights()
    assert walked.asked("sample") == {(first, 0.8, 1.0), (second, 0.8, 1.0)}
    for index, sums in ((1, {"1 + 1", "2 + 2"}), (2, {"3 + 3", "4 + 4"})):
        shown = walked.table(index, "sample", "samples")["teacher_messages"].to_list()
        assert Counter(messages[-1]["content"] for messages in shown) == dict.fromkeys(sums, 4)
        assert {tuple(message["role"] for message in messages) for messages in shown} == {(*("user", "assistant") * 4, "user")}


def test_at_most_two_right_answers_in_the_asked_form_are_learned_behind_the_bare_sum(walked):
    rows = [Counter(messages[0]["content"] for messages in update.rows["messages"]) for update in walked.backend.updates]
    assert rows == [{"1 + 1": 2}, {"3 + 3": 1, "4 + 4": 2}]
    assert all(len(messages) == 1 for update in walked.backend.updates for messages in update.rows["messages"])
    right = {*SAYS["1 + 1"][:3], "Answer: 6", *SAYS["4 + 4"]}
    assert {text for update in walked.backend.updates for text in update.rows["chosen"]} <= right


def test_training_goes_on_from_the_last_round_with_smaller_steps(walked):
    first, second, _ = walked.weights()
    assert [(update.start, update.reference) for update in walked.backend.updates] == [(first, None), (second, None)]
    said = [(update.spec.trl["learning_rate"], update.spec.trl["num_train_epochs"]) for update in walked.backend.updates]
    assert said == [(5e-5, 2), (1e-5, 1)]
