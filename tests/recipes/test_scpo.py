"""The shipped recipe scpo, walked with a scripted model.

Derived by hand from Prasad et al. 2024 (arXiv 2411.04109), section 2 and 3: 8 answers to each question, without labels, by the model of the round (T
0.7, top-p 0.9); a vote is the number of answers with one result; one of the most voted answers is chosen over one of the least voted, where
the chosen one has at least half of the votes, in the second round 0.7 of them; the pair weighs (votes of chosen - votes of rejected) / 8, on both
terms of DPO (beta 0.5) + 1 * likelihood; from the model of the round, held against it, on this round's pairs; lr 5e-6, 10 epochs, batch 16.

    question   8 answers in each round             round 1                      round 2 (0.7)
    one        6 say 2, 2 say 3                    2 over 3, weight 4/8         the same: 6/8 is enough
    two        4 say 5, 3 say 6, 1 says 7          5 over 7, weight 3/8         none: 4/8 is not enough
    three      3 say 1, 3 say 2, 2 say 3           none: 3/8                    none
    four       8 say 4                             none: nothing to lose        none
    five       7 say 9, 1 gives no result          none: no vote is no answer   none
    six        7 say 5, at length, 1 says 6        none: the guard is ours      none
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

SAYS = {
    "one": "2" * 6 + "3" * 2,
    "two": "5" * 4 + "6" * 3 + "7",
    "three": "11122233",
    "four": "4" * 8,
    "five": "9" * 7 + "-",
    "six": "5" * 7 + "6",
}


def says(messages: list[dict[str, str]], time: int) -> str:
    asked = messages[-1]["content"]
    if asked not in SAYS:
        return "#### 7"
    result = SAYS[asked][time % 8]
    padding = "on and on " * (9 if asked == "six" and result == "5" else 0)
    return "I cannot say." if result == "-" else f"Answer {'abcdefgh'[time % 8]} {padding}#### {result}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    return golden("scpo", says, tmp_path_factory.mktemp("scpo"), [{"prompt": name} for name in SAYS], test=None)


def test_the_model_of_the_round_answers_8_times(walked):
    first, second, _ = walked.weights()
    assert walked.asked("sample") == {(first, 0.7, 0.9), (second, 0.7, 0.9)}
    assert [walked.table(index, "sample", "samples").height for index in (1, 2)] == [48, 48]


def test_one_of_the_most_voted_wins_against_one_of_the_least_voted_where_votes_back_it(walked):
    columns = ("messages", "chosen", "rejected", "weight")
    found = [
        {
            messages[-1]["content"]: (chosen[-1], rejected[-1], weight)
            for messages, chosen, rejected, weight in update.rows.select(columns).iter_rows()
        }
        for update in walked.backend.updates
    ]
    assert found == [{"one": ("2", "3", 4 / 8), "two": ("5", "7", 3 / 8)}, {"one": ("2", "3", 4 / 8)}]
    assert [update.rows.height for update in walked.backend.updates] == [2, 1]


def test_dpo_with_likelihood_goes_on_from_the_model_of_the_round_which_is_its_reference(walked):
    first, second, _ = walked.weights()
    assert [(update.start, update.reference) for update in walked.backend.updates] == [(first, first), (second, second)]
    for spec in (update.spec for update in walked.backend.updates):
        assert (spec.loss, spec.beta, spec.nll) == ("dpo", 0.5, 1.0)
        words = ("learning_rate", "lr_scheduler_type", "num_train_epochs")
        assert [spec.trl[word] for word in words] == [5e-6, "cosine", 10]
        assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 16


def test_the_anchor_is_measured_against_gold_answers(walked):
    assert walked.asked("dev") == {(one, 0.0, 1.0) for one in walked.weights()} and "dev/correct" in walked.metrics(1)
