"""Training rows on a page: what is learned told from what is only read, to the token where the run has a tokenizer."""

from __future__ import annotations

from chains import RECIPE, go, recipe_in
from pages import page, seen
from speaking import Speaking
from template_kinds import kind_named

from selfkd.report.page import beneath, opened


def test_a_prompt_is_read_and_an_answer_with_its_end_is_learned(tmp_path):
    text = RECIPE.replace("last_number", "whole").replace("reward/number.py:whole", "long.py:whole")
    (tmp_path / "long.py").write_text("def whole(completion: str) -> float:\n    return 1.0\n")
    run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run", Speaking(kind_named("no system role")))
    found = beneath.training(opened.open_run(run.folder))
    assert found and found.tokens and found.index == 1
    [(name, spans)] = found.shown[0].sides.items()
    assert name == "completion" and spans[0].control and spans[0].text == "<s>" and not spans[0].trained
    learned = [one.trained for one in spans]
    assert learned == sorted(learned) and {*learned} == {True, False}  # first what is read, then what is learned
    assert (spans[-1].text, spans[-1].control) == ("<end_of_turn>", True)
    marked = [attributes["class"] for attributes in seen(page(run.folder)).named("span") if "class" in attributes]
    assert "masked control" in marked and "learned control" in marked


def test_without_a_tokenizer_rows_are_shown_by_their_messages(done):
    found = beneath.training(opened.open_run(done))
    assert found and not found.tokens
    [(name, (asked, said))] = found.shown[0].sides.items()
    assert name == "completion" and asked.text.startswith("[user] What is") and not asked.trained
    assert "Answer:" in said.text and said.trained
    assert "no tokenizer of this run can be read here" in seen(page(done)).words
