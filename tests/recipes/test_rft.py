"""The shipped recipe rft, walked with a scripted model.

Derived by hand from Yuan et al. 2023 (arXiv 2308.01825), section 3.3, and its released code: the base is fine-tuned on the human solutions; that
model answers each problem 100 times at T 0.7; an answer stays if its result is right and each calculation in << >> comes out; of those with
one list of equations (blanks left out) one stays; the base is trained on the human solutions and what stayed.

    problem   its answers (in turn, 100 in all)                              equations      stays
    2 + 3     "<<2+3=5>>5 #### 5"                                            2+3=5          one of these
              "So <<2 + 3 = 5>>5. #### 5"                                    2+3=5          two kinds of text
              "<<3+2=5>>5 #### 5"                                            3+2=5          one
              "<<2+3=6>>6, no, 5. #### 5"                                    false          none: it does not come out
              "<<2+3=5>>5 #### 6"                                            2+3=5          none: wrong result
    4 + 4     "<<4+4=8>>8" without a result, in all                          4+4=8          none
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

ANSWERS = (
    "<<2+3=5>>5 #### 5",
    "So <<2 + 3 = 5>>5. #### 5",
    "<<3+2=5>>5 #### 5",
    "<<2+3=6>>6, no, 5. #### 5",
    "<<2+3=5>>5 #### 6",
)
PROMPTS = [
    {"prompt": "What is 2 + 3?", "answer": "5", "solution": "Two and three are <<2+3=5>>5."},
    {"prompt": "What is 4 + 4?", "answer": "8", "solution": "Twice four is <<2*4=8>>8."},
]
HUMAN = {f"{row['solution']}\n#### {row['answer']}" for row in PROMPTS}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    return ANSWERS[time % 5] if "2 + 3" in text else "<<4+4=8>>8, or 9" if "4 + 4" in text else "#### 7"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    return golden("rft", says, tmp_path_factory.mktemp("rft"), PROMPTS, test=None)


def test_the_base_is_first_fine_tuned_on_human_solutions_and_that_model_answers_100_times(walked):
    first = walked.backend.updates[0]
    assert set(first.rows["chosen"]) == HUMAN and first.rows.height == 2
    [warm, _] = walked.weights()
    assert first.start != warm and walked.asked("own") == {(warm, 0.7, 1.0)}
    assert walked.table(1, "sample", "samples").height == 200
    assert {one.sampling.max_tokens for one in walked.backend.asked if one.stream == "own"} == {256}


def test_right_answers_whose_calculations_come_out_stay_one_per_list_of_equations(walked):
    rows = walked.backend.updates[1].rows
    assert set(rows["chosen"]) > HUMAN and rows.height == 4
    own = set(rows["chosen"]) - HUMAN
    assert "<<3+2=5>>5 #### 5" in own and len(own & set(ANSWERS[:2])) == 1
    assert {messages[-1]["content"] for messages in rows["messages"]} == {row["prompt"] for row in PROMPTS}


def test_the_base_is_trained_anew_as_the_first_time(walked):
    first, second = walked.backend.updates
    assert first.start == second.start and first.reference is second.reference is None
    for spec in (first.spec, second.spec):
        words = ("learning_rate", "num_train_epochs", "warmup_steps", "lr_scheduler_type")
        assert [spec.trl[word] for word in words] == [2e-5, 3, 0.03, "cosine"] and spec.loss == "sft"
        assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 128
