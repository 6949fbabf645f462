"""The shipped recipe rlcd, walked with a scripted model.

Derived by hand from Yang et al. 2023 (arXiv 2307.12950), section 3: one answer to each conversation under a positive prompt, one under a
negative one, by the same model; the positive one is preferred without a check; both belong to the bare conversation. Trained once, from the
base. (A reward model and PPO there, DPO against the base here.)

    prompt  helpful            unhelpful   pair
    one     Use a lid.         Do not.     the helpful one wins
    two     So.                So.         none: they are the same
    three   six times "Then."  No.         none: the guard on length, which is ours
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

ANSWERS = {
    "How is one done?": ("Use a lid.", "Do not."),
    "How is two done?": ("So.", "So."),
    "How is three done?": ("Then. " * 6, "No."),
}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    prompt, _, affix = text.partition("\n\n")
    if prompt not in ANSWERS:
        return "7"
    return ANSWERS[prompt][("(giving a helpful response)", "(giving an unhelpful response)").index(affix)]


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    train = [{"prompt": prompt, "answer": "gold", "rejected": "other"} for prompt in ANSWERS]
    return golden("rlcd", says, tmp_path_factory.mktemp("rlcd"), train, take=3)


def test_the_base_is_asked_once_in_each_of_two_ways(walked):
    [base, _] = walked.weights()
    for stream in ("helpful", "unhelpful"):
        assert walked.asked(stream) == {(base, 1.0, 1.0)}
        assert walked.answers(1, stream).height == 3
    assert {one.sampling.max_tokens for one in walked.backend.asked if one.stream != "dev"} == {300}


def test_what_was_asked_for_wins_and_the_affix_is_stripped(walked):
    rows = walked.table(1, "build", "rows")
    assert list(rows.select("kind", "chosen", "rejected", "weight").iter_rows()) == [("pair", "Use a lid.", "Do not.", 1.0)]
    assert rows["messages"].to_list() == [[{"role": "user", "content": "How is one done?"}]]


def test_dpo_starts_from_the_base_and_is_held_against_it_once(walked):
    [base, _] = walked.weights()
    assert walked.pairings() == [(base, base)]
    [spec] = [update.spec for update in walked.backend.updates]
    assert (spec.loss, spec.beta, spec.nll) == ("dpo", 0.1, 0.0)


def test_the_anchor_is_measured_greedily_before_and_after(walked):
    assert walked.asked("dev") == {(digest, 0.0, 1.0) for digest in walked.weights()}
