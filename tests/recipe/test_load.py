"""Recipes: every mistake is named with its file and line, all at once; what is right means what it says."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from selfkd.core import yamlfile
from selfkd.core.files import builtin_folder
from selfkd.core.yamlfile import Problems
from selfkd.errors import RecipeError, UsageError
from selfkd.prompts.read import read_prompts
from selfkd.recipe.load import frozen, load
from selfkd.recipe.schema import Recipe

SHIPPED = sorted(path.stem for path in (builtin_folder() / "recipes").glob("*.yaml"))
HEAD = """\
model: some/model
rounds: 3
prompts:
  train: {file: train.jsonl}
  dev: {file: dev.jsonl}
steps:
"""
LINE = HEAD.count("\n") + 1  # of the first step
STEPS = """\
  - sample: {n: 4}
  - score: reward/math.py:correct
  - select: {where: "correct = 1", per_prompt: 2}
  - train: {loss: sft, trl: {learning_rate: 1e-5}}
  - measure: reward/math.py:correct
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(text: str, name: str = "r.yaml") -> str:
    Path(name).write_text(text)
    return name


def loaded(steps: str = STEPS, *overrides: str, head: str = HEAD) -> Recipe:
    return load(written(head + steps), overrides)


def problems(steps: str, *overrides: str, head: str = HEAD) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        loaded(steps, *overrides, head=head)
    return caught.value.what.splitlines()


def names(recipe: Recipe, index: int) -> list[str]:
    return [step.name for step in recipe.steps_of(index)]


# ---- bad words ----


def test_a_misspelt_field_is_named_with_its_line_and_the_right_spelling():
    steps = "  - sample:\n      n: 4\n      temprature: 0.8\n"
    assert problems(steps) == [f"r.yaml:{LINE + 2}  steps[0].sample: no field 'temprature'. Did you mean 'temperature'?"]


def test_a_misspelt_field_of_the_recipe_is_named_with_its_line():
    assert problems(STEPS, head="ronds: 2\n" + HEAD) == ["r.yaml:1  no field 'ronds'. Did you mean 'rounds'?"]


def test_a_misspelt_field_inside_a_block_is_named_with_its_line():
    head = "keep:\n  last: 1\n  besst: true\n" + HEAD
    assert problems(STEPS, head=head) == ["r.yaml:3  keep: no field 'besst'. Did you mean 'best'?"]


def test_an_unknown_verb_lists_the_verbs():
    [problem] = problems("  - smaple: {n: 4}\n")
    assert problem.startswith(f"r.yaml:{LINE}  steps[0]: no verb 'smaple'. Did you mean 'sample'? Verbs: replay, gold, sample,")


def test_every_problem_is_told_at_once_in_the_order_of_the_lines():
    found = problems("  - smaple: {n: 4}\n  - sample: {n: none}\n  - score: reward/math.py:correct\n    n: 3\n", "rounds=-1")
    assert [problem.split("  ")[0] for problem in found] == [
        f"r.yaml:{LINE}",
        f"r.yaml:{LINE + 1}",
        f"r.yaml:{LINE + 3}",
        "rounds=-1",
    ]


def test_two_verbs_in_one_entry_are_refused():
    [problem] = problems("  - sample: {n: 4}\n    score: reward/math.py:correct\n")
    assert problem == f"r.yaml:{LINE}  steps[0]: one verb per step, not sample and score: start each with its own '- '"


def test_a_field_that_is_not_indented_is_told_how_to_be_one():
    [problem] = problems("  - sample:\n    n: 4\n")
    assert problem == f"r.yaml:{LINE + 1}  steps[0]: 'n' stands beside 'sample': indent it to be one of its fields"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("train: {lora: 16}", "steps[0].train: 'lora' is a mapping: write lora: {r: 16}"),
        ("train: {lora: true}", "steps[0].train: 'lora' is a mapping: write lora: {r: 8}"),
        ("sample: {n: 0}", "steps[0].sample: 'n' should be at least 1, not 0"),
        ("sample: {n: 2.5}", "steps[0].sample: 'n' should be a whole number, not 2.5"),
        ("sample: {n: [1, 2, 0]}", "steps[0].sample: 'n' should be at least 1, not 0"),
        ("sample: {temperature: warm}", "steps[0].sample: 'temperature' should be a number, not 'warm'"),
        ("sample: {stop: end}", "steps[0].sample: 'stop' should be a list, not 'end'"),
        (
            "train: {loss: dop}",
            "steps[0].train: 'loss' should be 'sft', 'dpo', 'kto', 'nft', 'sppo', 'cream', 'rrhf', 'pro', 'kd', a loss type of TRL or file.py:function, not 'dop'. Did you mean 'dpo'?",
        ),
        (
            "score: {}",
            "steps[0].score: give one of 'reward', 'logprob', 'entropy', 'certainty', 'classifier', 'pairwise', 'per_step', 'elo', 'shuffled' and 'value'",
        ),
        ("measure: correct", "steps[0].measure: 'correct' does not name a function: write file.py:function"),
        ("build: pair", "steps[0].build: pairs need 'chosen' and 'rejected'"),
        ("measure: {rewrad: a.py:f}", "steps[0].measure: no field 'rewrad'. Did you mean 'reward'?"),
        ("measure: {n: 2}", "steps[0].measure: 'reward' is missing"),
        ("sample: {name: Big One}", "steps[0].sample: a name is small letters, digits, '-' and '_', not 'Big One'"),
        ("sample: {name: steps}", "steps[0].sample: the name 'steps' is taken by the recipe itself"),
        (
            "sample: {max_tokens: 1024}",
            "steps[0].sample: max_tokens 1024 leaves no room for a prompt: context is 1024 tokens, prompt and answer together",
        ),
        (
            "score: reward/math.py:correct",
            "steps[0].score: there are no samples yet: a sample, gold or replay step comes first",
        ),
        ("sample: {of: draft}", "steps[0].sample: no stream 'draft' here. Streams: none yet"),
    ],
)
def test_a_wrong_value_is_said_in_plain_words(steps, said):
    assert problems(f"  - {steps}\n") == [f"r.yaml:{LINE}  {said}"]


def test_an_unknown_option_of_trl_is_named_with_its_line():
    steps = "  - sample: 4\n  - train:\n      loss: sft\n      trl:\n        learning_rte: 1e-5\n"
    assert problems(steps) == [
        f"r.yaml:{LINE + 4}  steps[1].train: trl has no field 'learning_rte'. Did you mean 'learning_rate'?"
    ]


def test_an_unknown_word_of_a_prompt_source_is_named_with_its_line():
    head = HEAD.replace("{file: dev.jsonl}", "{file: dev.jsonl, promt: question}")
    [problem] = problems(STEPS, head=head)
    assert problem == "r.yaml:5  prompts.dev: no field 'promt' for a source of kind file. Did you mean 'prompt'?"


def test_an_unknown_column_is_named_with_the_columns_there_are():
    [problem] = problems("  - sample: 4\n  - score: reward/math.py:correct\n  - select: {where: 'corect = 1'}\n")
    assert (
        problem == f"r.yaml:{LINE + 2}  steps[2].select: 'where': no column 'corect' in 'corect = 1'. Did you mean 'correct'?"
    )


def test_a_score_is_no_column_before_the_step_that_makes_it():
    [problem] = problems("  - sample: {where: 'correct_max < 1'}\n  - score: reward/math.py:correct\n")
    assert "steps[0].sample: 'where': no column 'correct_max'" in problem
    assert "Columns: id, source, answer, n" in problem


def test_dpo_without_pairs_says_what_to_put_before_it():
    [problem] = problems("  - sample: 4\n  - train: dpo\n")
    assert problem == (
        f"r.yaml:{LINE + 1}  steps[1].train: loss dpo needs rows of kind pair in stream 'rows' for policy: "
        "put `build: {kind: pair, ...}` before it (rows built so far: none)"
    )


def test_sft_on_pairs_is_refused():
    steps = "  - gold\n  - sample\n  - build: {kind: pair, chosen: gold, rejected: sample}\n  - train: sft\n"
    assert problems(steps) == [f"r.yaml:{LINE + 3}  steps[3].train: loss sft needs rows of kind sft; 'rows' holds pair rows"]


def test_measuring_without_a_dev_split_is_refused():
    head = HEAD.replace("  dev: {file: dev.jsonl}\n", "")
    [problem] = problems("  - measure: reward/math.py:correct\n", head=head)
    assert (
        problem
        == f"r.yaml:{LINE - 1}  steps[0].measure: there are no prompts for the split 'dev'. Splits: train; add prompts.dev"
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("base", "no model 'base'. Did you mean 'policy@base'? Roles: policy"),
        ("polcy", "no model 'polcy'. Did you mean 'policy'? Roles: policy"),
        ("policy@bst", "no model 'policy@bst'. Did you mean 'best'? After '@' comes now, start, base, warm, best or round-K"),
        ("policy@best", "which round is best? Write best: {metric: dev/..., mode: max} in the recipe"),
        ("policy@round-7", "'round-7' is never there to use: the last round is 3"),
    ],
)
def test_a_model_that_cannot_be_is_refused(model, said):
    assert problems(f"  - sample: {{model: {model}}}\n") == [f"r.yaml:{LINE}  steps[0].sample: 'model': {said}"]


def test_the_test_split_steers_nothing():
    head = HEAD.replace(
        "steps:", "  test: {file: test.jsonl}\nbest: {metric: test/correct}\nkeep_if: test_correct > 0.1\nsteps:"
    )
    said = "cannot steer: a split that steers is not a test any more. Use dev"
    assert problems(STEPS, head=head) == [
        f"r.yaml:7  best: 'metric' 'test/correct' {said}",
        f"r.yaml:8  keep_if: 'test_correct' {said}",
    ]


def test_only_the_engine_measures_the_test_split():
    head = HEAD.replace("steps:", "  test: {file: test.jsonl}\nsteps:")
    [problem] = problems("  - measure: {reward: reward/math.py:correct, split: test}\n", head=head)
    assert "leave the test split alone" in problem


def test_a_metric_that_is_not_measured_cannot_steer():
    head = HEAD.replace("steps:", "best: {metric: dev/corect}\nkeep_if: dev_corect > 0\nsteps:")
    found = problems(STEPS, head=head)
    assert found[0].startswith("r.yaml:6  best: 'metric' 'dev/corect' is not measured every round. Did you mean 'dev/correct'?")
    assert found[1].startswith("r.yaml:7  keep_if: no column 'dev_corect' in 'dev_corect > 0'. Did you mean 'dev_correct'?")


def test_two_steps_may_not_share_a_name():
    [problem] = problems("  - sample: {name: a}\n  - sample: {name: a}\n")
    assert problem == f"r.yaml:{LINE + 1}  steps[1].sample: the name 'a' is taken by steps[0].sample"


def test_two_steps_may_not_measure_one_metric():
    [problem] = problems("  - measure: a.py:right\n  - measure: {reward: b.py:right, n: 4}\n")
    assert (
        problem
        == f"r.yaml:{LINE + 1}  steps[1].measure: measure measures dev/right already: name this one otherwise (as), or use another split"
    )


# ---- bad files ----


def test_a_name_that_is_no_recipe_suggests_one():
    with pytest.raises(UsageError, match=r"no recipe 'quikstart'\. Did you mean 'quickstart'"):
        load("quikstart")


@pytest.mark.parametrize("name", ["own", "own/owm.yaml", "own/own.yml"])
def test_a_folder_or_a_path_that_is_no_recipe_suggests_the_one_that_lies_there(name):
    Path("own").mkdir()
    Path("own/own.yaml").write_text(HEAD)
    with pytest.raises(UsageError, match=f"no recipe '{name}'. Did you mean 'own/own.yaml'"):
        load(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: a\nmodel: b\n", "r.yaml:2  'model' stands here twice; first in r.yaml:1"),
        (
            "model: a\n\trounds: 2\n",
            "r.yaml:2  not valid YAML at column 1: found character '\\t' that cannot start any token (a tab: indent with spaces)",
        ),
        ("model: [a\n", "r.yaml:2  not valid YAML at column 1: expected ',' or ']', but got '<stream end>'"),
        (
            "model: !!python/object:os.system x\n",
            "r.yaml:1  tags such as '!!python/object:os.system' are not read: plain values only",
        ),
        ("- sample\n", "r.yaml:1  a recipe is a mapping of fields such as model, prompts and steps"),
        ("", "r.yaml:1  a recipe is a mapping of fields such as model, prompts and steps"),
        ("1: a\n", "r.yaml:1  a key must be a word, not 1"),
        ("model: a\n---\nmodel: b\n", "r.yaml:2  not valid YAML at column 1: but found another document"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(text, said):
    with pytest.raises(RecipeError) as caught:
        load(written(text))
    assert said in str(caught.value).splitlines()


def test_an_alias_bomb_is_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)
    ]
    with pytest.raises(RecipeError, match="more than 20000 values"):
        load(written("\n".join(lines)))


def test_bytes_that_are_no_text_are_refused():
    Path("r.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        load("r.yaml")


def test_numbers_and_words_follow_yaml_1_2():
    text = "a: 1e-5\nb: on\nc: yes\nd: 12:30\ne: 007\nf: true\ng: 0x10\nh: '5'\ni: ~\nj: 1_000\nk: .5\n"
    value = yamlfile.plain(yamlfile.parse(text, "r.yaml", Problems()))
    assert value == dict(a=1e-5, b="on", c="yes", d="12:30", e=7, f=True, g=16, h="5", i=None, j="1_000", k=0.5)
    assert yamlfile.plain(yamlfile.parse(yamlfile.dump(value), "r.yaml", Problems())) == value
    tricky = {"a": "1e-5", "b": 1e-05, "c": "true", "d": "null", "e": "5", "f": "", "g": "a: b", "h": "x\ny\n", "i": 1e22}
    assert yamlfile.plain(yamlfile.parse(yamlfile.dump(tricky), "r.yaml", Problems())) == tricky


# ---- extends and overrides ----


def test_extends_merges_one_parent_and_replaces_lists_and_other_sources():
    written(HEAD + STEPS, "parent.yaml")
    child = load(written("extends: parent.yaml\nrounds: 5\nprompts: {train: {hub: a/b}, take: 7}\nsteps:\n  - sample: 2\n"))
    assert (child.rounds, child.take, child.model) == (5, 7, "some/model")
    assert child.prompts.train == {"hub": "a/b"}
    assert child.prompts.dev == {"file": "dev.jsonl"}
    assert [line.name for line in child.steps] == ["sample"]


def test_a_problem_in_the_parent_is_told_with_the_parents_line():
    written(HEAD + "  - sample: {m: 4}\n", "parent.yaml")
    with pytest.raises(RecipeError, match=rf"^parent.yaml:{LINE}  steps\[0\].sample: no field 'm'"):
        load(written("extends: parent.yaml\n"))


def test_a_recipe_that_extends_itself_is_refused():
    with pytest.raises(RecipeError, match="extends itself"):
        load(written("extends: r.yaml\n"))


def test_a_missing_parent_is_told_with_its_line():
    with pytest.raises(RecipeError, match=r"r.yaml:2  extends: no recipe 'quickstrat.yaml'. Did you mean 'quickstart'"):
        load(written("rounds: 2\nextends: quickstrat.yaml\n"))


def test_overrides_reach_fields_steps_and_options():
    words = (
        "sample.n=8",
        "train.trl.learning_rate=2e-5",
        "prompts.train.limit=10",
        "rounds=5",
        "model=/path/of/one",
        "score=b.py:f",
        "select=f = 1",
    )
    recipe = loaded(STEPS, *words)
    sample, score, select, train, _ = recipe.steps_of(1)
    assert (sample.n, train.trl["learning_rate"], recipe.rounds, recipe.model) == (8, 2e-5, 5, "/path/of/one")
    assert (score.reward, select.where, recipe.prompts.train) == ("b.py:f", "f = 1", {"file": "train.jsonl", "limit": 10})


def test_an_override_may_be_a_list_a_null_or_a_template():
    recipe = loaded("  - sample: {template: x.j2, n: 3}\n", "sample.n=[1, 2]", "sample.template=null")
    assert [recipe.steps_of(r)[0].n for r in (1, 2, 3)] == [1, 2, 2]
    assert recipe.steps_of(1)[0].template is None
    assert loaded("  - sample\n", "sample.template={{ prompt.text }}: say").steps_of(1)[0].template == "{{ prompt.text }}: say"


def test_an_exact_name_wins_over_the_verb():
    steps = "  - sample: 4\n  - score: a.py:f\n  - score: b.py:g\n"
    recipe = loaded(steps, "score.timeout=3", "score-2.timeout=4")
    assert [step.timeout for step in recipe.steps_of(1)[1:3]] == [3, 4]


def test_a_verb_stands_for_the_only_step_that_has_it_and_else_lists_the_names():
    one = "  - sample: {name: draft}\n"
    assert loaded(one, "sample.n=2").steps_of(1)[0].n == 2
    [problem] = problems(one + "  - sample: {name: final}\n", "sample.n=2")
    assert problem == "sample.n=2  'sample' could be any of these steps: draft, final"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("smaple.n=2", "no field or step 'smaple'. Did you mean 'sample'? Steps: sample, score, select, train, measure"),
        ("sample.m=2", "steps[0].sample: no field 'm'. Fields: name, model, n,"),
        ("rounds", "an override is written key=value"),
        ("model.revision=x", "there is no 'revision' inside 'some/model', a plain value (r.yaml:1)"),
        ("sample.name=x", "steps[0].sample: names enter the seeds: give another one in the file"),
        ("steps=[]", "a list of steps is changed in the file; one step by its name: sample.n=4"),
    ],
)
def test_a_wrong_override_says_what_is_wrong_with_it(word, said):
    [problem] = problems(STEPS, word)
    assert problem.startswith(f"{word}  {said}")


# ---- what a recipe means ----


def test_steps_are_named_by_their_verbs_in_order():
    assert names(loaded("  - sample\n  - sample: {as: b}\n  - score: a.py:f\n"), 1) == ["sample", "sample-2", "score"]


def test_repeat_and_each_unroll_into_plain_steps():
    steps = (
        "  - repeat:\n      times: 2\n      steps:\n        - sample: {name: draft}\n"
        "  - each: [0.5, 1.0]\n    as: heat\n    steps:\n      - sample: {temperature: '${heat}', as: 'hot-${heat}'}\n"
    )
    recipe = loaded(steps)
    assert names(recipe, 1) == ["draft", "draft-2", "sample", "sample-2"]
    assert [(step.temperature, step.as_) for step in recipe.steps_of(1)[2:]] == [(0.5, "hot-0.5"), (1.0, "hot-1.0")]
    assert names(frozen(recipe.resolved(), Path.cwd()), 1) == names(recipe, 1)


@pytest.mark.parametrize(
    "group", ["repeat: {times: 0, steps: [sample]}", "repeat: 3", "each: a\n    steps: [sample]", "each: [a]"]
)
def test_a_group_in_another_form_says_how_it_is_written(group):
    [problem] = [line for line in problems(f"  - {group}\n") if "steps[0]" in line]
    assert "write " in problem


def test_a_list_of_numbers_is_one_per_round_and_the_last_repeats():
    steps = "  - gold\n  - sample\n  - build: {kind: pair, chosen: gold, rejected: sample}\n"
    steps += "  - train: {loss: dpo, beta: [0.1, 5.0], trl: {learning_rate: [5e-7, 1e-7], loss_type: [sigmoid]}}\n"
    trains = [loaded(steps).steps_of(r)[3] for r in (1, 2, 3)]
    assert [train.beta for train in trains] == [0.1, 5.0, 5.0]
    assert [train.trl for train in trains] == [{"learning_rate": rate, "loss_type": ["sigmoid"]} for rate in (5e-7, 1e-7, 1e-7)]


def test_round_0_measures_the_base_and_the_warmed_up_model():
    head = HEAD.replace(
        "steps:", "  test: {file: t.jsonl}\nbefore:\n  - gold\n  - train: sft\nafter:\n  - sample: {name: last}\nsteps:"
    )
    recipe = loaded(STEPS.replace("train: {", "train: {name: learn, "), head=head)
    assert names(recipe, 0) == ["load", "measure", "measure-test", "gold", "train", "measure-warm"]
    assert names(recipe, 1) == names(recipe, 2) == ["sample", "score", "select", "learn", "measure"]
    assert names(recipe, 3) == [*names(recipe, 1), "last", "measure-test"]
    assert [step.split for step in recipe.steps_of(3) if step.verb == "measure"] == ["dev", "test"]
    assert [step.name for step in recipe.closing_steps(3)] == ["last", "measure-test"]


def test_replay_brings_the_scores_of_earlier_rounds():
    steps = "  - replay\n  - select: {where: 'correct = 1'}\n  - sample\n  - score: reward/math.py:correct\n"
    assert names(loaded(steps), 1) == ["replay", "select", "sample", "score"]


def test_the_model_is_a_path_where_one_is_found_and_else_a_hub_id():
    Path("folder").mkdir()
    assert loaded(STEPS, "model=folder").model_source() == {"path": str(Path("folder").absolute()), "revision": None}
    assert loaded(STEPS, "model={path: a/b, revision: v1}").model_source() == {"path": "a/b", "revision": "v1"}


def test_patience_watches_the_best_metric_unless_it_names_another():
    recipe = loaded(STEPS, "best={metric: dev/tokens, mode: min}", "stop.patience=2")
    assert (recipe.stop.metric, recipe.stop.mode) == ("dev/tokens", "min")
    [problem] = problems(STEPS, "stop.patience=2")
    assert "patience needs a metric" in problem


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model=''", "'model' should not be empty"),
        ("name=../up", "'name' should be letters, digits, '.', '_' and '-', not '../up'"),
        ("model=[a]", "'model' should be text, not ['a']"),
        ("keep={last: -1}", "keep: 'last' should be at least 0, not -1"),
        ("exact=maybe", "'exact' should be 'auto', true or false, not 'maybe'"),
        ("prompts={take: 3}", "prompts: 'train' is missing"),
    ],
)
def test_a_wrong_value_of_a_field_is_said_in_plain_words(word, said):
    assert problems(STEPS.replace("  - measure: reward/math.py:correct\n", ""), word) == [f"{word}  {said}"]


# ---- strict values ----


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("sample: {n: true}", "'n' should be a whole number, not True"),
        ('sample: {n: "3"}', "'n' should be a whole number, not '3'"),
        ("sample: {n: 2.0}", "'n' should be a whole number, not 2.0"),
        ("sample: {n: [1, true]}", "'n' should be a whole number, not True"),
        ("sample: {temperature: true}", "'temperature' should be a number, not True"),
        ('sample: {temperature: "0.5"}', "'temperature' should be a number, not '0.5'"),
        ("sample: {temperature: 3}", "'temperature' should be at most 2.0, not 3"),
        ('sample: {where: ""}', "'where' should not be empty"),
        ('sample: {stop: [""]}', "'stop' should not be empty"),
        ("sample: {stop: x}", "'stop' should be a list, not 'x'"),
        ("measure: []", "'reward' should be text, not []"),
        ("build: {view: []}", "'view' should be text, not []"),
        ("replay: {kept: 1}", "'kept' should be true or false, not 1"),
        ("score: []", "'reward' should be text, not []"),
        (
            "train: {loss: {}}",
            "'loss' should be 'sft', 'dpo', 'kto', 'nft', 'sppo', 'cream', 'rrhf', 'pro', 'kd', a loss type of TRL or file.py:function, not {}",
        ),
    ],
)
def test_a_value_of_another_type_is_refused_and_nothing_is_read_into_it(step, said):
    found = problems(f"  - {step}\n  - sample\n  - train\n")
    assert any(problem.startswith(f"r.yaml:{LINE}  steps[0].{step.split(':')[0]}: {said}") for problem in found), found


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rounds=true", "'rounds' should be a whole number, not True"),
        ("exact=1", "'exact' should be 'auto', true or false, not '1'"),
        ("dither=0", "'dither' should be 'auto', true or false, not '0'"),
        ("keep={best: 1}", "keep: 'best' should be true or false, not 1"),
        ("keep_if=''", "'keep_if' should not be empty"),
        ("prompts.take=true", "prompts: 'take' should be a whole number, not True"),
    ],
)
def test_a_recipes_own_fields_are_as_strict(word, said):
    assert problems(STEPS.replace("  - measure: reward/math.py:correct\n", ""), word) == [f"{word}  {said}"]


@pytest.mark.parametrize(
    "step",
    ["sample: {temperature: 1e999}", "train: {trl: {learning_rate: -1e999}}", "score: {reward: a.py:f, params: {k: [1e400]}}"],
)
def test_a_number_beyond_all_numbers_is_refused_wherever_it_stands(step):
    problem = problems(f"  - sample\n  - {step}\n  - train\n")[0]
    assert problem.startswith(f"r.yaml:{LINE + 1}  '") and "is beyond the numbers that can be computed with" in problem


# ---- options of vLLM ----


@pytest.mark.parametrize("verb", ["sample: {vllm: {%s}}", "measure: {reward: a.py:f, vllm: {%s}}"])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("seed: 1", "vllm.seed is not passed on: each answer has a seed of its own, from the recipe's field `seed`"),
        ("n: 4", "vllm.n is not passed on: write it as a field of the step"),
        ("temperature: 0.2", "vllm.temperature is not passed on: write it as a field of the step"),
        ("stop_token_ids: [2]", "vllm.stop_token_ids is not passed on"),
        ("detokenize: false", "vllm.detokenize is not passed on"),
        ("min_pp: 0.5", "vllm has no field 'min_pp' here. Did you mean 'min_p'?"),
        ("temprature: 0.5", "vllm has no field 'temprature' here. Did you mean 'temperature'?"),
        ('min_p: "0.1"', "vllm.min_p should be a number, not '0.1'"),
        ("min_p: 1.5", "vllm.min_p should be at most 1, not 1.5"),
        ("min_tokens: true", "vllm.min_tokens should be a whole number, not True"),
        ("bad_words: no", "vllm.bad_words should be a list of texts, not 'no'"),
        ("structured_outputs: {rgex: a}", "vllm.structured_outputs has no field 'rgex'. Did you mean 'regex'?"),
    ],
)
def test_an_option_that_selfkd_decides_or_vllm_does_not_have_is_refused(verb, option, said):
    found = problems(f"  - {verb % option}\n  - sample: {{as: more}}\n  - train\n")
    assert found[0].startswith(f"r.yaml:{LINE}  steps[0].{verb.split(':')[0]}: {said}")


@pytest.mark.parametrize("verb", ["sample: {", "measure: {reward: a.py:f, "])
def test_a_least_length_above_the_longest_is_refused(verb):
    found = problems(f"  - {verb}max_tokens: 10, vllm: {{min_tokens: 50}}}}\n  - sample: {{as: more}}\n  - train\n")
    assert "vllm.min_tokens is 50, more than the step's max_tokens of 10" in found[0]
    loaded(f"  - {verb}max_tokens: 10, vllm: {{min_tokens: 10}}}}\n  - sample: {{as: more}}\n  - train\n")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("optim: adamw_torhc", "trl.optim has no choice 'adamw_torhc'. Did you mean 'adamw_torch'?"),
        ("lr_scheduler_type: cosin", "trl.lr_scheduler_type has no choice 'cosin'. Did you mean 'cosine'?"),
        (
            "lr_scheduler_type: greedy",
            "trl.lr_scheduler_type has no choice 'greedy'. It follows what is measured while training",
        ),
        ("max_steps: 0", "trl.max_steps must be above 0, not 0"),
        ("num_train_epochs: 0", "trl.num_train_epochs must be above 0, not 0"),
    ],
)
def test_an_option_that_would_fail_or_do_nothing_in_the_first_training_is_refused(option, said):
    [problem] = problems(f"  - sample\n  - train: {{trl: {{{option}}}}}\n")
    assert said in problem


def test_options_that_vllm_takes_pass():
    options = (
        "min_p: 0.05, repetition_penalty: 1.1, skip_special_tokens: false, structured_outputs: {choice: [a, b]}, logprobs: 0"
    )
    loaded(f"  - sample: {{vllm: {{{options}}}}}\n  - train\n  - measure: {{reward: a.py:f, vllm: {{{options}}}}}\n")


def test_measure_takes_what_sample_takes():
    words = "stop: [Q], top_k: 40, system: Be brief., vllm: {min_p: 0.1}, max_tokens: 9, template: '{{ prompt }}'"
    recipe = loaded(f"  - sample: {{{words}}}\n  - train\n  - measure: {{reward: a.py:f, {words}}}\n")
    sample, measure = recipe.steps[0].at(1), recipe.steps[2].at(1)
    same = ("stop", "top_k", "system", "vllm", "max_tokens", "template")
    assert [getattr(measure, name) for name in same] == [getattr(sample, name) for name in same]
    assert (sample.temperature, measure.temperature) == (1.0, 0.0)


# ---- prompt sources ----


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{hub: 5}", "'hub' should be text, not 5"),
        ("{file: 5}", "'file' should be text, not 5"),
        ("{file: a.jsonl, template: 5}", "'template' should be text, not 5"),
        ("{file: a.jsonl, prompt: 5}", "'prompt' should be text, not 5"),
        ("{file: a.jsonl, system: [a]}", "'system' should be text, not ['a']"),
        ("{file: a.jsonl, limit: true}", "'limit' should be a whole number of at least 1, not true"),
        ("{file: a.jsonl, limit: 0}", "'limit' should be a whole number of at least 1, not 0"),
        ("{file: a.jsonl, map: rows}", "'map' should be file.py:function, not 'rows'"),
        ("{rows: abc}", "'rows' should be a list of texts or mappings, at least one, not 'abc'"),
        ("{rows: []}", "'rows' should be a list of texts or mappings, at least one, not []"),
        ("{rows: [a, 5]}", "'rows' should be a list of texts or mappings, at least one, not ['a', 5]"),
        ("{function: 5}", "'function' should be text, not 5"),
        ("{function: a.py:f, params: [1]}", "'params' should be a mapping (name: value), not [1]"),
        ("{reasoning_gym: chain_sum}", "'reasoning_gym' should be a mapping (name: value), not 'chain_sum'"),
        ("{hub: null}", "'hub' should be text, not null"),
    ],
)
def test_a_word_of_a_prompt_source_of_another_type_is_refused_with_its_line(source, said):
    [problem] = problems(
        STEPS.replace("  - measure: reward/math.py:correct\n", ""), head=HEAD.replace("{file: train.jsonl}", source)
    )
    assert problem == f"r.yaml:4  prompts.train: {said}"


def test_a_word_of_a_prompt_source_that_is_null_is_left_out():
    Path("train.jsonl").write_text('{"prompt": "1+1?"}\n')
    recipe = loaded(
        "  - sample\n  - train\n", head=HEAD.replace("{file: train.jsonl}", "{file: train.jsonl, map: null, limit: null}")
    )
    assert read_prompts(recipe.prompts.train, recipe.folders, "train").height == 1


def test_a_recipe_survives_pickling():
    recipe = loaded()
    assert pickle.loads(pickle.dumps(recipe)).resolved() == recipe.resolved()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_loads_and_its_resolved_form_means_the_same(name):
    recipe = load(name)
    again = load(written(yamlfile.dump(recipe.resolved()), "resolved.yaml"))
    assert again.resolved() == recipe.resolved()
    for index in range(recipe.rounds + 1):
        assert [step.identity() for step in again.steps_of(index)] == [step.identity() for step in recipe.steps_of(index)]
    assert recipe.name == name


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_opens_with_paper_run_expectation_and_fidelity(name):
    head = (builtin_folder() / "recipes" / f"{name}.yaml").read_text().split("\nname:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert all(word in head for word in ("arXiv ", "# run ", "# expect ", "# fidelity: ", f"{name}"))
