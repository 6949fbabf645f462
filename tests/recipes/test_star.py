"""The shipped recipes star and star-no-rationalisation, walked with a scripted model.

Derived by hand from Zelikman et al. 2022 (arXiv 2203.14465), section 3.1 and 3.2: each problem is tried once behind worked examples, nearly
greedily; one that came out wrong is tried once more with its answer told, by the same model; what is right is learned behind the bare question,
by the base model, from this round's rationales only; the number of steps grows by a fifth each round, from 40.

    problem   first try, round 1   told the answer   rows of round 1         round 2 (all from the base again)
    2 + 2     4, right             not asked         its rationale           4, right: its rationale
    3 + 3     5, wrong             6, right          the told one, as untold 6, right: its own rationale, not the told one of round 1
    4 + 4     9, wrong             9, wrong          none                    9, wrong, told 8: the told one
    5 + 5     11, wrong            10, but cut       none                    as before: none

Without rationalisation nobody is told: only 2 + 2 is learned in round 1, and 2 + 2 and 3 + 3 in round 2.
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

from selfkd.recipe.load import load

SUMS = {"What is 2 + 2?": "4", "What is 3 + 3?": "6", "What is 4 + 4?": "8", "What is 5 + 5?": "10"}
TRIES = {"2 + 2": ("4", "4"), "3 + 3": ("5", "6"), "4 + 4": ("9", "9"), "5 + 5": ("11", "11")}
TOLD = {"3 + 3": ("6", "6"), "4 + 4": ("9", "8"), "5 + 5": ("10", "10")}
TOO_LONG = "so on " * 60


def says(messages: list[dict[str, str]], time: int) -> str:
    """The answer of this round: each prompt is shown once a round in each form."""
    text = messages[-1]["content"]
    told = "The right answer is given in brackets" in text
    asked = next((sum_ for sum_ in TRIES if f"What is {sum_}?" in text), "")
    if not asked:
        return "#### 7"
    result = (TOLD if told else TRIES)[asked][time]
    return f"{'Told' if told else 'Tried'} {asked}: {TOO_LONG if told and asked == '5 + 5' else ''}#### {result}"


def walk(name: str, folder) -> Golden:
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in SUMS.items()]
    return golden(name, says, folder, rows, overrides=["rounds=2"], test=None)


@pytest.fixture(scope="module")
def star(tmp_path_factory) -> Golden:
    return walk("star", tmp_path_factory.mktemp("star"))


@pytest.fixture(scope="module")
def untold(tmp_path_factory) -> Golden:
    return walk("star-no-rationalisation", tmp_path_factory.mktemp("untold"))


@pytest.mark.parametrize("walked", ["star", "untold"])
def test_each_problem_is_tried_once_nearly_greedily_behind_worked_examples(walked, request):
    found = request.getfixturevalue(walked)
    first, second, _ = found.weights()
    assert found.asked("sample") == {(first, 0.01, 0.9), (second, 0.01, 0.9)}
    for index in (1, 2):
        samples = found.table(index, "sample", "samples")
        assert samples.height == 4
        for messages in samples["teacher_messages"]:
            assert messages[-1]["content"].count("Question: ") == 5 and messages[-1]["content"].endswith("\nAnswer:")


def test_what_came_out_wrong_is_tried_once_more_with_its_answer_told_by_the_same_model(star):
    first, second, _ = star.weights()
    assert star.asked("rationalised") == {(first, 0.01, 0.9), (second, 0.01, 0.9)}
    for index, wrong in ((1, {"3 + 3", "4 + 4", "5 + 5"}), (2, {"4 + 4", "5 + 5"})):
        shown = [messages[-1]["content"] for messages in star.table(index, "rationalise", "samples")["teacher_messages"]]
        assert {text.rsplit("Question: What is ", 1)[1].removesuffix("\nAnswer:") for text in shown} == {
            f"{sum_}? ({SUMS[f'What is {sum_}?']})" for sum_ in wrong
        }


def test_right_rationales_of_this_round_are_learned_by_the_base_behind_the_bare_question(star):
    rows = [
        {messages[-1]["content"]: text for messages, text in update.rows.select("messages", "chosen").iter_rows()}
        for update in star.backend.updates
    ]
    assert rows[0] == {"What is 2 + 2?": "Tried 2 + 2: #### 4", "What is 3 + 3?": "Told 3 + 3: #### 6"}
    assert rows[1] == {
        "What is 2 + 2?": "Tried 2 + 2: #### 4",
        "What is 3 + 3?": "Tried 3 + 3: #### 6",
        "What is 4 + 4?": "Told 4 + 4: #### 8",
    }
    base = star.weights()[0]
    assert [(update.start, update.reference) for update in star.backend.updates] == [(base, None), (base, None)]


def test_without_rationalisation_only_what_was_solved_untold_is_learned(untold):
    rows = [sorted(update.rows["chosen"]) for update in untold.backend.updates]
    assert rows == [["Tried 2 + 2: #### 4"], ["Tried 2 + 2: #### 4", "Tried 3 + 3: #### 6"]]
    base = untold.weights()[0]
    assert [(update.start, update.reference) for update in untold.backend.updates] == [(base, None), (base, None)]


@pytest.mark.parametrize("name", ["star", "star-no-rationalisation"])
def test_the_steps_grow_by_a_fifth_each_round_from_40_at_the_paper_s_rate(name):
    recipe = load(name)
    for index in range(1, recipe.rounds + 1):
        [train] = [step for step in recipe.steps_of(index) if step.verb == "train"]
        assert train.trl["max_steps"] == round(40 * 1.2 ** (index - 1))
        assert (train.trl["learning_rate"], train.trl["warmup_steps"]) == (1e-6, 100)
        assert train.trl["per_device_train_batch_size"] * train.trl["gradient_accumulation_steps"] == 10 * 8
