"""What lint says where the model that is trained also says whether it is good."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.errors import RecipeError
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load

RECIPE = """\
model: fake
rounds: 2
prompts:
  train: [{prompt: "1 + 1?", answer: "2", level: 3}, {prompt: "2 + 2?", answer: "4", level: 3}]
  dev: [{prompt: "3 + 3?", answer: "6", level: 3}]
steps:
  - sample: {n: 4, max_tokens: 64}
  - JUDGED
  - train: sft
  - measure: MEASURED
"""
JUDGE = "judge: {template: '{{ of.text }}', highest: 5}"
GOLD, LENGTH = "reward/number.py:last_number", "reward/length.py:within"
MINE = '''def mine(completion, {}):
    """
    >>> 1
    1
    """
    return 1.0
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def notes(judged: str, measured: str, recipe: str = RECIPE) -> list[str]:
    Path("r.yaml").write_text(recipe.replace("JUDGED", judged).replace("MEASURED", measured))
    return [note for note in lint(load("r.yaml")).notes if "anchor" in note or "pleases" in note]


@pytest.mark.parametrize(
    ("judged", "said"),
    [
        (JUDGE, "what policy says of answers"),
        ("judge: {template: '{{ of.text }}', highest: 5, model: policy@base}", "what policy@base says of answers"),
        ("score: {logprob: policy@base}", "what policy@base says of answers"),
        ("score: reward/vote.py:majority", "votes among the answers"),
    ],
)
def test_scores_of_the_model_alone_are_remarked_on_with_what_they_cannot_tell(judged, said):
    [note] = notes(judged, LENGTH)
    assert note.startswith("r.yaml:8") and said in note
    assert "longer answers" in note and "forgotten elsewhere" in note and "Add an anchor: `measure`" in note
    assert notes(judged, GOLD) == []


@pytest.mark.parametrize(("names", "anchored"), [("answer", True), ("level", True), ("sample", False), ("most=3", False)])
def test_an_anchor_reads_of_the_prompt_what_no_model_wrote(names, anchored):
    Path("mine.py").write_text(MINE.format(names))
    assert (notes(JUDGE, "mine.py:mine") == []) == anchored


def test_a_reward_that_reads_gold_in_training_is_an_anchor_too_and_without_opinions_there_is_nothing_to_say():
    assert notes(f"score: {GOLD}", LENGTH) == []
    assert notes(f"score: {LENGTH}", LENGTH) == []


@pytest.mark.parametrize("word", ["best", "stop"])
def test_a_judge_that_is_trained_may_not_choose_the_round_that_pleases_it(word):
    more = f"rounds: 2\n{word}: {{metric: judge/at_highest}}"
    Path("r.yaml").write_text(RECIPE.replace("JUDGED", JUDGE).replace("MEASURED", GOLD).replace("rounds: 2", more))
    with pytest.raises(RecipeError, match=r"r.yaml:3  .*its judge, policy, is trained here.*or let policy@base judge"):
        load("r.yaml")
    Path("r.yaml").write_text(Path("r.yaml").read_text().replace("highest: 5", "highest: 5, model: policy@base"))
    assert lint(load("r.yaml")).problems == []


def test_a_condition_on_it_is_only_remarked_on():
    recipe = RECIPE.replace("rounds: 2", "rounds: 2\nkeep_if: judge_unread < 0.5 AND dev_last_number >= 0")
    [note] = notes(JUDGE, GOLD, recipe)
    assert note.startswith("r.yaml:3") and "'judge_unread' is what 'judge' says of its own judgments" in note
    assert notes(JUDGE.replace("highest: 5", "highest: 5, model: policy@base"), GOLD, recipe) == []
