"""The shipped recipe crisp, walked with a scripted model.

Derived by hand from Sang et al. 2026 (arXiv 2603.05433), section 3, and the released code: the student answers the bare problem once at T 1; the
teacher is the student as it was at the last refresh, told to be concise, and reads the student's own answer; the student minimises
KL(student, teacher) over the whole vocabulary at each token of all its answers, right, wrong and cut. The teacher is refreshed every M = 50
steps of 32 answers, and the optimiser goes on; here a refresh begins a round, so that the teacher is the model that entered it.

    round  asked (bare)  trained from  teacher (told)   optimiser
    1      round 0       round 0       round 0          empty, for nobody trained the base
    2      round 1       round 1       round 1          that of round 1
"""

from __future__ import annotations

import pytest
from golden import Golden, golden, optimisers

from selfkd.recipe.load import load

SAYS = {
    "one": "2 + 2 = 4.\n#### 4",
    "two": "2 + 2 = 5.\n#### 5",
    "three": "First 2 + 2 = 4, and so it is 4.\n#### 4",
    "four": "Hm. " * 400,
}
ROUNDS = {1: {"one", "two"}, 2: {"three", "four"}}


def says(messages: list[dict[str, str]], time: int) -> str:
    return SAYS.get(messages[-1]["content"], "#### 7")


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": name} for name in SAYS]
    return golden("crisp", says, tmp_path_factory.mktemp("crisp"), rows, take=2, test=None)


def test_the_model_of_the_round_answers_the_bare_problem_once(walked):
    first, second, _ = walked.weights()
    assert walked.asked("sample") == {(first, 1.0, 1.0), (second, 1.0, 1.0)}
    for index, asked in ROUNDS.items():
        shown = [messages[-1]["content"] for messages in walked.table(index, "sample", "samples")["teacher_messages"]]
        assert set(shown) == asked and len(shown) == 2


def test_only_the_teacher_is_told_to_be_concise_and_every_answer_is_a_row(walked):
    for index, asked in ROUNDS.items():
        rows = walked.table(index, "build", "rows")
        found = {
            student[0]["content"]: (told[0]["content"], text)
            for student, told, text in rows.select("messages", "teacher_messages", "chosen").iter_rows()
        }
        assert set(found) == asked
        assert all(told.startswith(f"{name}\nBe concise: ") for name, (told, _) in found.items())
        assert all(SAYS[name].startswith(text) for name, (_, text) in found.items())  # nobody checks, and one was cut
    assert walked.table(2, "build", "rows")["chosen_ended"].to_list().count(False) == 1


def test_the_model_that_enters_a_round_teaches_it_by_reverse_kl_over_the_whole_vocabulary(walked):
    first, second, _ = walked.weights()
    assert walked.pairings() == [(first, first), (second, second)]
    for one in walked.backend.updates:
        how = one.spec.divergence
        assert (one.spec.loss, how.kind, how.top_k, how.clip, how.clip_entry, how.skip, how.first) == (
            "kd",
            "reverse",
            0,
            0,
            0,
            0,
            0,
        )
        trl = one.spec.trl
        assert (trl["learning_rate"], trl.get("lr_scheduler_type", "constant")) == (1e-6, "constant")
        assert trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"] == 32


def test_a_round_is_the_fifty_steps_between_two_refreshes(walked):
    assert load("crisp").take == 50 * 32


def test_the_optimiser_goes_on_from_round_to_round(walked):
    assert optimisers(walked) == [(True, False), (True, True)]


def test_length_and_the_anchor_are_measured_untold_and_a_round_that_loses_them_is_not_kept(walked):
    assert walked.asked("dev") == {(one, 0.0, 1.0) for one in walked.weights()}
    assert {"dev/correct", "dev/chars", "dev/tokens"} <= set(walked.metrics(1))
    assert walked.run.recipe.keep_if == "dev_correct >= prev_dev_correct - 0.02 AND dev_chars >= 0.25 * prev_dev_chars"
