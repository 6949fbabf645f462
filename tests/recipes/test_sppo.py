"""The shipped recipe sppo, walked with a scripted model.

Derived by hand from Wu et al. 2024 (arXiv 2405.00675), algorithm 1 and its released code: five answers of the model of the round to new
prompts; every answer plays every one, itself at a half, and P is the mean of its five chances; the best and the worst are learned, by
1/2 [(r_w - (P_w - 1/2) / beta)^2 + (r_l - (P_l - 1/2) / beta)^2]; from the model of the round, which is its reference, in three rounds. The judge
stays what it is: PairRM there, the untouched model here, asked in both orders.

    round  prompt  verdicts                                       P of A, B, C, D, E       pair and its P
    1      one     A > B > C > D > E                              0.9 0.7 0.5 0.3 0.1      A 0.9 over E 0.1
           two     always the one shown first                     0.5 each                 none: a tie
    2      three   A > B > C > D > E, A and E are equal           0.8 0.7 0.5 0.3 0.2      A 0.8 over E 0.2
           four    A > … > E, and A has three times E's letters   0.9 … 0.1                none: the guard on length, which is ours
    3      five    E > D > C > B > A                              0.1 0.3 0.5 0.7 0.9      E 0.9 over A 0.1
           six     as one, but no order of A and E can be read    from the other three     A 0.9 over E 0.1

The head says how a model takes the judge's place that gives the probability of a win, as PairRM does. In a round of its own: the model says
of x shown before y 0.5 + (x - y) / 10, with A = 4, … E = 0, and 0.02 more for whoever is shown first, which both orders take out again.

    prompt  chances of A against B, C, D, E, A     P of A, …, E                 pair and its P
    one     0.6 0.7 0.8 0.9 0.5                    0.7 0.6 0.5 0.4 0.3          A 0.7 over E 0.3
    two     0.5 each: all answers are equal        0.5 each                     none: a tie
"""

from __future__ import annotations

import re

import pytest
from golden import Golden, between, golden

from selfkd.core.files import builtin_folder

WORDS = ("one", "two", "three", "four", "five", "six")
PROMPTS = {f"What is {word}?": word for word in WORDS}


def answer(word: str, letter: str) -> str:
    return f"{letter} is {word}. " * (3 if (word, letter) == ("four", "A") else 1)


def verdict(word: str, first: str, second: str) -> str:
    if word == "two":
        return "[[A]]"
    if word == "three" and {first, second} == {"A", "E"}:
        return "[[C]]"
    if word == "six" and {first, second} == {"A", "E"}:
        return "Hm."
    wins = first > second if word == "five" else first < second
    return "[[A]]" if wins else "[[B]]"


def says(messages: list[dict[str, str]], time: int) -> str:
    text = messages[-1]["content"]
    if text in PROMPTS:
        return answer(PROMPTS[text], "ABCDE"[time])
    if "<answer A>" not in text:
        return "7"
    first, second = (between(text, f"<answer {side}>", f"</answer {side}>") for side in "AB")
    word = PROMPTS[between(text, "<question>", "</question>")]
    return f"It is better put.\n{verdict(word, first[:1] or 'Z', second[:1] or 'Z')}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    return golden("sppo", says, tmp_path_factory.mktemp("sppo"), [{"prompt": prompt} for prompt in PROMPTS], take=2)


def test_the_model_of_the_round_answers_and_the_untouched_one_judges(walked):
    weights = walked.weights()
    assert walked.rounds == 3 and walked.asked("sample") == {(digest, 0.7, 0.9) for digest in weights[:3]}
    assert walked.asked("judgments") == {(weights[0], 0.7, 0.9)}
    assert walked.asked("dev") == {(digest, 0.0, 1.0) for digest in weights}


@pytest.mark.parametrize("index", [1, 2, 3])
def test_five_answers_to_each_new_prompt_meet_in_both_orders(walked, index):
    words = WORDS[2 * index - 2 : 2 * index]
    assert sorted(walked.answers(index)["text"]) == sorted(answer(word, letter) for word in words for letter in "ABCDE")
    asked = walked.table(index, "judge", "samples")
    met = asked.filter(asked["stream"] == "judgments")["parents"].to_list()
    assert len(set(map(tuple, met))) == len(met) == 2 * 5 * 4


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (1, {"one": ("A", 0.9, "E", 0.1)}),
        (2, {"three": ("A", 0.8, "E", 0.2)}),
        (3, {"five": ("E", 0.9, "A", 0.1), "six": ("A", 0.9, "E", 0.1)}),
    ],
)
def test_the_best_and_the_worst_are_learned_with_their_chances_against_all_five(walked, index, expected):
    rows = walked.table(index, "build", "rows").select("chosen", "rejected", "columns", "weight")
    found = {chosen: (rejected, columns, weight) for chosen, rejected, columns, weight in rows.iter_rows()}
    assert set(found) == {answer(word, best) for word, (best, *_) in expected.items()}
    for word, (best, chance, worst, other) in expected.items():
        rejected, columns, weight = found[answer(word, best)]
        assert (rejected, weight) == (answer(word, worst), 1.0)
        assert {one["name"]: one["value"] for one in columns} == pytest.approx({"chosen_win": chance, "rejected_win": other})


def test_each_round_goes_on_from_the_last_one_which_is_its_reference(walked):
    weights = walked.weights()
    assert walked.pairings() == [(digest, digest) for digest in weights[:3]]
    assert [update.rows.height for update in walked.backend.updates] == [1, 1, 2]
    for spec in (update.spec for update in walked.backend.updates):
        assert (spec.loss, dict(spec.function.params)) == ("sppo", {"beta": 0.001})
        words = ("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs")
        assert [spec.trl[word] for word in words] == ["rmsprop", 5e-7, "linear", 0.1, 1]
        assert spec.trl["per_device_train_batch_size"] * spec.trl["gradient_accumulation_steps"] == 64


# ---- with a model that gives probabilities in the judge's place ----

PROMISED = re.compile(r"^# +(- score: \{pairwise: MODEL.*\})$", re.MULTILINE)


def reads(text: str, second: str) -> float:
    """The chance that the answer behind question and blank line is better than the other one."""
    question, one = text.split("\n\n")
    apart = 0 if PROMPTS[question] == "two" else ord(second[0]) - ord(one[0])
    return 0.5 + apart / 10 + 0.02


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Golden:
    """The recipe with the line that its head promises in the place of its judge."""
    folder = tmp_path_factory.mktemp("sppo-pairwise")
    text = (builtin_folder() / "recipes" / "sppo.yaml").read_text()
    [promised] = PROMISED.findall(text)
    judge = next(line for line in text.splitlines() if line.startswith("  - judge:"))
    text = text.replace(judge, f"  {promised.replace('MODEL', 'org/pairs')}")
    (folder / "sppo.yaml").write_text(re.sub(r"^  judge\..*\n", "", text, flags=re.MULTILINE))
    train = [{"prompt": prompt} for prompt in list(PROMPTS)[:2]]
    return golden(str(folder / "sppo.yaml"), says, folder, train, overrides=["rounds=1"], reads=reads, take=2)


def test_a_model_s_probabilities_stand_for_verdicts_and_both_orders_take_out_who_is_shown_first(compared):
    rows = compared.table(1, "build", "rows").select("chosen", "rejected", "columns")
    [(chosen, rejected, columns)] = rows.iter_rows()
    assert (chosen, rejected) == (answer("one", "A"), answer("one", "E"))
    assert {one["name"]: one["value"] for one in columns} == pytest.approx({"chosen_win": 0.7, "rejected_win": 0.3})
    found = dict(compared.answers(1).select("text", "wins").iter_rows())
    expected = {answer("one", letter): (5 * p - 0.5) / 4 for letter, p in zip("ABCDE", (0.7, 0.6, 0.5, 0.4, 0.3), strict=True)}
    assert {text: found[text] for text in expected} == pytest.approx(expected)


def test_no_model_of_the_chain_judges_then(compared):
    assert compared.asked("judgments") == set() and compared.pairings() == [(compared.weights()[0],) * 2]
