"""The shipped recipe step-dpo, walked with a scripted model.

Derived by hand from Lai et al. 2024 (arXiv 2406.18629), sections 3.1 and 3.2, and the released code: two answers a problem at T 0.8 and top-p 0.95;
of each wrong one the first wrong step k is found by somebody who sees the solution; the model goes on 20 times from steps 1 to k - 1, at the same
temperature; of a try that reaches the right result, its step k wins against the wrong step k, both given the problem and steps 1 to k - 1:

    -log sigmoid(beta (log p(win | x, s) / ref - log p(lose | x, s) / ref)),   s = the right steps

Here a row's two texts both begin with s: log p(s | x) is in both, and goes out of the difference. No end token is learned.

    problem  answers                    found  tries                              pairs
    sum      wrong in step 2, right     2      first wrong, then right            s = step 1; step 2 of the second try over step 2
    start    wrong in step 1, twice     1      right                              s = nothing; one for each wrong answer
    again    wrong in step 1, twice     1      the same step 1, right by step 2   s = step 1; step 2 over step 2, for each
    never    wrong in step 1, twice     1      wrong                              none
    unread   wrong, twice               -      none: nobody found a step          none
    beyond   wrong, twice               9      none: there is no such line        none
"""

from __future__ import annotations

import pytest
from golden import Golden, between, golden

from selfkd.prompts.read import source_words
from selfkd.recipe.load import load

GOLD = {"sum": "9", "start": "2", "again": "7", "never": "5", "unread": "5", "beyond": "5"}
WRONG = {
    "sum": "Step 1: 2 + 3 = 5\nStep 2: 5 + 4 = 8\nAnswer: 8",
    "start": "Step 1: 1 + 1 = 3\nAnswer: 3",
    "again": "Step 1: 4 + 4 = 9\nStep 2: 9 - 1 = 8\nAnswer: 8",
    **dict.fromkeys(("never", "unread", "beyond"), "Step 1: 2 + 2 = 6\nAnswer: 6"),
}
FOUND = {"sum": "2", "start": "1", "again": "1", "never": "1", "unread": "none that I see", "beyond": "9"}


TRIES = {
    "start": " 1 + 1 = 2\nAnswer: 2",
    "again": " 4 + 4 = 9\nStep 2: no, 8 - 1 = 7\nAnswer: 7",
    "never": " 2 + 2 = 6\nAnswer: 6",
}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    if messages[-1]["role"] == "assistant":  # so its answer begins
        name = messages[-2]["content"]
        assert text == ("Step 1: 2 + 3 = 5\nStep 2:" if name == "sum" else "Step 1:")
        return TRIES.get(name, " 5 + 4 = 7\nAnswer: 7" if time == 0 else f" 5 + 4 = 9, try {time}\nAnswer: 9")
    if "First wrong line:" in text:
        return f"I read it.\nFirst wrong line: {FOUND[between(text, '<problem>', '</problem>')]}"
    if text == "sum" and time:
        return "Step 1: 2 + 3 = 5\nStep 2: 5 + 4 = 9\nAnswer: 9"
    return WRONG.get(text, "Answer: 7")


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    train = [{"prompt": name, "answer": gold, "solution": f"The solution of {name}."} for name, gold in GOLD.items()]
    return golden("step-dpo", says, tmp_path_factory.mktemp("step-dpo"), train, test=None)


def test_every_split_is_asked_for_a_step_a_line():
    prompts = load("step-dpo").prompts
    assert all("one step per line" in source_words(one)["template"] for one in (prompts.train, prompts.dev, prompts.test))


def test_the_model_answers_twice_and_the_untouched_one_looks_for_wrong_steps_of_wrong_answers_with_the_solution(walked):
    [base, _] = walked.weights()
    assert walked.asked("first") == {(base, 0.8, 0.95)} and walked.answers(1, "first").height == 12
    judged = walked.table(1, "judge", "samples")
    assert judged.height == 11  # one of the twelve is right
    for [shown] in judged["teacher_messages"]:
        name = between(shown["content"], "<problem>", "</problem>")
        numbered = "\n".join(f"{at}. {line}" for at, line in enumerate(WRONG[name].splitlines(), 1))
        assert f"The solution of {name}." in shown["content"] and numbered in shown["content"]


def test_it_goes_on_twenty_times_from_the_right_steps_of_each_answer_whose_wrong_step_is_known(walked):
    again = walked.table(1, "again", "samples")
    assert walked.asked("again") == {(walked.weights()[0], 0.8, 0.95)}
    assert again.height == 20 * (1 + 2 + 2 + 2) and again["parents"].list.len().unique().to_list() == [1]
    assert again["token_ids"].null_count() == again["logprob"].null_count() == again.height  # nobody drew how they begin
    assert set(again["text"]) >= {f"Step 1:{TRIES['start']}", "Step 1: 2 + 3 = 5\nStep 2: 5 + 4 = 7\nAnswer: 7"}


def test_the_step_that_leads_to_the_right_result_wins_against_the_wrong_one_behind_the_steps_that_both_share(walked):
    rows = walked.table(1, "build", "rows")
    found = sorted(
        (messages[-1]["content"], chosen, rejected)
        for messages, chosen, rejected in rows.select("messages", "chosen", "rejected").iter_rows()
    )
    again = ("again", "Step 1: 4 + 4 = 9\nStep 2: no, 8 - 1 = 7", "Step 1: 4 + 4 = 9\nStep 2: 9 - 1 = 8")
    start = ("start", "Step 1: 1 + 1 = 2", "Step 1: 1 + 1 = 3")
    assert found[:4] == [again, again, start, start]
    [(name, chosen, rejected)] = found[4:]
    assert (name, rejected) == ("sum", "Step 1: 2 + 3 = 5\nStep 2: 5 + 4 = 8")
    assert chosen.startswith("Step 1: 2 + 3 = 5\nStep 2: 5 + 4 = 9, try ") and "Answer" not in chosen


def test_no_end_is_learned(walked):
    rows = walked.table(1, "build", "rows")
    assert not rows["chosen_ended"].any() and not rows["rejected_ended"].any()
    assert rows["chosen_ids"].null_count() == rows["rejected_ids"].null_count() == rows.height


def test_the_model_that_is_trained_is_its_own_reference(walked):
    base, _ = walked.weights()
    assert walked.pairings() == [(base, base)]
    [spec] = [update.spec for update in walked.backend.updates]
    words = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs")
    assert (spec.loss, spec.beta, [spec.trl[word] for word in words]) == ("dpo", 0.5, [5e-7, "cosine", 0.1, 8])
    assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 128
