"""The shipped recipe sdft, walked with a scripted model.

Derived by hand from Shenfeld et al. 2026 (arXiv 2601.19897), section 3: the student answers the bare question; the teacher is shown an expert's
answer as well, and reads the student's; the student minimises KL(student, teacher) at each token but the first few. The teacher's weights
are t <- (1 - a) t + a s, a moving average of the student's, which begins as the first model. Of 16 steps at a = 0.05 the share of the old
teacher is 0.95 ^ 16 = 0.440; here that is one round.

    round  asked (bare)  trained from  teacher                             teacher afterwards
    1      round 0       round 0       the base                            0.44 base + 0.56 round 1
    2      round 1       round 1       0.44 base + 0.56 round 1            0.44 of that + 0.56 round 2
"""

from __future__ import annotations

import pytest
from golden import Golden, golden, optimisers

from selfkd.recipe.load import load

PROBLEMS = {f"How much is {number} * 2?": (f"{number} * 2 = {2 * number}", str(2 * number)) for number in range(3)}


def says(messages: list[dict[str, str]], time: int) -> str:
    """Right for 0, wrong for 1, and without an end for 2."""
    text = messages[-1]["content"]
    return "It is 0." if " 0 *" in text else "It is 7." if " 1 *" in text else "Hm. " * 400


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": text, "solution": solution, "answer": answer} for text, (solution, answer) in PROBLEMS.items()]
    return golden("sdft", says, tmp_path_factory.mktemp("sdft"), rows, overrides=["rounds=2"], take=3, test=None)


def test_the_student_answers_the_bare_question_and_only_the_teacher_sees_the_expert_s_answer_to_it(walked):
    weights = walked.weights()
    assert walked.asked("sample") == {(weights[0], 1.0, 1.0), (weights[1], 1.0, 1.0)}
    for index in (1, 2):
        rows = walked.table(index, "build", "rows")
        assert sorted(messages[0]["content"] for messages in rows["messages"]) == sorted(PROBLEMS)
        assert rows["chosen_ended"].to_list().count(False) == 1
        for [question], [told] in rows.select("messages", "teacher_messages").iter_rows():
            solution, answer = PROBLEMS[question["content"]]
            assert told["content"].startswith(question["content"]) and f"{solution}\nThe result is {answer}." in told["content"]


def test_the_first_teacher_is_an_average_of_the_base_and_itself(walked):
    base = walked.run.loaded()["policy"].digest
    assert walked.weights()[0] == base
    made_of = walked.run.made(0)["average"].notes["average"]
    assert [(one["digest"], one["share"]) for one in made_of] == [(base, 1), (base, 1)]


def test_each_round_is_taught_by_the_average_that_the_last_one_left_and_only_the_student_is_sampled(walked):
    students, teachers = walked.weights(), walked.weights("teacher")
    assert walked.pairings() == [(students[0], teachers[0]), (students[1], teachers[1])]
    assert len({*students, *teachers}) == 6
    assert {one.model for one in walked.backend.asked} == set(students)


@pytest.mark.parametrize("index", [1, 2])
def test_the_teacher_goes_0_56_of_the_way_to_the_student_in_a_round(walked, index):
    made_of = walked.run.made(index)["follow"].notes["average"]
    assert [(one["digest"], one["share"]) for one in made_of] == [
        (walked.weights("teacher")[index - 1], 0.44),
        (walked.weights()[index], 0.56),
    ]
    assert pytest.approx(0.44, abs=0.001) == 0.95**16
    trl = walked.backend.updates[index - 1].spec.trl
    assert load("sdft").take == 16 * trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"]


def test_reverse_kl_over_the_whole_vocabulary_without_the_first_tokens_and_one_optimiser(walked):
    for one in walked.backend.updates:
        how = one.spec.divergence
        assert (one.spec.loss, how.kind, how.top_k, how.clip, how.clip_entry) == ("kd", "reverse", 0, 0, 0) and how.skip > 0
    assert optimisers(walked) == [(True, False), (True, True)]
