"""The shipped recipe self-rewarding, walked with a scripted model: who is asked what, which pairs come of it, and what they are learned from.

Derived by hand from Yuan et al. 2024 (arXiv 2401.10020), section 2: the model of the round answers each new prompt four times and marks
each answer three times; the marks of an answer are averaged; the best and the worst answer of a prompt make a pair, and no pair where
they have one mark; DPO goes on from the model of the round, which is also its reference, on the pairs of this round only.

    prompt  answers and their three marks                            mean               pair
    one     A 3 3 3   B 5 4 -   C 1 2 3   D 0 0 1 (- is unreadable)   3  4.5  2  0.33    B over D
    two     all four: 4 4 4                                          4                  none: a tie
    three   E 5 5 5, three times as long as F 0 0 0; G, H 2 2 2      5  0  2  2         none: the guard on length, which is ours
    four    I 2 2 2   J 4 4 4   K 3 3 3   L 1 1 1                    2  4  3  1         J over L
"""

from __future__ import annotations

from collections import Counter

import polars as pl
import pytest
from golden import Golden, golden

MARKS: dict[str, dict[str, tuple[str, str, str]]] = {
    "What is one?": {
        "Answer A.": ("3", "3", "3"),
        "Answer B.": ("5", "4", "none"),
        "Answer C.": ("1", "2", "3"),
        "Answer D.": ("0", "0", "1"),
    },
    "What is two?": {f"Answer {letter}": ("4", "4", "4") for letter in "MNOP"},
    "What is three?": {
        "Answer E, " * 3: ("5", "5", "5"),
        "Answer F.": ("0", "0", "0"),
        "Answer G.": ("2",) * 3,
        "Answer H.": ("2",) * 3,
    },
    "What is four?": {f"Answer {letter}!": (mark,) * 3 for letter, mark in zip("IJKL", "2431", strict=True)},
}


def says(messages: list[dict[str, str]], time: int) -> str:
    """The k-th answer of a prompt and the k-th mark of an answer, as the table has them."""
    text = messages[-1]["content"]
    if "<answer>" not in text:
        answers = list(MARKS.get(text, {"7": ()}))
        return answers[time % len(answers)]
    shown = text.split("<answer>\n")[1].split("\n</answer>")[0]
    marks = next((marks[shown] for marks in MARKS.values() if shown in marks), ("0",))
    mark = marks[time % len(marks)]
    return "I cannot say." if mark == "none" else f"It has its reasons, 2 of them.\nScore: {mark}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    return golden(
        "self-rewarding", says, tmp_path_factory.mktemp("self-rewarding"), [{"prompt": prompt} for prompt in MARKS], take=2
    )


def test_the_model_of_the_round_answers_and_judges_and_the_anchor_is_measured_greedily(walked):
    weights = walked.weights()
    assert len(set(weights)) == 3
    for stream in ("sample", "judgments", "judgments-canaries"):
        assert walked.asked(stream) == {(weights[index], 0.7, 0.9) for index in (0, 1)}
    assert walked.asked("dev") == {(digest, 0.0, 1.0) for digest in weights}


@pytest.mark.parametrize(
    ("index", "prompts"), [(1, ["What is one?", "What is two?"]), (2, ["What is three?", "What is four?"])]
)
def test_each_round_draws_new_prompts_answers_them_four_times_and_marks_each_answer_three_times(walked, index, prompts):
    samples, judgments = walked.table(index, "sample", "samples"), walked.table(index, "judge", "samples")
    asked = Counter(messages[-1]["content"] for messages in samples["teacher_messages"])
    assert asked == dict.fromkeys(prompts, 4)
    real = judgments.filter(pl.col("stream") == "judgments")
    assert Counter(real["parents"].list.first()) == dict.fromkeys(samples["id"], 3)
    assert judgments.height - real.height == 2 * 3  # canaries, on two prompts
    for messages, [parent] in real.select("teacher_messages", "parents").iter_rows():
        [text] = samples.filter(pl.col("id") == parent)["text"]
        shown = messages[-1]["content"]
        assert any(f"<question>\n{prompt}\n" in shown for prompt in prompts) and f"<answer>\n{text}\n</answer>" in shown
        assert shown.endswith("Score: <total points>")


def test_marks_are_averaged_and_one_that_cannot_be_read_counts_neither_way(walked):
    for index, prompts in ((1, ("What is one?", "What is two?")), (2, ("What is three?", "What is four?"))):
        found = dict(walked.answers(index).select("text", "mark").iter_rows())
        for prompt in prompts:
            for text, marks in MARKS[prompt].items():
                read = [float(mark) for mark in marks if mark != "none"]
                assert found[text] == pytest.approx(sum(read) / len(read))
    assert walked.metrics(1)["judge/unread"] == 1 / 24 and walked.metrics(2)["judge/unread"] == 0.0
    assert walked.metrics(1)["judge/at_highest"] == 1 / 23


def test_the_best_answer_wins_against_the_worst_and_ties_make_no_pair(walked):
    pairs = {index: walked.table(index, "build", "rows") for index in (1, 2)}
    found = {index: list(rows.select("kind", "chosen", "rejected", "weight").iter_rows()) for index, rows in pairs.items()}
    assert found == {1: [("pair", "Answer B.", "Answer D.", 1.0)], 2: [("pair", "Answer J!", "Answer L!", 1.0)]}
    assert [messages for rows in pairs.values() for messages in rows["messages"].to_list()] == [
        [{"role": "user", "content": "What is one?"}],
        [{"role": "user", "content": "What is four?"}],
    ]


def test_dpo_goes_on_from_the_model_of_the_round_which_is_its_reference(walked):
    weights, updates = walked.weights(), walked.backend.updates
    assert [(update.start, update.reference) for update in updates] == [(weights[0], weights[0]), (weights[1], weights[1])]
    assert [update.rows["chosen"].to_list() for update in updates] == [
        ["Answer B."],
        ["Answer J!"],
    ]  # the rows of this round only
    for spec in (update.spec for update in updates):
        assert (spec.loss, spec.beta, spec.nll) == ("dpo", 0.1, 0.0)
        assert (spec.trl["learning_rate"], spec.trl["lr_scheduler_kwargs"]) == (1e-6, {"min_lr": 1e-7})
        assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 16
