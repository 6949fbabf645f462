"""The shipped recipe rest, walked with a scripted model.

Derived by hand from Gulcehre et al. 2023 (arXiv 2308.08998), sections 3 and 3.1: Grow samples from the policy of the round; each Improve trains the
latest policy on samples of this Grow whose mark is at least a floor, which rises, with the supervised data mixed in; the learning rate falls; the
next Grow samples from what the last Improve left, and older samples are not used again.

The reference of the one text is "abc". chrF by hand: "abc" is 1; "ab" has precision 1 and recall (2/3 + 1/2) / 2 = 0.583, so 5 * 0.583 / 4.583 = 0.636;
"xyz" shares no letter: 0. Eight answers: "abc" twice, "ab" three times, "xyz" three times.

    Improve   floor   rows
    1         0.4     the human one, 2 + 3
    2         0.5     the human one, 2 + 3
    3         0.6     the human one, 2 + 3
    4         0.7     the human one, 2
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

ANSWERS = ("abc",) * 2 + ("ab",) * 3 + ("xyz",) * 3


def says(messages: list[dict[str, str]], time: int) -> str:
    return ANSWERS[time % 8] if "Text" in messages[-1]["content"] else "nothing"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows, dev = [{"prompt": "Text", "answer": "abc"}], [{"prompt": "Other", "answer": "def"}]
    return golden("rest", says, tmp_path_factory.mktemp("rest"), rows, dev, test=None)


def test_each_grow_samples_from_what_the_last_improve_left(walked):
    first, second, _ = walked.weights()
    assert walked.asked("own") == {(first, 0.8, 1.0), (second, 0.8, 1.0)}
    assert walked.table(1, "sample", "samples").height == 8


def test_answers_are_marked_by_chrf(walked):
    found = dict(walked.answers(1, "own").select("text", "quality").iter_rows())
    assert found == pytest.approx({"abc": 1.0, "ab": 0.63636, "xyz": 0.0}, abs=1e-5)


def test_each_improve_keeps_what_is_above_a_rising_floor_and_the_human_answer_and_goes_on_from_the_latest(walked):
    rows = [Counter(update.rows["chosen"]) for update in walked.backend.updates]
    assert rows == 2 * [*3 * [{"abc": 3, "ab": 3}], {"abc": 3}]
    starts = [update.start for update in walked.backend.updates]
    assert len(set(starts)) == 8 and [starts[0], starts[4]] == walked.weights()[:2]
    assert all(update.reference is None and update.spec.loss == "sft" for update in walked.backend.updates)


def test_the_rate_falls_from_improve_to_improve(walked):
    rates = [update.spec.trl["learning_rate"] for update in walked.backend.updates]
    assert rates == 2 * [1e-5, 5e-6, 2.5e-6, 1e-6]
