"""The shipped recipe kto, walked with a scripted model.

Derived by hand from Ethayarajh et al. 2024 (arXiv 2402.01306), section 4: each answer is a row of its own, desirable or not, whatever the others
are; the reference is the model that is trained; and where kinds are uneven, weights make lambda_D n_D = lambda_U n_U. Labels are verified here.

    prompt  right answers of 8                          desirable
    one     8                                           8
    two     2, one of which is cut off                  1
    three   none                                        0
n_D = 9 and n_U = 15: a desirable row weighs 1, an undesirable one 9 / 15 = 0.6.
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

RIGHT = {"What is one?": 8, "What is two?": 2, "What is three?": 0}
LONG = "So it is 7 #### 7. " * 40  # more than 512 tokens of a byte


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    if text == "What is two?" and time == 0:
        return LONG
    return f"Step {time}. #### {7 if time < RIGHT.get(text, 8) else 8}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    train = [{"prompt": prompt, "answer": "7"} for prompt in RIGHT]
    return golden("kto", says, tmp_path_factory.mktemp("kto"), train, test=[{"prompt": "5 + 2", "answer": "7"}])


def test_the_model_answers_each_problem_eight_times(walked):
    [base, _] = walked.weights()
    assert walked.asked("sample") == {(base, 1.0, 1.0)} and walked.answers(1).height == 24


def test_every_answer_is_a_row_and_what_was_cut_is_not_right(walked):
    rows = walked.table(1, "build", "rows")
    assert rows["kind"].unique().to_list() == ["label"] and rows.height == 24
    good = rows.filter(rows["label"] == 1)
    assert good.height == 9 and LONG[:512] not in good["chosen"].to_list()
    assert rows.filter(rows["label"] == 0).height == 15


def test_both_kinds_weigh_the_same_in_all(walked):
    rows = walked.table(1, "build", "rows")
    right, wrong = (rows.filter(rows["label"] == label)["weight"].to_list() for label in (1, 0))
    assert right == [1.0] * 9 and wrong == pytest.approx([9 / 15] * 15)
    assert rows["weight"].sum() == pytest.approx(2 * 9)


def test_one_update_from_the_base_which_is_its_reference(walked):
    [base, _] = walked.weights()
    assert walked.pairings() == [(base, base)]
    [spec] = [update.spec for update in walked.backend.updates]
    assert (spec.loss, dict(spec.function.params), spec.trl["learning_rate"]) == ("kto", {"beta": 0.1}, 5e-6)
    assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 32
