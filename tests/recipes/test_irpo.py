"""The shipped recipe irpo, walked with a scripted model.

Derived by hand from Pang et al. 2024 (arXiv 2404.19733), sections 2 and 3.1: 30 answers to each problem by the model of the round (T 0.8 in
rounds 1 and 2, then 1.3); winners are right ones and the human solution, losers are wrong ones; ten pairs by walking both lists side by side, the
shorter one starting over; none where a list is empty; DPO plus alpha = 1 times the winner's likelihood per token, from the model of the round,
held against it, on this round's pairs.

    problem   30 answers               winners (with the human one)   losers   pairs
    2 + 2     12 right, 18 wrong       13                             18       10, of 10 winners and 10 losers
    3 + 3     all wrong                1, the human one               30       10, all with the human one, of 10 losers
    4 + 4     all right                31                             0        none
    5 + 5     28 right, 2 wrong        29                             2        10, of 10 winners and both losers, each five times
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

from selfkd.recipe.load import load

RIGHT = {"2 + 2": 12, "3 + 3": 0, "4 + 4": 30, "5 + 5": 28}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    asked = next((sum_ for sum_ in RIGHT if f"What is {sum_}?" in text), "")
    if not asked:
        return "#### 7"
    result = 2 * int(asked[0]) + (time % 30 >= RIGHT[asked])
    return f"Answer {time % 30} of round {1 + time // 30}. #### {result}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [
        {"prompt": f"What is {sum_}?", "answer": str(2 * int(sum_[0])), "solution": f"A person added {sum_}."} for sum_ in RIGHT
    ]
    return golden("irpo", says, tmp_path_factory.mktemp("irpo"), rows, overrides=["rounds=3"], test=None)


def test_the_model_of_the_round_answers_30_times_and_warmer_from_the_third_round_on(walked):
    first, second, third, _ = walked.weights()
    assert walked.asked("sample") == {(first, 0.8, 1.0), (second, 0.8, 1.0), (third, 1.3, 1.0)}
    assert [walked.table(index, "sample", "samples").height for index in (1, 2, 3)] == [120, 120, 120]
    samples = [step for index in (1, 2, 3, 4) for step in load("irpo").steps_of(index) if step.verb == "sample"]
    assert [sample.temperature for sample in samples] == [0.8, 0.8, 1.3, 1.3]


def test_ten_pairs_of_a_right_and_a_wrong_answer_are_made_by_walking_both_lists(walked):
    for index, update in enumerate(walked.backend.updates, 1):
        pairs = Counter(messages[-1]["content"] for messages in update.rows["messages"])
        assert pairs == {"What is 2 + 2?": 10, "What is 3 + 3?": 10, "What is 5 + 5?": 10}
        sides = {prompt: ([], []) for prompt in pairs}
        for messages, chosen, rejected in update.rows.select("messages", "chosen", "rejected").iter_rows():
            prompt = messages[-1]["content"]
            gold = 2 * int(prompt[8])
            assert chosen.endswith(f"#### {gold}") and rejected.endswith(f"#### {gold + 1}")
            assert f"of round {index}. " in rejected and (f"of round {index}. " in chosen or "A person" in chosen)
            sides[prompt][0].append(chosen)
            sides[prompt][1].append(rejected)
        assert [len(set(side)) for side in sides["What is 2 + 2?"]] == [10, 10]
        assert (
            set(sides["What is 3 + 3?"][0]) == {"A person added 3 + 3.\n#### 6"} and len(set(sides["What is 3 + 3?"][1])) == 10
        )
        assert len(set(sides["What is 5 + 5?"][0])) == 10
        assert sorted(Counter(sides["What is 5 + 5?"][1]).values()) == [5, 5]


def test_dpo_with_the_likelihood_of_winners_goes_on_from_the_model_of_the_round_which_is_its_reference(walked):
    weights = walked.weights()
    assert [(update.start, update.reference) for update in walked.backend.updates] == [(one, one) for one in weights[:3]]
    for spec in (update.spec for update in walked.backend.updates):
        assert (spec.loss, spec.beta, spec.nll, spec.trl["learning_rate"], spec.trl["max_steps"]) == (
            "dpo",
            0.1,
            1.0,
            7e-7,
            5000,
        )
        assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 16
