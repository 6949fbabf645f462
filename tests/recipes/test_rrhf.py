"""The shipped recipe rrhf, walked with a scripted model.

Derived by hand from Yuan et al. 2023 (arXiv 2304.05302), section 3: answers of several sources, the model's own four and the data set's two,
each with a reward of one and the same judge; a row is a prompt with all of its answers in the order of their rewards; no reference model; one update.

    prompt  preferred  other  own, 4      order (mark)
    one     4          2      5 3 1 0     own 5, preferred 4, own 3, other 2, own 1, own 0
    two     5          0      2 2 2 9*    preferred 5, own 2 (three), other 0    * too long for our guard: it has no part in it
"""

from __future__ import annotations

import pytest
from golden import Golden, between, golden

MARKS = {
    "What is one?": {"The preferred one.": 4, "The other one.": 2, "Own 0.": 5, "Own 1.": 3, "Own 2.": 1, "Own 3.": 0},
    "What is two?": {"The preferred two.": 5, "The other two.": 0, "Two 0.": 2, "Two 1.": 2, "Two 2.": 2, "Two 3." * 20: 5},
}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    if text in MARKS:
        return list(MARKS[text])[2 + time]
    if "<answer>" not in text:
        return "7"
    marks = MARKS[between(text, "<question>", "</question>")]
    return f"Score: {marks.get(between(text, '<answer>', '</answer>'), 0)}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    train = [{"prompt": prompt, "answer": next(iter(marks)), "rejected": list(marks)[1]} for prompt, marks in MARKS.items()]
    return golden("rrhf", says, tmp_path_factory.mktemp("rrhf"), train, take=2)


def test_own_answers_are_drawn_four_times_and_all_six_are_marked_by_the_untouched_model(walked):
    [base, _] = walked.weights()
    assert walked.asked("sample") == {(base, 0.8, 1.0)} and walked.answers(1).height == 2 * 4
    assert walked.asked("judgments") == {(base, 0.7, 0.9)}
    judged = walked.table(1, "judge", "samples")
    assert judged.filter(judged["stream"] == "judgments").height == 2 * 6 * 3


def test_a_row_is_a_prompt_with_its_answers_in_the_order_of_their_marks(walked):
    rows = walked.table(1, "build", "rows")
    found = {
        messages[-1]["content"]: [(one["text"], one["score"]) for one in ranked]
        for messages, ranked in rows.select("messages", "ranked").iter_rows()
    }
    assert found["What is one?"] == [
        ("Own 0.", 5.0),
        ("The preferred one.", 4.0),
        ("Own 1.", 3.0),
        ("The other one.", 2.0),
        ("Own 2.", 1.0),
        ("Own 3.", 0.0),
    ]
    best, *middle, worst = found["What is two?"]
    assert (best, worst) == (("The preferred two.", 5.0), ("The other two.", 0.0))
    assert sorted(middle) == [("Two 0.", 2.0), ("Two 1.", 2.0), ("Two 2.", 2.0)]
    assert rows["weight"].to_list() == [1.0, 1.0]


def test_one_update_from_the_base_without_a_reference(walked):
    [base, _] = walked.weights()
    assert walked.pairings() == [(base, None)]
    [spec] = [update.spec for update in walked.backend.updates]
    assert (spec.loss, spec.rows, dict(spec.function.params)) == ("rrhf", "rank", {"likelihood": 1.0})
    words = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs")
    assert [spec.trl[word] for word in words] == [2e-5, "cosine", 0.03, 3]
    assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 64
