"""The gold answer is shown to a model only where its step says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.chain.run import Run
from selfkd.errors import RecipeError
from selfkd.recipe.lint import look
from selfkd.recipe.load import load, read

RECIPE = """\
model: fake
rounds: 2
prompts:
  train:
    - {prompt: "1 + 1?", answer: "2", level: 3, solution: "1 and 1 are 2.", rubric: Be kind.}
    - {prompt: "2 + 2?", answer: "4", level: 3, solution: "2 and 2 are 4.", rubric: Be kind.}
  dev: [{prompt: "3 + 3?", answer: "6", level: 3, solution: "They are 6.", rubric: Be kind.}]
steps:
  - STEP
"""
GOLD, TRAIN = "{{ of.text }} {{ prompt.answer }}", "\n  - train: sft"
SAMPLED = "sample: {max_tokens: 64}\n  - "
FORMS = {
    "template of sample": "sample: {template: '{{ prompt.answer }}' TOLD}",
    "begin of sample": "sample: {begin: 'It is {{ prompt.answer }}' TOLD}",
    "template of judge": SAMPLED + f"judge: {{template: '{GOLD}', highest: 5 TOLD}}",
    "template of score": SAMPLED + f"score: {{logprob: policy@base, template: '{GOLD}' TOLD}}",
    "given of score": SAMPLED
    + "score: {logprob: policy@base, given: '{{ prompt.answer }}', target: '{{ prompt.answer }}.' TOLD}",
    "template of measure": SAMPLED + "measure: {reward: reward/number.py:last_number, template: '{{ prompt.answer }}?' TOLD}",
    "view of build": SAMPLED + "build: {view: ['{{ prompt }}', '{{ prompt }} {{ prompt.answer }}'] TOLD}",
    "completion of build": SAMPLED + f"build: {{completion: '{GOLD}' TOLD}}",
    "teacher of build": SAMPLED + "build: {kind: kd, teacher: '{{ prompt }} {{ prompt.answer }}' TOLD}",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def found(steps: str, recipe: str = RECIPE) -> list[str]:
    Path("r.yaml").write_text(recipe.replace("STEP", steps) + TRAIN.removeprefix("\n") + "\n")
    return [problem for problem in look(read("r.yaml"))[0].problems if "gold answer" in problem]


@pytest.mark.parametrize("form", FORMS)
def test_a_template_that_shows_the_gold_answer_is_refused_at_its_line_unless_the_step_declares_it(form):
    field, _, verb = form.partition(" of ")
    text = FORMS[form]
    [problem] = found(text.replace(" TOLD", ""))
    line = 9 + text[: text.index("TOLD")].count("\n")
    assert problem.startswith(f"r.yaml:{line}  ") and f".{verb}: '{field}' shows the gold answer to " in problem
    assert problem.endswith("If it is meant, write told: own in this step")
    assert found(text.replace(" TOLD", ", told: own")) == []


@pytest.mark.parametrize(
    "template", ["{{ prompt['answer'] }}", "{{ prompt | attr('answer') }}", "{% if prompt.answer == '2' %}x{% endif %}"]
)
def test_the_gold_answer_is_found_by_what_a_template_makes_of_it_and_not_only_by_its_name(template):
    [problem] = found(f'sample: {{template: "{template} {{{{ prompt }}}}"}}')
    assert "shows the gold answer to whoever answers" in problem


def test_a_column_that_holds_the_answer_of_each_prompt_is_gold_too_and_one_that_does_not_is_none():
    [problem] = found("sample: {template: '{{ prompt.solution }}'}")
    assert "'template' shows 'solution', which holds the gold answer, to whoever answers" in problem
    assert found("sample: {template: '{{ prompt.rubric }} {{ prompt.level }} {{ prompt }}'}") == []
    stated = RECIPE.replace("1 + 1?", "1 + 1: 2 or 3?").replace("2 + 2?", "2 + 2: 4 or 5?")
    assert found("sample: {template: '{{ prompt.solution }}'}", stated) == []  # a prompt with choices states its answer itself


@pytest.mark.parametrize(
    "template",
    [
        "{{ prompt.meta }}",
        "{% for name, value in prompt.meta.items() %}{{ value }}{% endfor %}",
        "{{ prompt.meta.get('solution') }}",
        "{% set one = prompt %}{{ one.solution }}",
        "{{ [prompt] | map(attribute='solution') | join }}",
    ],
)
def test_a_column_that_holds_the_answer_is_found_by_what_a_template_makes_of_it_too(template):
    [problem] = found(f'sample: {{template: "{template} {{{{ prompt }}}}"}}')
    assert "'template' shows 'solution', which holds the gold answer, to whoever answers" in problem
    assert found("sample: {template: '{{ prompt.meta.rubric }} {{ prompt.meta.get(1) }} {{ prompt }}'}") == []


def test_a_student_that_sees_what_its_sampler_was_asked_sees_the_gold_answer_that_this_one_was_told():
    told = "sample: {template: '{{ prompt.answer }}', told: own, as: hinted}\n  - sample: {as: plain}\n  - build: {of: STREAM, sees: asked}"
    [problem] = found(told.replace("STREAM", "hinted"))
    assert problem.startswith("r.yaml:11  ") and "'sees: asked' shows the gold answer to the student" in problem
    assert found(told.replace("STREAM", "plain")) == []
    assert found(told.replace("STREAM", "hinted, told: own")) == []
    pairs = told.replace("of: STREAM", "kind: pair, chosen: CHOSEN, rejected: plain")
    assert len(found(pairs.replace("CHOSEN", "hinted"))) == 1
    assert (
        found(
            pairs.replace("CHOSEN", "plain")
            .replace("rejected: plain", "rejected: other")
            .replace("as: plain", "as: plain}\n  - sample: {as: other")
        )
        == []
    )


@pytest.mark.parametrize(
    "template", ["{{ prompt.text }} ({{ prompt.answer }})", "{{ prompt.text }} ({{ answer }})", "{{ q }} {{ a }}"]
)
def test_a_prompt_cannot_show_its_own_gold_answer_to_everybody_who_reads_it(template):
    source = (
        "{rows: [{q: a, a: b}], prompt: q, answer: a, template: '%s'}"
        if "{{ a }}" in template
        else "{rows: [{prompt: a, answer: b}], template: '%s'}"
    )
    recipe = "model: fake\nprompts:\n  train: " + source % template + "\nsteps:\n  - STEP\n"
    [problem] = found("sample: {max_tokens: 64}", recipe)
    assert problem.startswith("r.yaml:3  prompts.train: 'template' shows the gold answer to everybody")
    assert "told: own" in problem


def test_a_run_is_refused_where_its_prompts_show_what_lint_could_not_read_and_a_resolved_recipe_keeps_the_declaration(tmp_path):
    from selfkd.backend.machine import Machine

    Path("r.yaml").write_text(RECIPE.replace("STEP", "sample: {template: '{{ prompt.answer }}'}" + TRAIN))
    with pytest.raises(RecipeError, match="shows the gold answer"):
        Run.open(load("r.yaml"), tmp_path / "refused", Machine(backend="fake"))
    Path("r.yaml").write_text(RECIPE.replace("STEP", "sample: {template: '{{ prompt.answer }}', told: own}" + TRAIN))
    Run.open(load("r.yaml"), tmp_path / "run", Machine(backend="fake"))
    assert look(load(str(tmp_path / "run" / "recipe.resolved.yaml")))[0].problems == []


def test_to_declare_it_changes_no_identity_so_that_runs_of_a_recipe_that_did_not_go_on():
    Path("r.yaml").write_text(
        RECIPE.replace("STEP", "sample: {told: own}\n  - measure: {reward: reward/number.py:last_number, told: own}" + TRAIN)
    )
    Path("s.yaml").write_text(RECIPE.replace("STEP", "sample: {}\n  - measure: reward/number.py:last_number" + TRAIN))
    with_it, without = ([line.at(1).identity() for line in load(name).steps] for name in ("r.yaml", "s.yaml"))
    assert with_it == without
