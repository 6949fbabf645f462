"""The shipped recipe easy-to-hard, walked with a scripted model.

Derived by hand from Lee et al. 2025 (arXiv 2502.01612): a model that knows short sums labels sums of one digit more, greedily, once each; what is
shorter than a sum of that length can be is dropped, and what is wrong is not; the model goes on learning from the easy sums and from all that was
kept in this round and those before.

    round  sum of       its label          kept
    0      1 to 3 digits: 240 easy ones, with their answers
    1      1000+1000=   20000, right       yes
           2000+1000=   30001, wrong       yes: nobody checks
           9000+1000=   0001, too short    no
    2      10000+10000= 200000, right      yes, beside the two of round 1
           20000+10000= 300001, wrong      yes
           90000+10000= 00001, too short   no
"""

from __future__ import annotations

import pytest
from golden import Golden, golden, optimisers

SUMS = {
    **{"1000+1000=": "20000", "2000+1000=": "30001", "9000+1000=": "0001"},
    **{"10000+10000=": "200000", "20000+10000=": "300001", "90000+10000=": "00001"},
}
KEPT = (["20000", "30001"], ["20000", "200000", "300001", "30001"])


def says(messages: list[dict[str, str]], time: int) -> str:
    return SUMS.get(messages[-1]["content"], "0")


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": text, "answer": "0", "digits": len(text.split("+")[0])} for text in SUMS]
    return golden("easy-to-hard", says, tmp_path_factory.mktemp("easy"), rows, overrides=["rounds=2"], take=3)


def test_the_model_of_the_round_labels_sums_of_one_digit_more_once_and_greedily(walked):
    first, second, _ = walked.weights()
    assert walked.asked("own") == {(first, 0.0, 1.0), (second, 0.0, 1.0)}
    for index, digits in ((1, 4), (2, 5)):
        shown = [messages[-1]["content"] for messages in walked.table(index, "sample", "samples")["teacher_messages"]]
        assert sorted(shown) == sorted(text for text in SUMS if text.index("+") == digits)


def test_labels_that_are_long_enough_are_learned_in_all_later_rounds_beside_the_easy_sums(walked):
    warm, *updates = walked.backend.updates
    easy = sorted(warm.rows["chosen"])
    assert len(easy) == 240 and {text.index("+") for [text] in shown(warm)} == {1, 2, 3}
    for update, kept in zip(updates, KEPT, strict=True):
        own = [(text, label) for [text], label in zip(shown(update), update.rows["chosen"]) if text in SUMS]
        assert sorted(label for _, label in own) == kept and all(SUMS[text] == label for text, label in own)
        assert update.rows.height == 240 + len(kept)


def test_it_goes_on_from_the_model_of_the_last_round(walked):
    first, second, third = walked.weights()
    warm, *updates = walked.backend.updates
    assert [(one.start, one.reference) for one in updates] == [(first, None), (second, None)] and warm.start != first
    assert len({first, second, third}) == 3 and {one.spec.loss for one in walked.backend.updates} == {"sft"}


def test_the_optimiser_that_learned_the_easy_sums_goes_on_through_all_rounds(walked):
    assert optimisers(walked) == [(True, False), (True, True), (True, True)]


def shown(update) -> list[list[str]]:
    return [[message["content"] for message in messages] for messages in update.rows["messages"]]
