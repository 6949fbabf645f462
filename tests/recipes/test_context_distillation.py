"""The shipped recipe context-distillation, walked with a scripted model.

Derived by hand from Snell et al. 2022 (arXiv 2209.15189), sections 2 and 3: the teacher is the first model with a context, here four solved
sums as turns; its samples are learned by the model without the context, as the KL of the student's from the teacher's distribution at each
token (their objective; per token as in GKD, arXiv 2306.13649). No sample is filtered. The teacher does not change from round to round.

    round  asked         with the context, twice each   rows: student sees      teacher sees     trained from  teacher
    1      the base      sums one, two                  the sum alone           context and sum  round 0       base
    2      the base      sums three, four               the sum alone           context and sum  round 1       base
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

SUMS = [f"How much is {number} + 1?" for number in range(4)]


def says(messages: list[dict[str, str]], time: int) -> str:
    return f"It is {len(messages)} turns long, told {time + 1} times."


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": prompt, "answer": "1"} for prompt in SUMS]
    return golden("context-distillation", says, tmp_path_factory.mktemp("context"), rows, take=2)


def test_the_untouched_model_answers_with_the_context_in_every_round(walked):
    base = walked.weights()[0]
    assert len(set(walked.weights())) == 3
    assert walked.asked("sample") == {(base, 1.0, 1.0)}


def test_every_answer_is_a_row_whose_student_sees_the_sum_and_whose_teacher_sees_the_context_too(walked):
    for index, prompts in ((1, SUMS[:2]), (2, SUMS[2:])):
        rows = walked.table(index, "build", "rows")
        assert sorted(messages[0]["content"] for messages in rows["messages"]) == sorted(prompts * 2)
        for student, teacher, text in rows.select("messages", "teacher_messages", "chosen").iter_rows():
            assert (
                len(student) == 1 and len(teacher) == 9
            )  # four solved sums, each asked and answered, and the one that is asked
            assert teacher[1]["content"].endswith("Answer: 9") and teacher[-1]["content"] == student[0]["content"]
            assert text.startswith("It is 9 turns long")
        assert set(rows["kind"]) == {"kd"} and set(rows["weight"]) == {1.0}


def test_each_round_goes_on_from_the_last_and_learns_its_own_rows_from_the_base(walked):
    weights, updates = walked.weights(), walked.backend.updates
    assert [(one.start, one.reference) for one in updates] == [(weights[0], weights[0]), (weights[1], weights[0])]
    assert [one.rows.height for one in updates] == [4, 4]
    for one in updates:
        how = one.spec.divergence
        assert (one.spec.loss, how.kind, how.top_k, how.temperature) == ("kd", "forward", 0, 1.0)
        assert (how.clip, how.clip_entry, how.skip, how.first) == (0.0, 0.0, 0, 0)
    assert [one.spec.trl["learning_rate"] for one in updates] == [5e-5, 2e-5]
