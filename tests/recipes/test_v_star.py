"""The shipped recipe v-star, walked with a scripted model.

Derived by hand from Hosseini et al. 2024 (arXiv 2402.06457), algorithm 1: G_SFT is the base tuned on the solutions. In each iteration the generator
samples 16 answers a problem, D_GEN = solutions and right answers of all iterations, D_VER = all answers of all iterations, and the next
generator is the base tuned on D_GEN. The verifier is DPO from G_SFT, with G_SFT as its reference, on right times wrong answers of a problem in
D_VER. Of several candidates the one counts that the verifier finds likeliest. (Here there is a verifier after each iteration.)

The model is right about one every other time and about two always, so that two makes no pair.

    round  sampled by  D_GEN                         pairs                                   generator from  verifier from, against
    1      G_SFT       2 solutions, 8 + 16 right     of 8 x 8: 16, each answer in two        the base        G_SFT, G_SFT
    2      round 1     2 solutions, 16 + 32 right    of 16 x 16: 16, each answer in one      the base        G_SFT, G_SFT

Of 16 candidates on dev every fourth is right: one at random gets 0.25, a vote 0. The first verifier likes right ones best, and the second,
which has unlearned it, the wrong ones: 1 and 0. Before there is a verifier nothing is picked.
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

PROBLEMS = {"What is one?": "1", "What is two?": "2"}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    if text not in PROBLEMS:
        return f"Number {time}.\n#### {7 if time % 4 == 0 else 8}"
    right = text == "What is two?" or time % 2 == 0
    return f"Try {time}.\n#### {PROBLEMS[text] if right else 9}"


verifiers: list[int] = []  # those that were asked, in their order


def likes(weights: int, text: str) -> float:
    if weights not in verifiers:
        verifiers.append(weights)
    right = text.endswith("7")
    return -1.0 if right == (weights == verifiers[0]) else -5.0


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    verifiers.clear()
    train = [{"prompt": text, "answer": answer, "solution": "By counting."} for text, answer in PROBLEMS.items()]
    return golden("v-star", says, tmp_path_factory.mktemp("v-star"), train, overrides=["rounds=2"], likes=likes, test=None)


def test_the_first_generator_is_the_base_tuned_on_the_solutions(walked):
    first = walked.backend.updates[0]
    assert first.start == walked.run.loaded()["policy"].digest and first.spec.trl["num_train_epochs"] == 2
    assert sorted(first.rows["chosen"]) == ["By counting.\n#### 1", "By counting.\n#### 2"]


def test_the_generator_of_the_round_answers_every_problem_sixteen_times(walked):
    warm, first, _ = walked.weights()
    assert walked.asked("own") == {(warm, 0.7, 1.0), (first, 0.7, 1.0)}
    assert [walked.table(index, "sample", "samples").height for index in (1, 2)] == [32, 32]


@pytest.mark.parametrize(("index", "ones", "twos"), [(1, 8, 16), (2, 16, 32)])
def test_the_generator_learns_solutions_and_all_right_answers_so_far_anew_from_the_base(walked, index, ones, twos):
    base, update = walked.run.loaded()["policy"].digest, walked.backend.updates[2 * index - 1]
    assert (update.start, update.reference, update.spec.loss) == (base, None, "sft")
    learned = [
        (messages[-1]["content"], text.startswith("By counting"), text.rpartition(" ")[2])
        for messages, text in update.rows.select("messages", "chosen").iter_rows()
    ]
    assert Counter(learned) == {
        ("What is one?", True, "1"): 1,
        ("What is two?", True, "2"): 1,
        ("What is one?", False, "1"): ones,
        ("What is two?", False, "2"): twos,
    }


@pytest.mark.parametrize(("index", "most", "often"), [(1, 8, 2), (2, 16, 1)])
def test_the_verifier_learns_right_against_wrong_answers_of_all_rounds_from_the_first_generator(walked, index, most, often):
    warm, update = walked.weights()[0], walked.backend.updates[2 * index]
    assert (update.start, update.reference) == (warm, warm)
    assert (update.spec.loss, update.spec.beta, update.spec.trl["max_steps"]) == ("dpo", 0.1, 2000)
    assert {messages[-1]["content"] for messages in update.rows["messages"]} == {"What is one?"}
    pairs = set(update.rows.select("chosen", "rejected").iter_rows())
    assert len(pairs) == update.rows.height == 16
    for side, result in (("chosen", "1"), ("rejected", "9")):
        found = Counter(update.rows[side])
        assert {text.rpartition(" ")[2] for text in found} == {result}
        assert (len(found), set(found.values())) == (most, {often})


def test_the_verifier_is_a_model_of_its_own_and_is_asked_for_nothing_but_likelihoods(walked):
    assert len({*walked.weights(), *walked.weights("verifier")}) == 5
    assert {one.model for one in walked.backend.asked} & set(walked.weights("verifier")) == set()
    assert len(verifiers) == 2


@pytest.mark.parametrize(("index", "picked"), [(0, None), (1, 1.0), (2, 0.0)])
def test_the_candidate_counts_that_the_verifier_of_the_round_finds_likeliest(walked, index, picked):
    found = walked.metrics(index)
    assert (found["dev/sampled"], found["dev/sampled_maj_16"], found["dev/sampled_best_16"]) == (0.25, 0.0, picked)
    assert walked.asked("dev") >= {(walked.weights()[index], 0.0, 1.0), (walked.weights()[index], 0.7, 1.0)}
