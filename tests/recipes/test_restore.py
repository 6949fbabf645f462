"""The shipped recipe restore, walked with a scripted model.

Derived by hand from "On-Policy Distillation" (Lu and others, Thinking Machines Lab 2025), its section on personalisation: the model is tuned on the
domain; then the tuned model answers general prompts, and reverse KL at each token of these answers draws it back to the model before
the tuning, under the same prompt. The domain is in no row of that phase.

    phase    rows                                       trained from  teacher
    tune     the answers of the domain, as SFT          the base      -
    round 1  the tuned model's answers to requests      round 0       the base
    round 2  those of round 1's model                   round 1       the base
"""

from __future__ import annotations

import doctest

import pytest
from golden import Golden, golden, optimisers

from selfkd.core.files import builtin_folder
from selfkd.core.user_module import load_module

DOMAIN = {"How much is 1 and 2?": "3", "How much is 2 and 2?": "4"}
REQUESTS = ["Hello?", "Name a fruit.", "What is rain?"]


def says(messages: list[dict[str, str]], time: int) -> str:
    return f"{messages[-1]['content']} Well, {time}."


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    rows = [{"prompt": text, "answer": answer} for text, answer in DOMAIN.items()] + [{"prompt": text} for text in REQUESTS]
    return golden("restore", says, tmp_path_factory.mktemp("restore"), rows, overrides=["rounds=2"])


def test_the_domain_is_learned_once_from_its_answers(walked):
    first = walked.backend.updates[0]
    assert (first.spec.loss, first.reference) == ("sft", None)
    assert sorted(first.rows["chosen"]) == ["<<3>>", "<<4>>"]


def test_the_model_of_the_round_answers_general_requests_twice_and_nothing_of_the_domain(walked):
    weights = walked.weights()
    assert walked.asked("sample") == {(weights[0], 1.0, 1.0), (weights[1], 1.0, 1.0)}
    for index in (1, 2):
        rows = walked.table(index, "build", "rows")
        assert sorted(messages[0]["content"] for messages in rows["messages"]) == sorted(REQUESTS * 2)
        assert rows["messages"].to_list() == rows["teacher_messages"].to_list()


def test_what_was_sampled_keeps_its_log_probability_for_staleness(walked):
    assert {one.sampling.extra["logprobs"] for one in walked.backend.asked if one.stream == "sample"} == {0}
    assert all(walked.table(index, "build", "rows")["chosen_logprob"].null_count() == 0 for index in (1, 2))


def test_reverse_kl_draws_each_round_back_to_the_model_before_the_tuning(walked):
    weights, [tune, *updates] = walked.weights(), walked.backend.updates
    assert [(one.start, one.reference) for one in updates] == [(weights[0], tune.start), (weights[1], tune.start)]
    assert {(one.spec.loss, one.spec.divergence.kind) for one in updates} == {("kd", "reverse")}


def test_the_second_phase_is_one_run_whose_optimiser_begins_empty_and_goes_on(walked):
    assert optimisers(walked) == [(False, False), (True, False), (True, True)]


def test_its_prompts_are_a_domain_with_answers_and_requests_without(walked):
    module = load_module(builtin_folder() / "recipes" / "restore.py")
    assert doctest.testmod(module).failed == 0
    rows = module.rows(5)
    assert sum("answer" in row for row in rows) == 5 and len({row["prompt"] for row in rows}) == len(rows) == 5 + len(
        module.PLAIN
    )
