"""The shipped recipe opsd, walked with a scripted model.

Derived by hand from Zhao et al. 2026 (arXiv 2601.18734), section 3, and the released scripts: the student answers the bare problem once at
T 1.1, top-p 0.95, top-k 20; the teacher is the first model, which does not change, and sees problem, reference solution and answer; both
read the student's own answer, and the student minimises forward KL with each entry limited to 0.05, on answers right, wrong and cut.

    round  asked (bare)  trained from  teacher
    1      round 0       round 0       round 0
    2      round 1       round 1       round 0
"""

from __future__ import annotations

import pytest
from golden import Golden, golden, optimisers

PROBLEMS = {f"How much is {number} * 2?": (f"{number} * 2 = {2 * number}", str(2 * number)) for number in range(3)}


def says(messages: list[dict[str, str]], time: int) -> str:
    """Right for 0, wrong for 1, and without an end for 2."""
    text = messages[-1]["content"]
    return "It is 0." if " 0 *" in text else "It is 7." if " 1 *" in text else "Hm. " * 400


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": text, "solution": solution, "answer": answer} for text, (solution, answer) in PROBLEMS.items()]
    return golden("opsd", says, tmp_path_factory.mktemp("opsd"), rows, overrides=["rounds=2"], take=3, test=None)


def test_the_student_of_the_round_answers_the_bare_problem_once(walked):
    weights = walked.weights()
    assert len(set(weights)) == 3
    assert walked.asked("sample") == {(weights[0], 1.1, 0.95), (weights[1], 1.1, 0.95)}
    assert {one.sampling.top_k for one in walked.backend.asked if one.stream == "sample"} == {20}
    for index in (1, 2):
        samples = walked.table(index, "sample", "samples")
        assert sorted(messages[0]["content"] for messages in samples["teacher_messages"]) == sorted(PROBLEMS)


def test_what_was_sampled_keeps_its_log_probability_for_staleness(walked):
    assert {one.sampling.extra["logprobs"] for one in walked.backend.asked if one.stream == "sample"} == {0}
    assert all(walked.table(index, "build", "rows")["chosen_logprob"].null_count() == 0 for index in (1, 2))


def test_every_answer_is_a_row_and_only_the_teacher_sees_the_solution_of_its_own_problem(walked):
    for index in (1, 2):
        rows = walked.table(index, "build", "rows")
        assert rows.height == 3 and rows["chosen_ended"].to_list().count(False) == 1
        for student, teacher in rows.select("messages", "teacher_messages").iter_rows():
            [problem], [told] = student, teacher
            solution, answer = PROBLEMS[problem["content"]]
            assert told["content"].startswith(problem["content"]) and f"{solution}\nThe result is {answer}." in told["content"]


def test_the_first_model_teaches_every_round_by_forward_kl_with_limited_entries(walked):
    weights, updates = walked.weights(), walked.backend.updates
    assert [(one.start, one.reference) for one in updates] == [(weights[0], weights[0]), (weights[1], weights[0])]
    for one in updates:
        how = one.spec.divergence
        assert (one.spec.loss, how.kind, how.clip_entry, how.clip, how.top_k) == ("kd", "forward", 0.05, 0.0, 0)


def test_all_rounds_are_one_run_whose_optimiser_goes_on(walked):
    assert optimisers(walked) == [(True, False), (True, True)]
