"""The shipped recipe temporal-self-rewarding, walked with a scripted model.

Derived by hand from the abstract of Wang et al. 2025 (arXiv 2508.06026): losers are always the initial model's (anchored rejection); winners
are those of the next model (future-guided chosen), a provisional one, which is trained first on the present winners; two updates a round. Marks,
draws and DPO are self-rewarding's (arXiv 2401.10020): the model of the round judges, three marks are averaged, and ties make no pair.

    prompt  present (4)   past, of the base (4)   future, of the draft (4)   draft learns   the round learns
    one     2 0 4 3       1 3 2 4                 3 5 4 1                    4 over 1       5 over 1
    two     5 1 2 3       3 3 5 4                 2 4 3 2                    5 over 3 (a tie of two)   4 over 3
The worst answer of all, the 0 of prompt one, is the present model's: it is no loser.
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, between, golden

MARKS = {"What is one?": "204313243541", "What is two?": "512333542432"}  # present, past, future


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    if text in MARKS:
        return f"{text} Take {time:02}."
    if "<answer>" not in text:
        return "7"
    shown = between(text, "<answer>", "</answer>")
    prompt, _, number = shown.partition(" Take ")
    return f"Score: {MARKS[prompt][int(number[:2])] if prompt in MARKS else 0}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    return golden(
        "temporal-self-rewarding", says, tmp_path_factory.mktemp("temporal"), [{"prompt": prompt} for prompt in MARKS], take=1
    )


def draft(walked: Golden, index: int) -> str:
    return walked.run.made(index)["draft"].models["policy"].digest


def test_present_past_and_future_answer_and_the_model_of_the_round_judges(walked):
    base, first, _ = walked.weights()
    assert walked.asked("present") == {(base, 0.7, 0.9), (first, 0.7, 0.9)}
    assert walked.asked("past") == {(base, 0.7, 0.9)}
    assert walked.asked("future") == {(draft(walked, 1), 0.7, 0.9), (draft(walked, 2), 0.7, 0.9)}
    assert walked.asked("judgments") == walked.asked("judgments-future") == {(base, 0.7, 0.9), (first, 0.7, 0.9)}


@pytest.mark.parametrize(("index", "prompt"), [(1, "What is one?"), (2, "What is two?")])
def test_each_round_has_a_new_prompt_four_answers_of_each_model_and_three_marks_of_each(walked, index, prompt):
    for stream in ("present", "past", "future"):
        assert walked.answers(index, stream).height == 4
    shown = {messages[-1]["content"] for messages in walked.table(index, "present", "samples")["teacher_messages"]}
    assert shown == {prompt}
    for step, stream, answers in (("judge", "judgments", 8), ("judge-future", "judgments-future", 4)):
        asked = walked.table(index, step, "samples")
        real = asked.filter(asked["stream"] == stream)
        assert sorted(Counter(real["parents"].list.first()).values()) == [3] * answers


def test_losers_are_the_base_s_and_winners_first_the_present_and_then_the_future(walked):
    assert walked.pairs(1, "anchored") == [("What is one? Take 02.", "What is one? Take 04.")]
    assert walked.pairs(1, "guided") == [("What is one? Take 09.", "What is one? Take 04.")]
    [(best, worst)] = walked.pairs(2, "anchored")
    assert best == "What is two? Take 00." and worst in ("What is two? Take 04.", "What is two? Take 05.")
    [(best, worst)] = walked.pairs(2, "guided")
    assert best == "What is two? Take 09." and worst in ("What is two? Take 04.", "What is two? Take 05.")


def test_both_updates_start_from_the_model_of_the_round_and_the_draft_is_thrown_away(walked):
    base, first, last = walked.weights()
    assert walked.pairings() == [(base, base), (base, base), (first, first), (first, first)]
    assert draft(walked, 1) not in (base, first, last) and draft(walked, 2) not in (base, first, last)
    assert [update.rows.height for update in walked.backend.updates] == [1, 1, 1, 1]  # of this round, and of its own step
    for spec in (update.spec for update in walked.backend.updates):
        assert (spec.loss, spec.beta, spec.trl["learning_rate"]) == ("dpo", 0.1, 1e-6)
        assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 16


def test_the_anchor_is_measured_of_what_the_round_leaves(walked):
    assert walked.asked("dev") == {(digest, 0.0, 1.0) for digest in walked.weights()}
