"""The shipped recipe pro, walked with a scripted model.

Derived by hand from Song et al. 2023 (arXiv 2306.17492), section 3: a row is a prompt with its candidates, the two of the data set among them,
ranked by a reward, of which the differences are the temperatures; the first one's likelihood counts 0.05 (l - 1)^2; no reference model; one update.
The reward is the share of comparisons won here, both orders agreeing.

    prompt  order of merit                             shares
    one     own 1, preferred, own 2, other, own 3      4/4 3/4 2/4 1/4 0/4
    two     preferred, and the rest is equal to it     none: a judge that always says the first one says nothing, so there is no row
"""

from __future__ import annotations

import pytest
from golden import Golden, between, golden

MERIT = {
    "What is one?": ["Own 1.", "The preferred one.", "Own 2.", "The other one.", "Own 3."],
    "What is two?": ["The preferred two.", "Two 1.", "Two 2.", "Two 3.", "The other two."],
}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    if text in MERIT:
        return f"{'Own' if 'one' in text else 'Two'} {1 + time}."
    if "<answer A>" not in text:
        return "7"
    prompt = between(text, "<question>", "</question>")
    places = [
        MERIT[prompt].index(shown) if (shown := between(text, f"<answer {side}>", f"</answer {side}>")) in MERIT[prompt] else 9
        for side in "AB"
    ]
    return "[[A]]" if prompt == "What is two?" or places[0] < places[1] else "[[B]]"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    train = [
        {"prompt": "What is one?", "answer": "The preferred one.", "rejected": "The other one."},
        {"prompt": "What is two?", "answer": "The preferred two.", "rejected": "The other two."},
    ]
    return golden("pro", says, tmp_path_factory.mktemp("pro"), train, take=2)


def test_three_own_answers_and_the_data_set_s_two_are_compared_in_both_orders_by_the_untouched_model(walked):
    [base, _] = walked.weights()
    assert walked.asked("sample") == {(base, 1.0, 1.0)} and walked.answers(1).height == 2 * 3
    assert walked.asked("judgments") == {(base, 0.7, 0.9)}
    judged = walked.table(1, "judge", "samples")
    assert judged.filter(judged["stream"] == "judgments").height == 2 * 5 * 4


def test_a_row_is_a_prompt_with_its_candidates_by_the_share_of_comparisons_won(walked):
    [ranked] = walked.table(1, "build", "rows")["ranked"].to_list()
    assert [(one["text"], one["score"]) for one in ranked] == list(
        zip(MERIT["What is one?"], (1.0, 0.75, 0.5, 0.25, 0.0), strict=True)
    )


def test_one_update_from_the_base_without_a_reference(walked):
    [base, _] = walked.weights()
    assert walked.pairings() == [(base, None)]
    [spec] = [update.spec for update in walked.backend.updates]
    assert (spec.loss, spec.rows, dict(spec.function.params)) == ("pro", "rank", {"share": 0.05})
    assert (spec.trl["learning_rate"], spec.trl["num_train_epochs"]) == (5e-6, 2)
    assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 112
