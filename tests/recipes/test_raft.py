"""The shipped recipe raft, walked with a scripted model.

Derived by hand from Dong et al. 2023 (arXiv 2304.06767), section 3: each round draws new prompts, answers each eight times with the model of the
last round, keeps the answer with the best reward of each prompt, and goes on training that model on these alone. A verifier stands for the reward
model, so a prompt without a right answer has no best one (that is ours), and an answer that was cut is none (ours).

    round  prompt  its 8 answers                     row
    1      a       all right                         one of them
    1      b       all wrong                         none
    2      c       3 right, 5 wrong                  one of the 3
    2      d       2 right of which 1 cut, 6 wrong   the other
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

RIGHT = {"What is a?": 8, "What is b?": 0, "What is c?": 3, "What is d?": 2}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    right = time < RIGHT.get(text, 0)
    return f"Try {time}.\n#### {7 if right else 8}" + "\nand so on" * (99 if text == "What is d?" and time == 0 else 0)


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": prompt, "answer": "7"} for prompt in RIGHT]
    return golden("raft", says, tmp_path_factory.mktemp("raft"), rows, overrides=["rounds=2"], take=2, test=None)


def test_the_model_of_the_last_round_answers_new_prompts_eight_times(walked):
    first, second, _ = walked.weights()
    assert walked.asked("sample") == {(first, 1.0, 1.0), (second, 1.0, 1.0)}
    for index, prompts in ((1, "ab"), (2, "cd")):
        shown = Counter(messages[-1]["content"] for messages in walked.table(index, "sample", "samples")["teacher_messages"])
        assert shown == {f"What is {prompt}?": 8 for prompt in prompts}


def test_the_best_answer_of_each_prompt_of_this_round_is_learned(walked):
    rows = [
        sorted((messages[-1]["content"], text) for messages, text in update.rows.select("messages", "chosen").iter_rows())
        for update in walked.backend.updates
    ]
    assert [[prompt for prompt, _ in made] for made in rows] == [["What is a?"], ["What is c?", "What is d?"]]
    assert all(text.endswith("#### 7") for made in rows for _, text in made)
    assert rows[1][1][1] == "Try 1.\n#### 7"


def test_it_goes_on_from_the_model_of_the_last_round(walked):
    first, second, _ = walked.weights()
    assert walked.pairings() == [(first, None), (second, None)]
    assert {update.spec.loss for update in walked.backend.updates} == {"sft"}
