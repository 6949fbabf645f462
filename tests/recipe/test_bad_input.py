"""What a recipe of methods may get wrong, each refused or remarked on at its line with the reason: one table, so that none is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from selfkd.errors import RecipeError
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load

RECIPE = """\
model: fake
rounds: 2
prompts:
  train: [{prompt: "1 + 1?", answer: "2"}, {prompt: "2 + 2?", answer: "4"}]
  dev: [{prompt: "3 + 3?", answer: "6"}]
HEAD
steps:
  - sample: {n: 4, max_tokens: 64}
  - STEP
"""
JUDGE = "judge: {template: '{{ of.text }}', highest: 5}\n  - "
PAIRS = "build: {kind: pair, chosen: 'chars > 1', rejected: 'chars < 2'}\n  - "
MEASURE = "\n  - measure: reward/number.py:last_number"
SUM_OVER_ROWS = '''def mine(logps, mask):
    """The mean over all rows of a batch, so that a row's share depends on the others."""
    totals = (logps * mask).sum(-1)
    return totals - totals.mean()
'''
REFUSED = {
    "a judge that is trained chooses the best round": (
        "best: {metric: judge/at_highest}", JUDGE + "train: sft" + MEASURE, 6, "its judge, policy, is trained here",
    ),
    "a judge that is trained ends the run": (
        "stop: {patience: 2, metric: judge/at_highest}", JUDGE + "train: sft" + MEASURE, 6, "its judge, policy, is trained here",
    ),
    "a reference for a loss that has none": ("", "train: {loss: sft, reference: base}" + MEASURE, 9, "'reference' belongs to loss: dpo"),
    "best without a metric": ("best: {mode: max}", "train: sft" + MEASURE, 6, "'metric' is missing"),
    "best by a metric that nothing measures": ("best: {metric: dev/right}", "train: sft" + MEASURE, 6, "'dev/right' is not measured every round"),
    "the best round, and nothing says which that is": ("", "train: {loss: sft, from: best}" + MEASURE, 9, "best"),
    "patience without a metric": ("stop: {patience: 2}", "train: sft" + MEASURE, 6, "patience needs a metric"),
    "gold for a judge that did not declare it": (
        "", "judge: {template: '{{ of.text }} {{ prompt.answer }}', highest: 5}\n  - train: sft" + MEASURE, 9, "write told: own",
    ),
    "gold for a student that did not declare it": ("", "build: {view: '{{ prompt }} {{ prompt.answer }}'}\n  - train: sft" + MEASURE, 9, "write told: own"),
    "a loss that is not row-wise": ("", "build: {kind: sft}\n  - train: {loss: 'mine.py:mine', rows: sft}" + MEASURE, 10, "row"),
}  # fmt: skip
DOUBTED = {
    "all rounds' rows while training goes on from the newest model": (
        "", "replay: {}\n  - train: {loss: sft, from: start}" + MEASURE, 10, "brings all rounds back while training goes on",
    ),
    "scores of the model itself without an anchor": (
        "", JUDGE + "train: sft\n  - measure: reward/length.py:within", 9, "nothing is measured that it does not decide",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def said(head: str, steps: str) -> tuple[list[str], list[str]]:
    """Return (problems, notes) of lint, those of a recipe that cannot even be read included."""
    Path("mine.py").write_text(SUM_OVER_ROWS)
    Path("r.yaml").write_text(RECIPE.replace("HEAD", head).replace("STEP", steps))
    try:
        report = lint(load("r.yaml"))
    except RecipeError as error:
        return str(error).splitlines(), []
    return report.problems, report.notes


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_at_its_line_with_the_reason(what):
    head, steps, line, reason = REFUSED[what]
    problems, _ = said(head, steps)
    assert any(re.match(rf"r\.yaml:{line}\b", one) and reason in one for one in problems), problems


@pytest.mark.parametrize("what", DOUBTED)
def test_it_is_remarked_on_at_its_line_and_may_run(what):
    head, steps, line, reason = DOUBTED[what]
    problems, notes = said(head, steps)
    assert problems == []
    assert any(re.match(rf"r\.yaml:{line}\b", one) and reason in one for one in notes), notes
