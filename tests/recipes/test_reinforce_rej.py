"""The shipped recipe reinforce-rej, walked with a scripted model.

Derived by hand from Xiong et al. 2025 (arXiv 2504.11343): four answers to each prompt; prompts whose answers are all right or all wrong are left
out; the others learn all their answers, with reward 1 or -1 and nothing taken off, by the ratio to the model that answered, clipped at 1 +- 0.2.

    prompt  4 answers                             rows, with rewards
    a       all right                             none: always solved
    b       all wrong                             none: never solved
    c       1 right, 3 wrong                      1 at +1, 3 at -1
    d       3 right, 1 wrong                      3 at +1, 1 at -1
    e       2 right, 1 right but cut, 1 wrong     2 at +1, 2 at -1: a cut one counts as wrong (ours)
    f       3 right, 1 right but cut              3 at +1, 1 at -1
    g       1 right but cut, 3 wrong              none: never solved
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

RIGHT = {"a": 4, "b": 0, "c": 1, "d": 3, "e": 3, "f": 4, "g": 1}
CUT = "efg"  # whose first answer does not end
LEARNED = {"c": (1, 3), "d": (3, 1), "e": (2, 2), "f": (3, 1)}


def says(messages: list[dict[str, str]], time: int) -> str:
    letter = messages[-1]["content"][8:-1]
    result = 7 if time % 4 < RIGHT.get(letter, 0) else 8
    return f"Try {time}.\n#### {result}" + "\nand so on" * (99 if letter in CUT and letter and time % 4 == 0 else 0)


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": f"What is {letter}?", "answer": "7"} for letter in RIGHT]
    return golden("reinforce-rej", says, tmp_path_factory.mktemp("rej"), rows, overrides=["rounds=2"], take=7, test=None)


def test_the_model_of_the_round_answers_four_times(walked):
    first, second, _ = walked.weights()
    assert walked.asked("sample") == {(first, 1.0, 1.0), (second, 1.0, 1.0)}
    assert [walked.table(index, "sample", "samples").height for index in (1, 2)] == [28, 28]


def test_what_is_always_and_what_is_never_solved_is_left_out_and_a_cut_answer_counts_as_wrong(walked):
    for update in walked.backend.updates:
        rows = update.rows.select("messages", "label", "chosen").iter_rows()
        found = Counter((messages[-1]["content"][8:-1], label) for messages, label, _ in rows)
        assert found == {(name, label): count for name, counts in LEARNED.items() for label, count in zip((1.0, -1.0), counts)}
        right = [text for label, text in update.rows.select("label", "chosen").iter_rows() if label == 1.0]
        assert all(text.endswith("#### 7") for text in right)
        assert set(update.rows["weight"]) == {1.0}  # no baseline, no normalisation


def test_the_ratio_is_to_the_model_that_answered_in_one_run_of_the_optimiser(walked):
    first, second, _ = walked.weights()
    assert walked.pairings() == [(first, first), (second, second)]
    for spec in (update.spec for update in walked.backend.updates):
        assert (spec.function.name, spec.rows, dict(spec.function.params)) == ("reinforce", "label", {"clip": 0.2})
        assert spec.keeps_state
