"""The shipped recipe cream, walked with a scripted model.

Derived by hand from Wang et al. 2024 (arXiv 2410.12735), section 4 and algorithm 1: M1 is M0 after a first tuning. In each round the model of the round
answers five times, and the reward of an answer is log p(now) - log p(M0): best against worst. The same answers in the order of the model
before (its reward likewise; of M0, whose reward is 0, its log-likelihood per token, as in the released code). C = (tau + 1) / 2, Kendall's tau
of both orders, averaged over the prompts; the loss is C DPO + (1 - C) DPO of the flipped pair.

Of the 10 pairs of 5 answers, d that stand in different order make tau = 1 - 2 d / 10, and C = 1 - d / 10.

    round  prompt  now: reward of A B C D E   before: A B C D E                  d                            C      pair
    1      one     1  3  2  0 -1              -1 -1.5 -3 -4 -5 (M0, per token)   2: A and B, A and C          0.8    B over E
           two     1  2  3  4  5              -1 -2 -3 -4 -5   (M0, per token)   10                           0      E over A
                                                                                 the mean of the round        0.4
    2      three   5  4  3  2  1               5  4  3  1  2   (M1 - M0)         1: D and E                   0.9    A over E
           four    2  9  1  0  5               2  9  1  0  5   (M1 - M0)         0                            1      B over D
                                                                                 the mean of the round        0.95

Prompt one tells a sum from a mean: its A has 20 tokens and its B 10, so that by the sum B (-15) would stand before A (-20), and d would be 1.
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

NAMES = "ABCDE"
LETTERS = {"one": (19, 9, 9, 9, 9)}  # of the answers; the end of an answer is a token, too
M0 = {"one": (-1, -1.5, -3, -4, -5), "two": (-1, -2, -3, -4, -5), "three": (-2,) * 5, "four": (-2,) * 5}  # per token
REWARDS = [  # of M1, of M2
    {"one": (1, 3, 2, 0, -1), "two": (1, 2, 3, 4, 5), "three": (5, 4, 3, 1, 2), "four": (2, 9, 1, 0, 5)},
    {"one": (0,) * 5, "two": (0,) * 5, "three": (5, 4, 3, 2, 1), "four": (2, 9, 1, 0, 5)},
]
PROMPTS = {f"What is {word}?": word for word in M0}


def answer(word: str, at: int) -> str:
    return f"{word} {NAMES[at]}".ljust(LETTERS.get(word, (9,) * 5)[at], ".")


TEXTS = {answer(word, at): (word, at) for word in M0 for at in range(5)}


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    return answer(PROMPTS[text], time) if text in PROMPTS else "7"


def likes(weights: int, text: str) -> float:
    """log p of an answer under M0, M1, M2, summed over its tokens."""
    word, at = TEXTS[text]
    return M0[word][at] * (len(text) + 1) + (REWARDS[weights - 1][word][at] if weights else 0)


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    train = [{"prompt": prompt, "answer": f"gold of {word}"} for prompt, word in PROMPTS.items()]
    return golden("cream", says, tmp_path_factory.mktemp("cream"), train, likes=likes, take=2)


def test_the_base_is_tuned_first_on_the_data_set_s_answers(walked):
    first = walked.backend.updates[0]
    assert first.start == walked.run.loaded()["policy"].digest and first.reference is None
    assert first.rows["kind"].unique().to_list() == ["sft"]
    assert {text.startswith("gold of ") for text in first.rows["chosen"]} == {True}
    assert (first.spec.loss, first.spec.trl["learning_rate"], first.spec.trl["num_train_epochs"]) == ("sft", 5e-6, 5)


def test_the_model_of_the_round_answers_new_prompts_five_times(walked):
    warm, first, _ = walked.weights()
    assert walked.asked("sample") == {(warm, 0.8, 0.95), (first, 0.8, 0.95)}
    for index, words in ((1, ("one", "two")), (2, ("three", "four"))):
        assert sorted(walked.answers(index)["text"]) == sorted(answer(word, at) for word in words for at in range(5))
    assert {one.sampling.max_tokens for one in walked.backend.asked if one.stream == "sample"} == {768}


@pytest.mark.parametrize(("index", "words"), [(1, ("one", "two")), (2, ("three", "four"))])
def test_rewards_are_held_against_the_untouched_model(walked, index, words):
    found = dict(walked.answers(index).select("text", "reward").iter_rows())
    for word in words:
        for at in range(5):
            assert found[answer(word, at)] == pytest.approx(REWARDS[index - 1][word][at])


@pytest.mark.parametrize(
    ("index", "agreement", "pairs"),
    [
        (1, 0.4, [("one", 1, 4), ("two", 4, 0)]),
        (2, 0.95, [("four", 1, 3), ("three", 0, 4)]),
    ],
)
def test_the_best_wins_against_the_worst_as_far_as_two_models_agree(walked, index, agreement, pairs):
    assert walked.pairs(index) == [(answer(word, best), answer(word, worst)) for word, best, worst in pairs]
    columns = walked.table(index, "build", "rows")["columns"].to_list()
    assert columns == [[{"name": "agreement", "value": pytest.approx(agreement)}]] * 2


def test_it_goes_on_from_the_model_of_the_round_which_is_its_reference(walked):
    warm, first, _ = walked.weights()
    assert walked.pairings()[1:] == [(warm, warm), (first, first)]
    for update in walked.backend.updates[1:]:
        assert update.rows.height == 2  # of this round alone
        assert (update.spec.loss, dict(update.spec.function.params)) == ("cream", {"beta": 0.1})
        words = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs")
        assert [update.spec.trl[word] for word in words] == [1e-6, "cosine", 0.1, 0.01, 1]
        assert update.spec.trl["per_device_train_batch_size"] * update.spec.trl["gradient_accumulation_steps"] == 32
