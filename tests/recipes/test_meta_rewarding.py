"""The shipped recipe meta-rewarding, walked with a scripted model.

Derived by hand from Wu et al. 2024 (arXiv 2407.19594), section 2: 7 answers, 11 judgments of each, averaged over those that can be read. Of answers
with a mark in [(1 - rho) max + rho min, max] the shortest wins; of those in the bottom tier, [min, (1 - rho) min + rho max], the longest loses.
rho is 0, 0.32, 0.32, 0.4. The judgments of the answer whose marks vary most are compared two by two in both orders, which makes 90 of the ten that can be read; best against
worst by Elo, and the judge learns what it was shown. That is done in rounds 1 and 2; then the actor learns alone. DPO from the model of the
round, which is its reference, on this round's rows.

    answer   A    B    C                D    E    F    G
    marks    5*   5    3 and 5*, mean 4 3    1    0    0     * one judgment of A and one of C cannot be read, and are not compared
    letters  40   30   20               10   50   25   35

    rho   0                        0.32                             0.4
    high  mark 5: A, B; B wins     at least 3.4: A, B, C; C wins    at least 3: A, B, C, D; D wins
    low   mark 0: F, G; G loses    at most 1.6: E, F, G; E loses    at most 2: E, F, G; E loses
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from golden import Golden, between, golden

PROMPTS = [f"What is {word}?" for word in ("one", "two", "three", "four")]
MARKS = {"A": "5", "B": "5", "C": "-3535353535", "D": "3", "E": "1", "F": "0", "G": "0"}
LETTERS = dict(zip("ABCDEFG", (40, 30, 20, 10, 50, 25, 35), strict=True))
WINNERS, LOSERS = "BCCD", "GEEE"  # by round
QUALITY = {
    time: (7 * time) % 11 for time in range(11)
}  # of the judgments, as the meta-judge sees them: the best is 3, the worst 8, as 0 cannot be read


def answer(letter: str) -> str:
    return f"Say {letter}".ljust(LETTERS[letter], ".")


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    if "<judgment A>" in text:
        first, second = (
            QUALITY[int(re.search(r"Reason (\d+)", between(text, f"<judgment {side}>", f"</judgment {side}>"))[1])]
            if "Reason" in between(text, f"<judgment {side}>", f"</judgment {side}>")
            else -1
            for side in "AB"
        )
        return "[[A]]" if first > second else "[[B]]"
    if "<answer>" in text:
        letter = between(text, "<answer>", "</answer>").removeprefix("Say ")[:1]
        marks = MARKS.get(letter, "0")
        return (
            "I cannot say." if (letter, time) in (("A", 4), ("C", 0)) else f"Reason {time}.\nScore: {marks[time % len(marks)]}"
        )
    return answer("ABCDEFG"[time]) if text in PROMPTS else "7"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    train = [{"prompt": prompt} for prompt in PROMPTS]
    return golden("meta-rewarding", says, tmp_path_factory.mktemp("meta-rewarding"), train, take=1)


def real(walked: Golden, index: int, step: str, stream: str):
    table = walked.table(index, step, "samples")
    return table.filter(table["stream"] == stream)


def test_the_model_of_the_round_answers_judges_and_judges_its_judgments(walked):
    weights = walked.weights()
    assert walked.rounds == 4 and len(set(weights)) == 5
    for stream in ("sample", "judgments"):
        assert walked.asked(stream) == {(digest, 0.8, 0.95) for digest in weights[:4]}
    assert walked.asked("meta-judgments") == {(digest, 0.8, 0.95) for digest in weights[:2]}


@pytest.mark.parametrize("index", [1, 2, 3, 4])
def test_seven_answers_to_a_new_prompt_have_eleven_judgments_each_and_the_mean_of_those_that_can_be_read(walked, index):
    assert {m[-1]["content"] for m in walked.table(index, "sample", "samples")["teacher_messages"]} == {PROMPTS[index - 1]}
    judged = Counter(real(walked, index, "judge", "judgments")["parents"].list.first())
    assert sorted(judged.values()) == [11] * 7
    marks = dict(walked.answers(index).select("text", "mark").iter_rows())
    assert {text[4]: mark for text, mark in marks.items()} == {"A": 5, "B": 5, "C": 4, "D": 3, "E": 1, "F": 0, "G": 0}
    assert walked.metrics(index)["judge/unread"] == pytest.approx(2 / 77)


@pytest.mark.parametrize("index", [1, 2, 3, 4])
def test_of_answers_marked_alike_the_short_one_wins_and_the_long_one_loses(walked, index):
    assert walked.pairs(index, "actor") == [(answer(WINNERS[index - 1]), answer(LOSERS[index - 1]))]
    assert walked.table(index, "actor", "rows")["messages"].to_list() == [[{"role": "user", "content": PROMPTS[index - 1]}]]


@pytest.mark.parametrize("index", [1, 2])
def test_the_judgments_that_vary_most_are_compared_in_both_orders_and_the_judge_learns_what_it_was_shown(walked, index):
    compared = real(walked, index, "meta-judge", "meta-judgments")
    assert len(set(map(tuple, compared["parents"].to_list()))) == compared.height == 10 * 9
    assert all(f"<answer>\n{answer('C')}\n</answer>" in m[-1]["content"] for m in compared["teacher_messages"])
    rows = walked.table(index, "judge-pairs", "rows")
    assert [(one.split(".")[0], other.split(".")[0]) for one, other in walked.pairs(index, "judge-pairs")] == [
        ("Reason 3", "Reason 8")
    ]
    [messages] = rows["messages"].to_list()
    assert messages[-1]["content"].startswith("You will read a question") and f"\n{answer('C')}\n" in messages[-1]["content"]


def test_in_rounds_three_and_four_the_actor_learns_alone(walked):
    for index in (3, 4):
        assert walked.table(index, "judge-pairs", "rows").height == 0
    assert [update.rows.height for update in walked.backend.updates] == [2, 2, 1, 1]


def test_dpo_goes_on_from_the_model_of_the_round_which_is_its_reference(walked):
    weights = walked.weights()
    assert walked.pairings() == [(digest, digest) for digest in weights[:4]]
    for spec in (update.spec for update in walked.backend.updates):
        assert (spec.loss, spec.beta) == ("dpo", 0.1)
        words = ("learning_rate", "lr_scheduler_type", "num_train_epochs")
        assert [spec.trl[word] for word in words] == [5e-6, "cosine", 10]
        assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 32


def test_the_anchor_is_measured_greedily(walked):
    assert walked.asked("dev") == {(digest, 0.0, 1.0) for digest in walked.weights()}
