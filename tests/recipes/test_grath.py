"""The shipped recipe grath, walked with a scripted model.

Derived by hand from Chen et al. 2024 (arXiv 2401.12292), section 3 and its released code: the untouched model writes a right and a wrong
answer to each question, greedily, shown examples; DPO on (question, right, wrong). Then the new model writes the right ones anew, which take
the place of the old ones, while the wrong ones stay; DPO goes on from the new model, which is its reference.

    question  wrong (asked once)  right in round 1   right in round 2
    ice       It is a stone.      It is water 0.     It is water 1.
    sun       It is a lamp.       It is a star 0.    It is a star 1.
    rain      No.                 It falls from clouds 0.   …1.   none in either round: the guard on length, which is ours
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

ANSWERS = {
    "What is ice?": ("It is a stone.", "It is water {}."),
    "What is the sun?": ("It is a lamp.", "It is a star {}."),
    "What is rain?": ("No.", "It falls from clouds {}."),
}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    task, _, question = text.partition("\nQuestion: ")
    if question not in ANSWERS:
        return "Answer: B"
    assert len(messages) == 13 and [message["role"] for message in messages[:2]] == ["user", "assistant"]  # six examples
    wrong, right = ANSWERS[question]
    assert task.startswith("Give a right answer") or (task.startswith("Give a wrong answer") and time == 0)
    return right.format(time) if "right" in task else wrong


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    dev = [{"prompt": "Is it A or B?", "answer": "B"}]
    return golden("grath", says, tmp_path_factory.mktemp("grath"), [{"prompt": prompt} for prompt in ANSWERS], dev)


def test_wrong_answers_are_the_untouched_model_s_and_right_ones_each_round_s_all_greedy(walked):
    first, second, _ = walked.weights()
    assert walked.asked("wrong") == {(first, 0.0, 1.0)}
    assert walked.asked("right") == {(first, 0.0, 1.0), (second, 0.0, 1.0)}
    assert {one.sampling.max_tokens for one in walked.backend.asked if one.stream != "dev"} == {100}


@pytest.mark.parametrize("index", [1, 2])
def test_only_the_right_answer_of_a_pair_is_written_anew_and_examples_are_stripped(walked, index):
    assert walked.pairs(index) == [
        (f"It is a star {index - 1}.", "It is a lamp."),
        (f"It is water {index - 1}.", "It is a stone."),
    ]
    shown = [messages[-1]["content"] for messages in walked.table(index, "build", "rows")["messages"]]
    assert sorted(shown) == ["What is ice?", "What is the sun?"]


def test_dpo_goes_on_from_the_last_model_which_is_its_reference(walked):
    first, second, _ = walked.weights()
    assert walked.pairings() == [(first, first), (second, second)]
    for spec in (update.spec for update in walked.backend.updates):
        assert (spec.loss, spec.beta, spec.lora.r, spec.lora.alpha) == ("dpo", 0.1, 8, 16)
        words = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_steps")
        assert [spec.trl[word] for word in words] == [5e-4, "cosine", 100, 0.05, 1000]
        assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 16


def test_the_anchor_has_choices_and_is_measured_in_each_round(walked):
    assert [walked.metrics(index)["dev/match"] for index in range(3)] == [1.0, 1.0, 1.0]
