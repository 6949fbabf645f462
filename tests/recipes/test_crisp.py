"""The shipped recipe crisp, walked with a scripted model.

Derived by hand from CRISP (arXiv 2603.05433) in the form of rows that its head names: the teacher is the model of the round, told to be concise; what
it writes is learned behind the question as it stands, from the model of the round, with no label and no checker; again in each round.

    question   round   told answer            row
    one        1       a right one, short     as it is, behind the untold question
    two        1       a wrong one, short     as it is: nobody checks
    three      2       as one                 as it is
    four       2       a single letter        none: under a quarter of the mean length (the guard is ours)
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

SAYS = {
    "one": "2 + 2 = 4.\n#### 4",
    "two": "2 + 2 = 5.\n#### 5",
    "three": "First 2 + 2 = 4, and so it is 4.\n#### 4",
    "four": "4",
}


def says(messages: list[dict[str, str]], time: int) -> str:
    asked = messages[-1]["content"].partition("\n")[0]
    return SAYS.get(asked, "#### 7")


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": name} for name in SAYS]
    return golden("crisp", says, tmp_path_factory.mktemp("crisp"), rows, overrides=["rounds=2"], take=2, test=None)


def test_the_teacher_is_the_model_of_the_round_told_to_be_concise(walked):
    first, second, _ = walked.weights()
    assert walked.asked("sample") == {(first, 1.0, 1.0), (second, 1.0, 1.0)}
    for index, asked in ((1, {"one", "two"}), (2, {"three", "four"})):
        shown = [messages[-1]["content"] for messages in walked.table(index, "sample", "samples")["teacher_messages"]]
        assert {text.partition("\n")[0] for text in shown} == asked and all("Be concise" in text for text in shown)


def test_what_it_writes_is_learned_untold_from_the_model_of_the_round(walked):
    first, second, _ = walked.weights()
    rows = [
        {messages[-1]["content"]: text for messages, text in update.rows.select("messages", "chosen").iter_rows()}
        for update in walked.backend.updates
    ]
    assert rows == [{name: SAYS[name] for name in ("one", "two")}, {"three": SAYS["three"]}]
    assert [(update.start, update.reference) for update in walked.backend.updates] == [(first, None), (second, None)]


def test_length_and_the_anchor_are_measured_untold_and_a_round_that_loses_the_anchor_is_not_kept(walked):
    assert walked.asked("dev") == {(one, 0.0, 1.0) for one in walked.weights()}
    assert {"dev/correct", "dev/chars", "dev/tokens"} <= set(walked.metrics(1))
    assert walked.run.recipe.keep_if == "dev_correct >= prev_dev_correct - 0.02"
