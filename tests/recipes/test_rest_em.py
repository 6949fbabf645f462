"""The shipped recipe rest-em, walked with a scripted model.

Derived by hand from Singh et al. 2023 (arXiv 2312.06585), section 3: the E-step draws 32 answers to each problem from the current model (T 0.7,
top-k 40, behind worked examples) and keeps right ones, at most 10 of a problem; the M-step trains the base, not the current model, on the
examples and the question with what this round kept, and on nothing of earlier rounds.

    problem   32 answers                            rows of a round
    2 + 2     12 right, each in its own words       10
    3 + 3     32 right, two texts in all            2 (a text is learned once, which is ours)
    4 + 4     1 right, 31 wrong                     1
    5 + 5     all wrong                             0
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

RIGHT = {"2 + 2": 12, "3 + 3": 32, "4 + 4": 1, "5 + 5": 0}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    asked = next((sum_ for sum_ in RIGHT if f"Question: What is {sum_}?\nAnswer:" in text), "")
    if not asked:
        return "#### 7"
    right, result = time % 32 < RIGHT[asked], 2 * int(asked[0])
    way = time % 2 if asked == "3 + 3" else time
    return f"Way {way} of round {1 + time // 32}. #### {result if right else result + 1}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": f"What is {sum_}?", "answer": str(2 * int(sum_[0]))} for sum_ in RIGHT]
    return golden("rest-em", says, tmp_path_factory.mktemp("rest-em"), rows, overrides=["rounds=2"], test=None)


def test_the_e_step_asks_the_current_model_32_times_behind_worked_examples(walked):
    first, second, _ = walked.weights()
    assert walked.asked("sample") == {(first, 0.7, 1.0), (second, 0.7, 1.0)}
    assert {one.sampling.top_k for one in walked.backend.asked if one.stream == "sample"} == {40}
    for index in (1, 2):
        samples = walked.table(index, "sample", "samples")
        assert samples.height == 4 * 32
        assert all(messages[-1]["content"].count("Question: ") == 5 for messages in samples["teacher_messages"])


def test_the_m_step_trains_the_base_on_at_most_ten_right_answers_of_this_round_behind_the_examples(walked):
    base = walked.weights()[0]
    assert [(update.start, update.reference) for update in walked.backend.updates] == [(base, None), (base, None)]
    for index, update in enumerate(walked.backend.updates, 1):
        asked = Counter(
            messages[-1]["content"].rsplit("Question: ", 1)[1].removesuffix("\nAnswer:") for messages in update.rows["messages"]
        )
        assert asked == {"What is 2 + 2?": 10, "What is 3 + 3?": 2, "What is 4 + 4?": 1}
        assert all(messages[-1]["content"].count("Question: ") == 5 for messages in update.rows["messages"])
        assert all(f"of round {index}. " in text for text in update.rows["chosen"])
        assert set(update.rows["weight"]) == {1.0} and update.spec.loss == "sft"
