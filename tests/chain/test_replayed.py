"""Scores that `replay` brings from earlier rounds keep one meaning per name, whatever gives them: a changed maker is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chains import RECIPE, go, recipe_in
from judges import of_length, scripted

from selfkd.chain import ways
from selfkd.errors import ChainError

HEAD = RECIPE[: RECIPE.index("steps:")] + "steps:\n  - replay\n  - sample: {n: 2, temperature: 0.8, max_tokens: 64}\n"
MARK = "judge: {template: judge.j2, highest: 5, parse: number, canaries: 0, score: good}"
WINS = "judge: {template: '<<{{ of.text }}>> or <<{{ other.text }}>>', pairwise: average, canaries: 0, score: good}"
MINE = """
import polars as pl

def good(completion):
    return 1.0

def vote(completions):
    return [1.0 for _ in completions]

def rank(samples):
    return samples.select(sample="id", value=pl.lit(1.0))

def rank_too(samples):
    return samples.select(sample="id", value=pl.lit(1.0))
"""


def backend():
    """One that marks by length, and finds the answer better that it is shown first."""
    return scripted(lambda shown, seed: of_length(shown, seed) if len(shown) == 1 else "[[A]]")


def write(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(MINE)
    (folder / "judge.j2").write_text("Mark <<{{ of.text }}>> from 0 to 5.")
    rows = [{"prompt": f"What is {10 + k} + {k}?", "completion": "I do not know.", "good": 1} for k in range(3)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(folder: Path, step: str, *words: str):
    write(folder)
    return recipe_in(folder, f"{HEAD}  - {step}\n  - train: {{loss: sft, of: sample}}\n", *words)


def after(folder: Path, was: str, now: str):
    """A run of two rounds, and its third with another step."""
    folder.mkdir(exist_ok=True)
    write(folder)
    go(recipe(folder, was), folder / "run", backend())
    return go(recipe(folder, now, "rounds=3"), folder / "run", backend(), amend=True)


OTHERWISE = [
    (MARK, MARK.replace("judge.j2", "'Mark <<{{ of.text }}>>!'"), "another template"),
    (MARK, MARK.replace("highest: 5", "highest: 10"), "another highest"),
    (MARK, MARK.replace("parse: number", "parse: tag"), "another parse"),
    (MARK, MARK.replace("highest: 5", "highest: 5, n: 2"), "another n"),
    (MARK, MARK.replace("highest: 5", "highest: 5, model: policy@base"), "another model"),
    (MARK, "score: {reward: mine.py:good}", "another verb"),
    (WINS, WINS.replace("average", "agree"), "another pairwise"),
    (WINS, WINS.replace("average", "average, where: chars > 3"), "another where"),
    ("score: {logprob: policy@base, as: good}", "score: {logprob: policy@base, reduce: mean, as: good}", "another reduce"),
    ("score: {logprob: policy@base, as: good}", "score: {entropy: policy@base, as: good}", "another entropy and another logprob"),
    ("score: {value: chars, as: good}", "score: {value: tokens, as: good}", "another value"),
    ("score: {reward: mine.py:vote, as: good}", "score: {reward: mine.py:vote, of: sample, as: good}", "another of"),
    ("apply: {function: mine.py:rank, scores: [good]}", "apply: {function: mine.py:rank_too, scores: [good]}", "another function"),
    ("apply: {function: mine.py:rank, scores: [good]}", "apply: {function: mine.py:rank, scores: [good], of: sample}", "another of"),
]  # fmt: skip


@pytest.mark.parametrize(("was", "now", "said"), OTHERWISE)
def test_a_score_that_something_else_would_give_is_refused_with_what_is_another_and_a_way_out(tmp_path, was, now, said):
    with pytest.raises(ChainError) as caught:
        after(tmp_path, was, now)
    told = str(caught.value)
    assert f"gave 'good' by {said}, and `replay` brings these scores" in told and "round-001/03-" in told
    assert "name of its own" in told and "good_2" in told
    field = {"judge": "score", "apply": "scores", "score": "as"}[was.partition(":")[0]]
    assert f"({field}: good_2)" in told


ALIKE = [
    (MARK, MARK.replace("canaries: 0", "canaries: 1, max_unparsed: 0.5")),
    (MARK, MARK.replace("highest: 5", "highest: 5, of: sample, as: marks")),
    (MARK, MARK.replace("judge.j2", "same.j2")),
    ("score: {reward: mine.py:good}", "score: {reward: mine.py:good, of: sample, timeout: 3}"),
    ("apply: {function: mine.py:rank, scores: [good]}", "apply: {function: mine.py:rank, scores: [good, better], timeout: 60}"),
]


@pytest.mark.parametrize(("was", "now"), ALIKE)
def test_what_changes_no_score_is_accepted(tmp_path, was, now):
    write(tmp_path)
    (tmp_path / "same.j2").write_text((tmp_path / "judge.j2").read_text())
    assert len(after(tmp_path, was, now).sealed()) == 4


def test_two_steps_that_give_one_score_to_two_streams_are_no_change(tmp_path):
    votes = "score: {reward: mine.py:vote, of: sample}\n  - score: {reward: mine.py:vote, of: more}"
    more = f"sample: {{n: 2, max_tokens: 64, as: more}}\n  - {votes}"
    assert len(after(tmp_path, more, more.replace("n: 2, max_tokens: 64, as", "n: 3, max_tokens: 64, as")).sealed()) == 4


def test_a_recipe_that_says_what_each_of_its_rounds_gives_may_be_amended_elsewhere(tmp_path):
    listed = MARK.replace("highest: 5", "highest: 5, n: [1, 2, 3]")
    words = "sample: {n: 1, max_tokens: 64, as: more}"
    run = after(tmp_path, f"{listed}\n  - {words}", f"{listed}\n  - {words.replace('n: 1', 'n: 2')}")
    assert len(run.sealed()) == 4


def test_a_score_that_a_round_gave_which_was_rolled_back_is_not_replayed_and_does_not_count(tmp_path):
    write(tmp_path)
    text = f"{HEAD}  - {MARK}\n  - train: {{loss: sft, of: sample}}\n  - measure: reward/number.py:last_number\n"
    keep = "keep_if: dev_last_number < -1\n"
    go(recipe_in(tmp_path, text + keep), tmp_path / "run", backend())
    other = text.replace("highest: 5", "highest: 10") + keep
    assert len(go(recipe_in(tmp_path, other, "rounds=3"), tmp_path / "run", backend(), amend=True).sealed()) == 4


def test_a_score_of_the_steps_before_the_first_round_counts_where_these_are_replayed(tmp_path):
    """The reward is edited after round 0 gave it; what round 1 on would give under its name is another one."""
    write(tmp_path)
    text = HEAD.replace("  - replay\n", "  - replay: {before: true}\n").replace(
        "steps:", "before:\n  - sample: {n: 1, max_tokens: 64}\n  - score: mine.py:good\nsteps:", 1
    )
    text = f"{text}  - score: mine.py:good\n  - train: {{loss: sft, of: sample-2}}\n"
    go(recipe_in(tmp_path, text), tmp_path / "run", backend())
    (tmp_path / "mine.py").write_text(MINE.replace("return 1.0\n\ndef vote", "return 2.0\n\ndef vote"))
    with pytest.raises(ChainError, match=r"round-000.*gave 'good' by another reward"):
        go(recipe_in(tmp_path, text, "rounds=3"), tmp_path / "run", backend(), amend=True)


def test_another_model_that_reads_is_known_by_its_weights_and_not_by_its_folder():
    words = {"verb": "score", "name": "score", "classifier": "models/rm", "as": "good", "label": "good"}
    first = ways.scores_made("score", words, {"models/rm": "a"}, bool)
    assert ways.scores_made("score", {**words, "classifier": "other", "name": "s"}, {"other": "a"}, bool) == first
    other = ways.scores_made("score", words, {"models/rm": "b"}, bool)
    assert ways.unlike(first["good"], other["good"]) == ["classifier"]


def test_answers_that_were_brought_give_their_scores_by_what_was_read():
    words = {"verb": "bring", "name": "bring", "scores": ["good"], "id": None, "n": None, "others": "add", "as": "chat"}
    first = ways.scores_made("bring", words, {"data:bring": "a"}, bool)
    assert ways.scores_made("bring", {**words, "n": 3, "as": "x"}, {"data:bring": "a"}, bool) == first
    assert ways.unlike(first["good"], ways.scores_made("bring", words, {"data:bring": "b"}, bool)["good"]) == ["data"]
