"""The shipped recipe gates, walked with a scripted model.

Derived by hand from GATES (arXiv 2602.20574): the tutor is the model of the round, shown the document; the student is shown the question alone.
Several tutor answers to each question; where enough of them agree, those of the majority are learned, whole, behind the question alone,
from the weights of the round, held against nothing; else the question is dropped. Nothing of it sees the gold answer.

    question   8 tutor answers                                      rows
    one        5 blue, 3 red: the gate is open                      5
    two        3 a, 3 b, 2 c: tied, and under half                  none
    three      4 left, 2 right, 2 up: half of them, alone           4 (that half is enough is ours)
    four       6 wrong, 2 gold: nobody here knows                   6
    five       8 agree, one far longer than twice the mean          7 (the guard is ours)
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

SAYS = {
    "one": ["blue"] * 5 + ["red"] * 3,
    "two": ["a"] * 3 + ["b"] * 3 + ["c"] * 2,
    "three": ["left"] * 4 + ["right"] * 2 + ["up"] * 2,
    "four": ["wrong"] * 6 + ["gold"] * 2,
    "five": ["same"] * 8,
}
ROWS = {("one", "blue"): 5, ("three", "left"): 4, ("four", "wrong"): 6, ("five", "same"): 7}
QUESTIONS = {f"What of {name}?": name for name in SAYS}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    asked = next((name for question, name in QUESTIONS.items() if question in text), "")
    if not asked or "<passage>" not in text:
        return "Answer: no idea"
    padding = "on and on " * (20 if asked == "five" and time == 7 else 0)
    return f"It says so {padding}{time}.\nAnswer: {SAYS[asked][time]}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [
        {"prompt": question, "answer": "gold", "passage": f"The passage of {name}."} for question, name in QUESTIONS.items()
    ]
    return golden("gates", says, tmp_path_factory.mktemp("gates"), rows, overrides=["rounds=1"], take=5)


def test_the_tutor_is_the_model_of_the_round_with_the_document(walked):
    base = walked.weights()[0]
    assert walked.asked("sample") == {(base, 1.0, 1.0)}
    shown = Counter(messages[-1]["content"] for messages in walked.table(1, "sample", "samples")["teacher_messages"])
    assert set(shown.values()) == {8} and len(shown) == 5
    for text in shown:
        name = next(name for question, name in QUESTIONS.items() if text.endswith(question))
        assert f"<passage>\nThe passage of {name}.\n</passage>" in text and "gold" not in text


def test_answers_of_a_majority_are_learned_behind_the_question_alone(walked):
    [update] = walked.backend.updates
    rows = update.rows.select("messages", "chosen").iter_rows()
    found = Counter((QUESTIONS[messages[-1]["content"]], text.rpartition("Answer: ")[2]) for messages, text in rows)
    assert found == ROWS
    assert all(text.startswith("It says so") for text in update.rows["chosen"]) and set(update.rows["weight"]) == {1.0}


def test_training_starts_from_the_weights_of_the_round_and_the_anchor_asks_without_the_document(walked):
    [update] = walked.backend.updates
    assert (update.start, update.reference, update.spec.loss) == (walked.weights()[0], None, "sft")
    assert walked.asked("dev") == {(one, 0.0, 1.0) for one in walked.weights()} and "dev/match" in walked.metrics(1)
