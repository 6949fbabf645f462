"""The shipped recipe sd-zero, walked with a scripted model.

Derived by hand from SD-Zero (arXiv 2604.12002), whose two phases are:

1. The first model answers (A right, B wrong), is told the verdict, and answers again. Revisions that are right are learned (SFT) by the
   model that is shown problem, first answer and verdict: the reviser.
2. The student, which begins as the reviser, answers the bare problem. The reviser sees problem, that answer and its verdict, and teaches
   the student at each token of that same answer, right or wrong. Re-synced in each round: the teacher of round r is the model of r - 1.

    problem  first answers    revised           learned by the reviser
    one      1 and 9          of 1: 1; of 9: 1   both
    two      9 and 9          of 9: 9, twice     none
"""

from __future__ import annotations

import pytest
from golden import Golden, golden, optimisers

ANSWERS = {"What is one?": "1", "What is two?": "2"}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    if "Your earlier answer was" in text:
        return "Once more: 1" if text.startswith("What is one?") else "Once more: 9"
    return "I say 1" if text == "What is one?" and time % 2 == 0 else "I say 9"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": text, "answer": answer} for text, answer in ANSWERS.items()]
    return golden("sd-zero", says, tmp_path_factory.mktemp("sd-zero"), rows, overrides=["rounds=2"], take=2, test=None)


def test_the_reviser_learns_right_revisions_behind_problem_first_answer_and_verdict(walked):
    rows = walked.table(0, "revisions", "rows")
    assert rows.select("kind", "chosen").rows() == [("sft", "Once more: 1")] * 2
    seen = sorted(messages[0]["content"] for messages in rows["messages"])
    assert all(text.startswith("What is one?\n\nYour earlier answer was:\n<answer>\n") for text in seen)
    assert ["I say 1\n</answer>\nIt is correct." in text for text in seen] == [True, False]
    assert ["I say 9\n</answer>\nIt is incorrect." in text for text in seen] == [False, True]
    first = walked.backend.updates[0]
    assert (first.spec.loss, first.reference, first.start) == ("sft", None, walked.backend.asked[0].model)


def test_what_was_sampled_keeps_its_log_probability_for_staleness(walked):
    assert {one.sampling.extra["logprobs"] for one in walked.backend.asked if one.stream == "sample"} == {0}
    assert all(walked.table(index, "build", "rows")["chosen_logprob"].null_count() == 0 for index in (1, 2))


def test_the_student_answers_the_bare_problem_and_the_teacher_is_shown_that_answer_with_its_verdict(walked):
    for index in (1, 2):
        rows = walked.table(index, "build", "rows")
        assert sorted(messages[0]["content"] for messages in rows["messages"]) == sorted(ANSWERS)
        for student, teacher, text in rows.select("messages", "teacher_messages", "chosen").iter_rows():
            right = text.endswith(ANSWERS[student[0]["content"]])
            verdict = "correct" if right else "incorrect"
            assert teacher[0]["content"].startswith(student[0]["content"])
            assert f"<answer>\n{text}\n</answer>\nIt is {verdict}." in teacher[0]["content"]


def test_the_reviser_is_student_and_first_teacher_and_the_teacher_follows_round_by_round(walked):
    weights, updates = walked.weights(), walked.backend.updates[1:]
    assert weights[0] != walked.backend.updates[0].start  # round 0 ends with the reviser
    assert [(one.start, one.reference) for one in updates] == [(weights[0], weights[0]), (weights[1], weights[1])]
    assert walked.asked("sample") == {(weights[0], 1.0, 1.0), (weights[1], 1.0, 1.0)}
    assert {(one.spec.loss, one.spec.divergence.kind) for one in updates} == {("kd", "forward")}


def test_distillation_is_one_run_whose_optimiser_begins_empty_behind_the_reviser_s_and_goes_on(walked):
    assert optimisers(walked) == [(False, False), (True, False), (True, True)]
