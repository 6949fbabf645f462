"""`measure` with a key: how many answers can be read, and what most of k of them say gets."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import pytest
from chains import RECIPE, go, recipe_in

from selfkd.chain.run import Run
from selfkd.core.files import builtin_folder
from selfkd.core.votes import plurality
from selfkd.errors import RecipeError
from selfkd.rewards.load import load
from selfkd.steps.measure import of_highest

HEAD = RECIPE[: RECIPE.index("steps:")] + "steps:\n  - sample: {n: 2, temperature: 0.8, max_tokens: 64}\n  - train: sft\n"
# An answer ends in a digit, which is what it says; one that ends in 7 cannot be read. Right is what ends in 2 or 4.
CODE = """
def right(completion):
    return float(completion[-1] in "24")


def digit(completion):
    return None if completion.endswith("7") else float(completion[-1])


def crowd(completions):
    return [completions.count(one) for one in completions]
"""
KEYED = "  - measure: {reward: said.py:right, n: 5, temperature: 1, pass_at: 3, key: said.py:digit}\n"


def run_of(folder, measure: str, *overrides: str, amend: bool = False) -> Run:
    (folder / "said.py").write_text(CODE)
    return go(recipe_in(folder, HEAD + measure, *overrides), folder / "run", amend=amend)


def voted(ends: list[str], k: int) -> float:
    """Hold the vote in each way to draw k of the answers, one by one."""
    won = []
    for drawn in combinations(ends, k):
        votes = Counter(end for end in drawn if end != "7")
        first = [end for end, count in votes.items() if count == max(votes.values())] or ["7"]
        won.append(sum(end in "24" for end in first) / len(first))
    return sum(won) / len(won)


def test_maj_at_k_is_the_mean_over_every_draw_of_k_answers_and_parsed_says_how_many_could_be_read(tmp_path):
    run = run_of(tmp_path, KEYED, "rounds=1")
    seal, answers = run.sealed()[1], run.samples(1, step="measure")
    ends = [[text[-1] for text in group["text"]] for _, group in answers.group_by("prompt")]
    assert any("7" in one for one in ends) and any(len(set(one)) < 5 for one in ends)
    for k in (3, 5):
        name = f"dev/right_maj_{k}"
        assert seal.metrics[name] == pytest.approx(sum(voted(one, k) for one in ends) / len(ends))
        noted = seal.notes["measured"][name]
        assert noted["value"] == seal.metrics[name] and noted["scored"] == noted["change"]["prompts"] == len(ends)
    assert seal.metrics["dev/parsed"] == pytest.approx(sum(end != "7" for one in ends for end in one) / answers.height)


def test_one_answer_each_has_a_parse_rate_and_no_vote(tmp_path):
    metrics = run_of(tmp_path, "  - measure: {reward: said.py:right, key: said.py:digit}\n", "rounds=1").sealed()[1].metrics
    assert 0 < metrics["dev/parsed"] <= 1
    assert not [name for name in metrics if "_maj_" in name]


def test_answers_of_which_none_can_be_read_are_no_failure_and_their_mean_score_stands(tmp_path):
    measure = KEYED.replace("said.py:digit", "said.py:nothing")
    (tmp_path / "said.py").write_text(CODE)
    recipe = recipe_in(tmp_path, HEAD + measure, "rounds=1")
    (tmp_path / "said.py").write_text(CODE + "\n\ndef nothing(completion):\n    return None\n")
    metrics = go(recipe, tmp_path / "run").sealed()[1].metrics
    assert metrics["dev/parsed"] == 0.0
    assert metrics["dev/right_maj_5"] == pytest.approx(metrics["dev/right"])


def test_a_key_changes_no_other_figure_of_its_step(tmp_path):
    run_of(tmp_path, KEYED.replace(", key: said.py:digit", ""))
    later = run_of(tmp_path, KEYED, "rounds=3", amend=True).sealed()[3].notes["measured"]
    assert later["dev"]["change"] is not None and not later["dev"]["differently"]
    assert later["dev/right_maj_3"]["change"] is None  # the base has none


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("n: 5, temperature: 1, vote: said.py:crowd", "'key' counts the answers that agree, which is a vote: leave out 'vote'"),
        ("n: 5", "at temperature 0 the answers to a prompt are all the same"),
        ("n: 5, temperature: 1, as: key", "'key' is what the key is called: name this score otherwise (as)"),
        ("as: parsed", "'parsed' is a number of every measure step: name it otherwise (as)"),
    ],
)
def test_a_key_that_says_nothing_or_collides_is_refused_at_its_line(tmp_path, words, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        run_of(tmp_path, f"  - measure: {{reward: said.py:right, key: said.py:digit, {words}}}\n")


def test_the_shipped_key_wins_what_the_shipped_vote_wins(tmp_path):
    """Of all n answers, maj@n by `answer` is what those with the largest `share` get, ties and unreadable answers included."""
    rewards = builtin_folder() / "reward"
    share, answer = load(rewards / "vote.py", "share").call, load(rewards / "agree.py", "answer").call
    for texts in (["Answer: 4", "it is 4", "Answer: 5"], ["1", "2", "none"], ["no", "none"], ["Answer: 7"] * 3):
        scores = [float("4" in text or text == "2" or text == "no") for text in texts]
        assert plurality(scores, answer(texts), len(texts)) == pytest.approx(of_highest(scores, share(texts)))
