"""What the walk over empty tables finds: each mistake with the line it stands on, and all of them at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfkd.errors import RecipeError
from selfkd.recipe.lint import Report, look
from selfkd.recipe.load import frozen, load, read

HEAD = """\
model: fake
rounds: 3
prompts:
  train: {file: train.jsonl}
  dev: {file: dev.jsonl}
steps:
"""
LINE = HEAD.count("\n") + 1  # of the first step
BEGIN = "  - sample: {n: 2}\n  - score: reward/number.py:last_number\n"
END = "  - train: sft\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, first in (("train", 1), ("dev", 100)):
        rows = [{"prompt": f"{k}+{k}?", "answer": str(2 * k), "solution": "add them"} for k in range(first, first + 4)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.py", "b.py"):
        names = ("ok", "number", "tokens", "text", "tiebreak", "model", "stream", "id", "cut", "ok_scored")
        Path(name).write_text("".join(f"def {one}(completion):\n    return 1.0\n" for one in names))


def recipe(steps: str, head: str = HEAD) -> str:
    Path("r.yaml").write_text(head + steps)
    return "r.yaml"


def problems(steps: str, *overrides: str, head: str = HEAD) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(recipe(steps, head), overrides)
    return caught.value.what.splitlines()


def looked(steps: str, head: str = HEAD) -> Report:
    return look(read(recipe(steps, head)))[0]


# ---- expressions of the wrong kind ----


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("select: {where: last_number}", "'where': 'last_number' gives a number, where true or false is wanted"),
        ("select: {where: text}", "'where': 'text' gives a text, where true or false is wanted"),
        ('select: {where: "stream = 1"}', "'where': 'stream = 1' cannot be computed: cannot compare string with numeric type"),
        ("select: {by: token_ids, limit: 1}", "'by': 'token_ids' gives a list or a structure, where a number or a text"),
        ('select: {dedup: "LENGTH(tokens)"}', "'dedup': 'LENGTH(tokens)' cannot be computed"),
        ("select: {of: prompts, where: last_number_max}", "'where': 'last_number_max' gives a number, where true or false"),
        ("sample: {where: n, as: more}", "'where': 'n' gives a number, where true or false is wanted"),
        ("sample: {of: sample, where: text, as: more}", "'where': 'text' gives a text, where true or false is wanted"),
        ("build: {where: tokens}", "'where': 'tokens' gives a number, where true or false is wanted"),
        ("build: {weight: text}", "'weight': 'text' gives a text, where a number is wanted"),
        (
            'build: {kind: pair, chosen: last_number, rejected: "last_number = 0", as: p}',
            "'chosen': 'last_number' gives a number, where true or false is wanted",
        ),
        (
            'build: {kind: pair, chosen: "last_number = 1", rejected: "last_number = 0", by: parents, as: p}',
            "'by': 'parents' gives a list or a structure, where a number or a text",
        ),
        (
            'build: {kind: pair, chosen: "last_number = 1", rejected: "last_number = 0", weight: chosen_text, as: p}',
            "'weight': 'chosen_text' gives a text, where a number is wanted",
        ),
    ],
)
def test_an_expression_of_the_wrong_kind_is_refused_when_the_recipe_loads(step, said):
    end = "  - train: {loss: dpo, of: p}\n" if "pair" in step else END
    [problem] = problems(BEGIN + f"  - {step}\n" + end)
    assert problem.startswith(f"r.yaml:{LINE + 2}  steps[2].{step.split(':')[0]}: {said}")


def test_a_verdict_of_a_round_must_be_true_or_false():
    [problem] = problems(BEGIN + END + "  - measure: reward/number.py:last_number\n", "keep_if=dev_last_number")
    assert problem.startswith(
        "keep_if=dev_last_number  keep_if: 'dev_last_number' gives a number, where true or false is wanted"
    )


@pytest.mark.parametrize("text", ["tokens = 1 garbage", "tokens = 1 AS garbage"])
def test_what_stands_behind_an_expression_is_not_taken_for_its_name(text):
    [problem] = problems(BEGIN + f'  - select: {{where: "{text}"}}\n' + END)
    assert f"'where': '{text}' is followed by 'garbage', which says nothing Is an AND or OR missing?" in problem


def test_a_pattern_of_columns_is_no_column():
    [problem] = problems(BEGIN + "  - select: {where: '\"^t.*$\" = 1'}\n" + END)
    assert "names several columns at once" in problem


def test_all_mistakes_of_all_steps_are_told_at_once_each_on_its_line():
    steps = """\
  - sample: {n: 2}
  - score: reward/number.py:last_number
  - select:
      where: last_number
      dedup: txt
      by: parents
      limit: 3
  - build: {weight: text, where: tokens}
  - train: {from: round-1}
"""
    found = problems(steps)
    assert [line.split(":")[1].split()[0] for line in found] == [str(LINE + k) for k in (3, 4, 5, 7, 7, 8)]
    assert [line.split("  ")[1].split(":")[0] for line in found] == [
        *["steps[2].select"] * 3,
        *["steps[3].build"] * 2,
        "steps[4].train",
    ]


def test_the_same_expression_for_chosen_and_rejected_is_refused():
    build = "  - build: {kind: pair, chosen: 'last_number  = 1', rejected: last_number = 1}\n  - train: dpo\n"
    [problem] = problems(BEGIN + build)
    assert "steps[2].build: 'chosen' and 'rejected' are the same" in problem


def test_text_may_be_compared_in_pairs():
    load(
        recipe(
            '  - sample: {n: 2}\n  - build: {kind: pair, chosen: "tokens > 1", rejected: "tokens < 9", where: "chosen_text <> rejected_text"}\n  - train: dpo\n'
        )
    )


# ---- models ----


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("  - sample: {model: policy@round-1, as: more}\n", "'model': 'policy@round-1' cannot be there in round 1: round 1 is not sealed yet"),
        ("  - sample: {model: judge, as: more}\n  - train: {role: judge, from: base}\n", "'model': 'judge' cannot be there in round 1"),
        ("  - score: {logprob: policy@round-2}\n", "'logprob': 'policy@round-2' cannot be there in round 1"),
        ("  - measure: {reward: reward/number.py:last_number, model: policy@round-0}\n", "'model': 'policy@round-0' cannot be there in round 0"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_there_yet_is_refused(step, said):
    assert any(said in problem for problem in problems(BEGIN + step + END))


def test_the_best_round_is_not_there_before_the_first_one():
    more = "best: {metric: dev/last_number}\nbefore:\n  - sample: {model: policy@best}\n  - train: sft\n"
    head = HEAD.replace("steps:\n", more + "steps:\n")
    [problem] = problems(BEGIN + END + "  - measure: reward/number.py:last_number\n", head=head)
    assert "before[0].sample: 'model': 'policy@best' cannot be there in round 0: round 0 is not sealed yet" in problem


@pytest.mark.parametrize("when", ["base", "start", "warm", "round-0", "now"])
def test_models_that_are_there_in_every_round_are_accepted(when):
    load(recipe(BEGIN + f"  - train: {{from: {when}}}\n"))


def test_a_round_behind_this_one_may_be_named_after_the_last():
    load(recipe(BEGIN + END + "after:\n  - sample: {model: policy@round-2, as: end}\n"))


# ---- names ----


def test_two_rewards_of_one_name_are_refused_and_told_apart_by_as():
    [problem] = problems(BEGIN + "  - score: reward/regex.py:last_number\n" + END)
    assert problem == (
        f"r.yaml:{LINE + 2}  steps[2].score: the score 'last_number' is that of reward/number.py:last_number already: "
        "give this one another name (as)"
    )
    load(recipe(BEGIN + "  - score: {reward: reward/regex.py:matches, as: form}\n  - select: form = last_number\n" + END))


def test_one_reward_may_score_twice_but_not_with_other_params():
    again = "  - score: {reward: a.py:ok, params: {k: 1}}\n"
    load(recipe("  - sample\n" + again + "  - sample: {as: more}\n" + again + END))
    [problem] = problems("  - sample\n" + again + again.replace("1", "2") + END)
    assert "the score 'ok' is that of a.py:ok with {'k': 1} already" in problem


@pytest.mark.parametrize("step", ["score: [a.py:ok, b.py:ok]", "score: {reward: [a.py:ok, b.py:ok], as: [x, x]}"])
def test_rewards_of_one_step_need_names_of_their_own(step):
    [problem] = problems(f"  - sample\n  - {step}\n" + END)
    assert f"r.yaml:{LINE + 1}  steps[1].score: two scores are called '" in problem and "name them apart (as)" in problem


def test_metrics_of_one_step_need_names_of_their_own():
    [problem] = problems("  - sample\n" + END + "  - measure: [a.py:ok, b.py:ok]\n")
    assert "steps[2].measure: two scores are called 'ok'" in problem
    named = load(recipe("  - sample\n" + END + "  - measure: {reward: [a.py:ok, b.py:ok], as: [here, there]}\n"))
    assert named.steps[-1].at(1).metrics()[:2] == ["dev/here", "dev/there"]


@pytest.mark.parametrize("name", ["number", "tokens", "text", "tiebreak", "model", "stream", "id"])
def test_a_reward_named_like_a_column_is_refused_unless_it_gets_another_name(name):
    for step in (f"  - score: a.py:{name}\n", f"  - measure: a.py:{name}\n"):
        [problem] = problems("  - sample\n" + step + END)
        assert f"a score cannot be called '{name}': that is a column of samples. Give it another name (as)" in problem
        load(recipe("  - sample\n" + step.replace(f"a.py:{name}", f"{{reward: a.py:{name}, as: mine}}") + END))


@pytest.mark.parametrize("name", ["null", "true", "false", "select", "union", "current_date", "user"])
def test_a_score_may_not_have_a_name_that_expressions_do_not_read_as_a_column(name):
    for verb in ("score", "measure"):
        [problem] = problems(f"  - sample\n  - {verb}: {{reward: a.py:ok, as: '{name}'}}\n" + END)
        assert f"a score cannot be called '{name}': expressions read that as a word of SQL" in problem


@pytest.mark.parametrize("where", ["cast(text as integer) > 0", "text::float > 0", "cast(finish_reason as integer) = 1"])
def test_an_expression_that_takes_every_text_for_a_number_is_refused_with_the_line_of_its_step(where):
    [problem] = problems(f'  - sample\n  - select: "{where}"\n' + END)
    assert "steps[1].select: 'where': " in problem and "fails on a text such as 'x'" in problem and "try_cast" in problem
    load(recipe('  - sample\n  - select: "try_cast(text as integer) > 0"\n' + END))


@pytest.mark.parametrize("reward", ["a.py:cut", "[a.py:ok, a.py:ok_scored]"])
def test_a_metric_may_not_be_called_like_a_count(reward):
    [problem] = problems("  - sample\n" + END + f"  - measure: {reward}\n")
    assert "is a number of every measure step: name it otherwise (as)" in problem


def test_as_needs_one_name_per_reward():
    [problem] = problems("  - sample\n  - score: {reward: [a.py:ok, a.py:cut], as: both}\n" + END)
    assert "'as' needs one name per reward: 2, not 1" in problem


def test_a_stream_called_like_a_score_is_said_where_either_could_be_meant():
    steps = "  - gold: {as: ok}\n  - sample\n  - score: a.py:ok\n  - build: {kind: pair, chosen: ok, rejected: sample}\n  - train: dpo\n"
    assert any("'ok' is a stream and a column: write \"stream = 'ok'\"" in problem for problem in problems(steps))


def test_rows_of_two_kinds_do_not_share_a_stream():
    build = '  - build: {kind: pair, chosen: "last_number = 1", rejected: "last_number = 0"}\n'
    found = problems(BEGIN + "  - build\n" + build + "  - train: dpo\n")
    assert "the stream 'rows' holds rows of kind sft already: give this one another name (as)" in found[0]


# ---- replay ----


def test_replay_before_sampling_is_refused_where_rounds_draw_prompts():
    steps = "  - replay\n  - sample\n" + END
    head = HEAD.replace("prompts:\n", "prompts:\n  take: 2\n")
    [problem] = problems(steps, head=head)
    assert "steps[1].sample: the prompts that 'replay' brings back would be asked again, beside the 2 of this round" in problem
    load(recipe("  - sample\n  - replay\n" + END, head))
    load(recipe(steps))


def test_a_stream_that_no_round_makes_cannot_be_replayed():
    [problem] = problems("  - replay: {of: smaple}\n  - sample\n" + END)
    assert "steps[0].replay: no stream 'smaple' here. Did you mean 'sample'?" in problem


# ---- templates, against the prompts that are there ----


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ('sample: {template: "{{ prompt.soluton }}"}', "no prompt has 'soluton'. Did you mean 'solution'?"),
        ('sample: {template: "{{ prompt.meta.soluton }}"}', "no prompt has 'soluton'. Did you mean 'solution'?"),
        ("sample: {template: '{{ prompt[\"soluton\"] }}'}", "no prompt has 'soluton'. Did you mean 'solution'?"),
        ('gold: "{{ prompt.solutoin }}"', "no prompt has 'solutoin'. Did you mean 'solution'?"),
        ('sample: {template: "{{ of.text }}"}', "'text' of nothing: this step works on prompts, so `of` is None here"),
    ],
)
def test_a_field_that_no_prompt_has_is_told_at_the_template(step, said):
    [problem] = looked(f"  - {step}\n" + END).problems
    assert problem == f"r.yaml:{LINE}  steps[0].{step.split(':')[0]}: template:1  {said}"


def test_a_field_that_no_sample_has_is_told_at_the_template():
    again = "  - sample: {of: sample, as: more, template: '{{ of.last_number }} {{ of.txt }} {{ prompt.text }}'}\n"
    [problem] = looked(BEGIN + again + END).problems
    assert "steps[2].sample: template:1  a sample has no 'txt' here. Did you mean 'text'?" in problem


def test_every_missing_field_of_every_template_is_told_at_once():
    Path("hint.j2").write_text("{{ prompt.text }}\n{{ prompt.hint }}\n")
    steps = "  - sample: {template: hint.j2}\n  - build: {view: ['{{ prompt.a }}', '{{ prompt.b }}']}\n" + END
    found = looked(steps).problems
    assert [problem.split(":")[1].split()[0] for problem in found] == [str(LINE), str(LINE + 1), str(LINE + 1)]
    assert "hint.j2:2  no prompt has 'hint'" in found[0]


def test_a_field_that_some_prompts_lack_is_told_with_their_number():
    with Path("train.jsonl").open("a") as file:
        file.write('{"prompt": "and now?", "answer": "1"}\n')
    [problem] = looked("  - sample: {template: '{{ prompt.solution }}'}\n" + END).problems
    assert problem.endswith("1 of 5 prompts have no 'solution': give them one, or write solution | default('')")


@pytest.mark.parametrize(
    "template",
    [
        "{{ prompt.hint | default('none') }}",
        "{% if prompt.hint is defined %}{{ prompt.hint }}{% endif %}",
        "{{ prompt.meta.get('hint') }}",
        "{% for prompt in [1] %}{{ prompt.real }}{% endfor %}",
        "{{ prompt.solution.upper() }} {{ prompt.text }} {{ prompt.answer }} {{ prompt.messages[0].role }}",
        "{% if of %}{{ of.text }}{% endif %}",
    ],
)
def test_a_template_that_can_do_without_a_field_is_accepted(template):
    assert looked(f"  - sample: {{told: own, template: {json.dumps(template)}}}\n" + END).problems == []


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ prompt }} {{ 1 / 0 }}", "template:1  ZeroDivisionError"),
        ("{{ prompt.answer.foo }}", "template:1  'str object' has no"),
    ],
)
def test_a_template_that_fails_for_every_prompt_is_told_with_its_step(template, said):
    [problem] = looked(f"  - sample: {{told: own, template: {json.dumps(template)}}}\n" + END).problems
    assert problem.startswith(f"r.yaml:{LINE}  steps[0].sample: ") and said in problem


def test_measured_prompts_are_those_of_their_split():
    Path("dev.jsonl").write_text('{"prompt": "100+1?", "answer": "101"}\n')
    steps = "  - sample: {template: '{{ prompt.solution }}'}\n" + END
    measure = "  - measure: {reward: a.py:ok, template: '{{ prompt.solution }}'}\n"
    [problem] = looked(steps + measure).problems
    assert f"r.yaml:{LINE + 2}  steps[2].measure: template:1  no prompt has 'solution'" in problem


def test_a_text_that_is_no_template_is_told_what_it_lacks():
    [problem] = looked('  - sample: {template: "Think hard."}\n' + END).problems
    assert "'Think hard.' is neither the name of a file nor a template" in problem
    assert "'Think hard. {{ prompt.text }}'" in problem


# ---- splits ----


def test_dev_and_test_of_the_same_prompts_are_refused():
    head = HEAD.replace("  dev:", "  test: {file: dev.jsonl}\n  dev:")
    assert looked(BEGIN + END, head).problems == ["prompts.dev: every prompt stands in 'test' too: separate the splits"]


def test_dev_prompts_found_in_test_are_refused_unless_the_recipe_drops_them():
    Path("test.jsonl").write_text('{"prompt": "100+100?", "answer": "200"}\n{"prompt": "7+8?", "answer": "15"}\n')
    head = HEAD.replace("  dev:", "  test: {file: test.jsonl}\n  dev:")
    [problem] = looked(BEGIN + END, head).problems
    assert problem.startswith("prompts.dev: 1 prompts stand in 'test' too, such as ")
    report = looked(BEGIN + END, "overlap: drop\n" + head)
    assert report.ok and "prompts.dev: 1 prompts that stand in 'test' too will be left out" in report.notes


# ---- what was judged once ----


def test_a_recipe_that_a_run_holds_is_read_as_it_was():
    words = load(recipe(BEGIN + END)).resolved()
    words["steps"][1]["score"]["reward"] = "a.py:tokens"
    assert frozen(words, Path("run")).steps[1].at(1).scores() == ["tokens"]


def test_fields_that_came_later_change_no_step_that_does_not_use_them():
    [measure] = [
        line.at(1) for line in load(recipe("  - sample\n" + END + "  - measure: a.py:ok\n")).steps if line.verb == "measure"
    ]
    later = {"as", "top_k", "stop", "system", "vllm"}
    assert not later & set(measure.identity())
    changed = measure.model_copy(update={"stop": ("\n",)})
    assert set(changed.identity()) & later == {"stop"}
