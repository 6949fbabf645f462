"""What lint and --plan say of a judge before anything is asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from selfkd.recipe.lint import lint
from selfkd.recipe.load import load
from selfkd.recipe.plan import plan

RECIPE = """\
model: fake
rounds: 1
prompts:
  train: [{prompt: "1 + 1?", answer: "2", level: 3}, {prompt: "2 + 2?", answer: "4", level: 3}]
  dev: [{prompt: "3 + 3?", answer: "6", level: 3}]
steps:
  - sample: {n: 4, max_tokens: 64}
  - judge: JUDGE
  - train: sft
  - measure: reward/number.py:last_number
"""
LINE = 8
ONE = "{{ prompt }} <<{{ of.text }}>>"
TWO = "{{ of.text }} or {{ other.text }}"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def linted(words: str, recipe: str = RECIPE):
    Path("r.yaml").write_text(recipe.replace("JUDGE", words))
    return lint(load("r.yaml"))


def problems(words: str) -> list[str]:
    try:
        return linted(words).problems
    except Exception as error:
        return str(error).splitlines()


@pytest.mark.parametrize(
    "words",
    [
        f'{{template: "{ONE}", highest: 5}}',
        f'{{template: "{ONE}", highest: 5, lowest: -5, parse: tag, key: mark}}',
        '{template: "{% set said = of.text %}{{ said | upper | trim }} {{ prompt.level }}", highest: 5}',
        '{template: "{{ of }}", highest: 5}',
        "{template: \"{{ of['text'] }}\", highest: 5}",
        "{template: \"{{ of.get('text') }}\", highest: 5}",
        f'{{template: "{TWO}", pairwise: agree, pairs: 3}}',
        '{template: "{{ criterion }} {{ of.text }}", criteria: {brief: "Is it brief?", right: {ask: "Is it right?", weight: 2}}}',
    ],
)
def test_a_judge_that_is_shown_what_it_judges_is_sound(words):
    assert problems(words) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            '{template: "{{ prompt }} Good?", highest: 5}',
            "template  it does not show the answer: write {{ of.text }} where it belongs",
        ),
        (
            '{template: "{{ of.chars }} letters", highest: 5}',
            "template  it does not show the answer: write {{ of.text }} where it belongs",
        ),
        (
            '{template: "{{ of.text | length }}", highest: 5}',
            "template  it does not show the answer: write {{ of.text }} where it belongs",
        ),
        (
            '{template: "{% if of %}Good?{% endif %}", highest: 5}',
            "template  it does not show the answer: write {{ of.text }} where it belongs",
        ),
        (
            '{template: "{{ of.text }}", pairwise: agree}',
            "template  it does not show the answer that comes second: write {{ other.text }} where it belongs",
        ),
        (
            '{template: "{{ of.text }}", criteria: {brief: "Brief?"}}',
            "template  it does not show the criterion: write {{ criterion }} where it belongs",
        ),
        (
            f'{{template: "{TWO}", highest: 5}}',
            "template:1  unknown name 'other'.",
        ),
        (f'{{template: "{ONE} {{{{ of.lenth }}}}", highest: 5}}', "template:1  a sample has no 'lenth' here."),
        (
            f'{{template: "{ONE}"}}',
            "a mark needs its range: write highest, the best mark there is (and lowest, if that is not 0)",
        ),
        (f'{{template: "{ONE}", highest: 1, lowest: 1}}', "no mark is above 1 and at most 1: raise highest"),
        (f'{{template: "{ONE}", highest: 5, lowest: [0, 7]}}', "no mark is above 7 and at most 5: raise highest"),
        (f'{{template: "{ONE}", highest: 5, parse: letter}}', "'letter' does not read a mark: number, tag, json do"),
        (
            f'{{template: "{TWO}", pairwise: agree, parse: number}}',
            "'number' does not read a verdict on two answers: letter, tag, json do",
        ),
        (
            f'{{template: "{TWO}", pairwise: agree, highest: 5}}',
            "only a mark has a range, and this asks for a verdict on two answers",
        ),
        (f'{{template: "{TWO}", pairwise: both}}', "'pairwise' should be 'agree', 'average' or 'balance', not 'both'"),
        (
            f'{{template: "{ONE}", highest: 5, pairs: 3}}',
            "there are pairs only where answers are compared: write pairwise: agree",
        ),
        (f'{{template: "{ONE}", highest: 5, key: "<b>"}}', "'<b>' is no name of a tag or field"),
        (f'{{template: "{ONE}", criteria: {{}}}}', "'criteria' should not be empty"),
        (f'{{template: "{ONE}", criteria: {{brief: {{weight: 2}}}}}}', "'ask' is missing"),
        (f'{{template: "{ONE}", criteria: {{brief: {{ask: "B?", weight: 0}}}}}}', "should be above 0"),
        (f'{{template: "{ONE}", highest: 5, score: tokens}}', "a score cannot be called 'tokens': that is a column of samples"),
        (f'{{template: "{ONE}", highest: 5, of: smaple}}', "no stream 'smaple' here. Did you mean 'sample'?"),
        (
            f'{{template: "{ONE}", highest: 5, as: sample}}',
            "the stream 'sample' holds answers, and judgments are kept apart from them",
        ),
        (f'{{template: "{ONE}", highest: 5, max_tokens: 1024}}', "max_tokens 1024 leaves no room for a prompt"),
        (f'{{template: "{ONE}", highest: 5, model: polcy}}', "no model 'polcy'. Did you mean 'policy'?"),
        (f'{{template: "{ONE}", highest: 5, where: "chars"}}', "gives a number, where true or false is wanted"),
    ],
)
def test_what_cannot_be_judged_is_refused_at_its_line(words, said):
    found = problems(words)
    assert any(said in one for one in found), found
    assert all(one.startswith(f"r.yaml:{LINE}  steps[1].judge") for one in found), found


def test_pairs_of_one_answer_and_draws_that_are_one_draw_are_said_to_be_no_use():
    alone = RECIPE.replace("n: 4", "n: 1")
    report = linted(f'{{template: "{TWO}", pairwise: agree, n: 2, temperature: 0}}', alone)
    assert report.problems == []
    assert [note.partition("judge: ")[2] for note in report.notes if "judge" in note] == [
        "each prompt has one answer here, so nothing is compared: raise n of the sample step",
        "at temperature 0 all 2 judgments of an answer are the same one",
    ]
    assert not any("nothing is compared" in note for note in linted(f'{{template: "{TWO}", pairwise: agree}}').notes)


def test_judgments_are_no_stream_of_answers_for_steps_that_name_none():
    steps = f'{{template: "{ONE}", highest: 5}}\n  - build: {{kind: pair, chosen: judgments, rejected: sample}}'
    assert any("'chosen' names neither a stream nor a column: 'judgments'" in one for one in problems(steps))
    steps = f'{{template: "{ONE}", highest: 5}}\n  - build: {{kind: sft, of: judgments}}'
    assert problems(steps) == []
    assert any(
        "no stream 'judgments-canaries'" in one for one in problems(steps.replace("of: judgments", "of: judgments-canaries"))
    )


def test_strengths_need_comparisons():
    steps = f'{{template: "{TWO}", pairwise: agree}}\n  - score: {{elo: win}}'
    assert problems(steps) == [
        f"r.yaml:{LINE + 1}  steps[2].score: no comparisons 'win' here. Did you mean 'wins'? Comparisons: wins"
    ]
    marks = problems(f'{{template: "{ONE}", highest: 5}}\n  - score: {{elo: mark}}')
    assert "Comparisons: none: a judge step with pairwise comes first" in marks[0]


def test_a_score_of_two_judges_needs_two_names():
    twice = f'{{template: "{ONE}", highest: 5}}\n  - judge: {{template: "{ONE} Really?", highest: 5}}'
    assert any("the score 'mark' is that of judge policy by" in one for one in problems(twice))
    assert (
        problems(twice.replace("Really?", "Really?").replace('Really?", highest: 5', 'Really?", highest: 5, score: second'))
        == []
    )


def test_what_it_says_of_itself_may_steer():
    Path("r.yaml").write_text(
        RECIPE.replace("JUDGE", f'{{template: "{ONE}", highest: 5}}').replace(
            "rounds: 1", "rounds: 2\nkeep_if: judge_unread < 0.5"
        )
    )
    assert lint(load("r.yaml")).problems == []


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        (f'{{template: "{ONE}", highest: 5, n: 3}}', 2 * 4 * 3 + 3 * 3),
        (f'{{template: "{ONE}", highest: 5, n: 3, canaries: 0}}', 2 * 4 * 3),
        (f'{{template: "{TWO}", pairwise: agree}}', 2 * 6 * 2 + 3 * 3 * 2),
        (f'{{template: "{TWO}", pairwise: agree, pairs: 2, n: 2, canaries: 1}}', 2 * 2 * 2 * 2 + 3 * 2),
        ('{template: "{{ criterion }} {{ of.text }}", criteria: {a: "A?", b: "B?"}, canaries: 1}', 2 * 4 * 2 + 3 * 2),
    ],
)
def test_the_plan_counts_judgments_and_canaries(words, answers):
    Path("r.yaml").write_text(RECIPE.replace("JUDGE", words))
    lines = dict(plan(load("r.yaml")).lines)
    assert lines["round 1  judge"] == f"{answers:,} answers, {answers * 256:,} tokens"
    assert lines["round 1  train"].startswith("8 rows")  # judgments are none


def test_the_example_of_the_document_is_sound():
    document = Path(__file__).parents[2] / "docs/judges.md"
    [block] = re.findall(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL)
    Path("r.yaml").write_text(RECIPE[: RECIPE.index("  - sample")] + block + RECIPE[RECIPE.index("  - train") :])
    assert lint(load("r.yaml")).problems == []
