"""The shipped recipe prompt-baking, walked with a scripted model.

Derived by hand from Bhargava et al. 2024 (arXiv 2409.13697), section 3: trajectories are sampled from the prompted model, 25 for each
question at temperature 2, cut ones included; the bare model with an adapter (rank 8, alpha 1, on q, k, v and o) minimises the KL from the
prompted model, whose weights are those before baking; pursuit (section 5) prompts the baked model again and bakes that.

    round  asked, prompted  trained, bare, from  teacher, prompted
    1      round 0          round 0              round 0
    2      round 1          round 1              round 1
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

QUESTIONS = ["How many legs have 3 cats?", "How many have 4?"]


def says(messages: list[dict[str, str]], time: int) -> str:
    """Every fifth answer is longer than 200 tokens, which here are bytes."""
    return "Twelve." * 40 if time % 5 == 4 else f"Twelve, said {time} times."


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": prompt, "answer": "12"} for prompt in QUESTIONS]
    return golden("prompt-baking", says, tmp_path_factory.mktemp("baking"), rows, test=None)


def test_the_prompted_model_that_entered_the_round_answers_25_times_at_temperature_2(walked):
    weights = walked.weights()
    assert len(set(weights)) == 3
    assert walked.asked("sample") == {(weights[0], 2.0, 1.0), (weights[1], 2.0, 1.0)}
    for index in (1, 2):
        samples = walked.table(index, "sample", "samples")
        assert samples.height == 2 * 25
        assert all("Question: A baker" in messages[0]["content"] for messages in samples["teacher_messages"])


def test_rows_keep_the_bare_question_for_the_student_and_cut_answers_as_what_the_model_says(walked):
    for index in (1, 2):
        rows = walked.table(index, "build", "rows")
        assert rows.height == 2 * 25 and rows.filter(~rows["chosen_ended"]).height == 2 * 5
        assert {messages[0]["content"] for messages in rows["messages"]} == set(QUESTIONS)
        assert all("Question: A baker" in messages[0]["content"] for messages in rows["teacher_messages"])


def test_an_adapter_learns_the_kl_from_its_own_start_and_pursuit_begins_with_the_baked_model(walked):
    weights, updates = walked.weights(), walked.backend.updates
    assert {(one.start, one.reference) for one in updates} == {(weights[0], weights[0]), (weights[1], weights[1])}
    for one in updates:
        assert (one.spec.loss, one.spec.divergence.kind, one.spec.divergence.top_k) == ("kd", "forward", 0)
        lora = one.spec.lora
        assert (lora.r, lora.alpha, lora.targets) == (8, 1.0, ("q_proj", "k_proj", "v_proj", "o_proj"))
        assert (one.spec.trl["learning_rate"], one.spec.trl["per_device_train_batch_size"]) == (1e-4, 10)
        assert one.spec.trl["num_train_epochs"] == 10
