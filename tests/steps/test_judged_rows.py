"""Scores worked out from others, rows that show what the judge saw, and words that change from round to round."""

from __future__ import annotations

from statistics import mean

import pytest
from chains import go, recipe_in
from judges import HEAD, of_length, scripted, table

from selfkd.chain.run import Run
from selfkd.errors import RecipeError
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load

SAMPLE = "  - sample: {n: 3, max_tokens: 64}\n"
JUDGE = '  - judge: {template: "Mark this: <<{{ of.text }}>>", highest: 60, n: 2, canaries: 0}\n'


def run_of(folder, steps: str, judging=of_length, rounds: int = 1) -> Run:
    return go(recipe_in(folder, HEAD + "steps:\n" + steps, f"rounds={rounds}"), folder / "run", scripted(judging))


# ---- a score by an expression ----


def test_a_score_may_be_worked_out_from_others_within_the_prompt(tmp_path):
    steps = '  - score: {value: "chars - AVG(chars) OVER (PARTITION BY prompt)", as: longer}\n'
    found = run_of(tmp_path, SAMPLE + steps).samples(1)
    for _, part in found.group_by("prompt"):
        middle = mean(part["chars"])
        assert part["longer"].to_list() == pytest.approx([chars - middle for chars in part["chars"]])


def test_a_value_that_is_null_or_no_number_is_no_score_and_says_why(tmp_path):
    steps = '  - score: {value: "CASE WHEN number < 2 THEN LN(number) END", as: mine}\n'
    scores = table(run_of(tmp_path, SAMPLE + steps), "score", "scores")
    assert set(scores.select("value", "why").iter_rows()) == {
        (0.0, None),
        (None, "its value is -inf"),
        (None, "its value is null"),
    }


def test_it_becomes_a_column_of_pairs(tmp_path):
    steps = '  - score: {value: "chars * 2", as: twice}\n  - build: {kind: pair, chosen: "number = 0", rejected: "number = 1", columns: {gap: "chosen_twice - rejected_twice"}}\n'
    run = run_of(tmp_path, SAMPLE + steps)
    chars = dict(run.samples(1).select("id", "chars").iter_rows())
    for [first, second], [column] in table(run, "build", "rows").select("samples", "columns").iter_rows():
        assert column == {"name": "gap", "value": 2.0 * (chars[first] - chars[second])}


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ('{value: "chars"}', "a score that is worked out needs a name: write as"),
        ('{value: "nothing", as: mine}', "no column 'nothing' in 'nothing'"),
        ('{value: "stream", as: mine}', "'stream' gives a text, where a number is wanted"),
        ('{value: "chars", elo: wins, as: mine}', "give one of 'reward', .*'elo', 'shuffled' and 'value'"),
    ],
)
def test_what_cannot_be_worked_out_is_refused_when_the_recipe_loads(tmp_path, step, said):
    with pytest.raises(RecipeError, match=said):
        recipe_in(tmp_path, HEAD + f"steps:\n{SAMPLE}  - score: {step}\n")


# ---- what the judge saw ----


@pytest.mark.parametrize(
    "build",
    [
        "{of: judgments, sees: asked}",
        '{of: judgments, sees: asked, kind: label, label: "number"}',
        '{of: judgments, sees: asked, kind: pair, chosen: "number = 0", rejected: "number = 1"}',
        '{of: judgments, sees: asked, kind: rank, by: "number", answers: 6}',
    ],
)
def test_a_judge_is_trained_on_what_it_was_shown(tmp_path, build):
    def by_draw(shown, seed):
        return f"Score: {seed % 60}"

    run = run_of(tmp_path, f"  - sample: {{max_tokens: 64}}\n{JUDGE}  - build: {build}\n", by_draw)
    judgments, rows = table(run, "judge", "samples"), table(run, "build", "rows")
    seen = dict(judgments.select("id", "teacher_messages").iter_rows())
    assert rows.height >= 12
    for samples, messages in rows.select("samples", "messages").iter_rows():
        assert messages == seen[samples[0]] and messages[-1]["content"].startswith("Mark this: <<")


def test_answers_of_one_row_that_were_shown_different_things_make_no_row(tmp_path):
    build = '  - build: {of: judgments, sees: asked, kind: pair, chosen: "number = 0", rejected: "number = 1", match: product, per_prompt: 50}\n'
    run = run_of(tmp_path, SAMPLE + JUDGE + build, lambda shown, seed: f"Score: {seed % 60}")
    seen = dict(table(run, "judge", "samples").select("id", "teacher_messages").iter_rows())
    rows = table(run, "build", "rows")
    assert rows.height and all(seen[one] == seen[other] for one, other in rows["samples"].to_list())
    assert "its answers were given to different messages" in set(table(run, "build", "drops")["reason"])


def test_without_it_the_student_sees_the_prompt_and_lint_says_what_that_teaches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = f"{SAMPLE}{JUDGE}  - build: {{of: judgments}}\n  - train: sft\n  - measure: reward/number.py:last_number\n"
    (tmp_path / "r.yaml").write_text(HEAD + "steps:\n" + steps)
    notes = lint(load("r.yaml")).notes
    assert any("learns to answer it with one: write sees: asked" in note for note in notes)
    (tmp_path / "r.yaml").write_text(HEAD + "steps:\n" + steps.replace("judgments}", "judgments, sees: asked}"))
    assert not any("sees: asked" in note for note in lint(load("r.yaml")).notes)


def test_a_view_and_what_the_teacher_saw_exclude_each_other(tmp_path):
    with pytest.raises(RecipeError, match="'sees: asked' shows what the sampler was asked"):
        recipe_in(tmp_path, HEAD + f'steps:\n{SAMPLE}  - build: {{sees: asked, view: "{{{{ prompt }}}}"}}\n')


def test_a_judge_of_judgments_may_show_what_they_were_about(tmp_path):
    meta = '  - judge: {name: meta, of: judgments, as: meta, pairwise: agree, pairs: 1, canaries: 0, template: "{{ of.teacher_messages[-1].content }} <<{{ of.text }}>> or <<{{ other.text }}>>"}\n'
    run = run_of(tmp_path, "  - sample: {max_tokens: 64}\n" + JUDGE + meta, lambda shown, seed: "Score: 3 [[A]]")
    texts = dict(run.samples(1).select("id", "teacher_messages").iter_rows())
    for messages, parents in table(run, "meta", "samples").select("teacher_messages", "parents").iter_rows():
        assert messages[-1]["content"].startswith(texts[parents[0]][-1]["content"] + " <<Score: 3")


# ---- words that change from round to round ----


def test_expressions_and_models_may_be_lists_one_entry_per_round(tmp_path):
    steps = (
        '  - sample: {n: 3, max_tokens: 64, model: [policy@base, policy@start, policy@round-1]}\n  - build: {where: ["number = 0", "number < 2"]}\n'
        "  - train: {loss: sft, from: [base, start]}\n"
    )
    run = run_of(tmp_path, steps, rounds=3)
    heads = [f"policy@{seal.models['policy'].digest[:12]}" for seal in run.sealed()]
    assert [set(table(run, "sample", "samples", index)["model"]) for index in (1, 2, 3)] == [{heads[0]}, {heads[1]}, {heads[1]}]
    assert [table(run, "build", "rows", index).height for index in (1, 2, 3)] == [12, 24, 24]


def test_each_entry_is_held_against_what_is_there(tmp_path):
    steps = '  - sample: {model: [policy, policy@round-2]}\n  - select: {where: ["chars > 1", "chars"]}\n'
    with pytest.raises(RecipeError) as told:
        recipe_in(tmp_path, HEAD + "steps:\n" + steps, "rounds=3")
    assert "'policy@round-2' cannot be there in round 2" in str(told.value)
    assert "'chars' gives a number, where true or false is wanted" in str(told.value)


def test_weights_that_only_one_round_names_stay_until_it_has_used_them(tmp_path):
    steps = "  - sample: {max_tokens: 64, model: [policy, policy, policy, policy@round-1, policy]}\n  - train: sft\n"
    recipe = recipe_in(tmp_path, HEAD + "keep: {last: 1, base: false}\nsteps:\n" + steps, "rounds=5")
    run = go(recipe, tmp_path / "run", scripted(of_length))
    assert set(table(run, "sample", "samples", 4)["model"]) == {f"policy@{run.sealed()[1].models['policy'].digest[:12]}"}
