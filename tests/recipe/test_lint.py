"""What lint finds without a model: files, rewards, templates, prompts, and a walk with a fake model."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selfkd.backend.machine import Machine
from selfkd.chain.dry_run import dry_run, lint_and_walk
from selfkd.core.files import builtin_folder
from selfkd.recipe import plan, reference
from selfkd.recipe.lint import Doctests, Report, lint, look, try_rewards
from selfkd.recipe.load import load, read
from selfkd.recipe.pace import Pace
from selfkd.steps import VERBS

SHIPPED = sorted(path.stem for path in (builtin_folder() / "recipes").glob("*.yaml"))
RECIPE = """\
model: fake
rounds: 2
prompts:
  train: {file: train.jsonl, prompt: question, answer: answer}
  dev: {file: dev.jsonl, prompt: question, answer: answer}
steps:
  - sample: {n: 4, max_tokens: 64}
  - score: my.py:right
  - select: {where: "right = 1", per_prompt: 2}
  - train: sft
  - measure: my.py:right
"""
REWARD = '''
def right(completion: str, answer: str) -> float:
    """
    >>> right("so 42", "42")
    1.0
    """
    return float(completion.split()[-1] == answer)
'''


def sums(first: int, count: int = 20) -> str:
    rows = [{"question": f"{at} + {at}?", "answer": str(2 * at), "level": 1} for at in range(first, first + count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text(sums(1))
    Path("dev.jsonl").write_text(sums(100))
    Path("my.py").write_text(REWARD)


def linted(recipe: str = RECIPE, walked: bool = False) -> Report:
    Path("r.yaml").write_text(recipe)
    return (lint_and_walk if walked else lint)(load("r.yaml"))


def test_a_sound_recipe_has_no_problems_and_its_gold_answers_are_counted():
    report = linted()
    assert report.problems == []
    assert report.notes == [
        "my.py:right accepts 20 of 20 gold answers of 'train'",
        "my.py:right accepts 20 of 20 gold answers of 'dev'",
    ]


def test_the_columns_after_each_step_are_shown():
    found = dict(linted().columns)
    assert found["after score"] == {
        "samples": ["right"],
        "prompts": ["right_max", "right_mean", "right_n"],
        "pairs": ["chosen_right", "rejected_right"],
    }
    assert {"finish_reason", "tokens", "tiebreak", "text"} <= set(found["always"]["samples"])
    assert "right_max" in linted().text()


def test_a_missing_reward_file_is_told_with_the_line_of_its_step():
    report = linted(RECIPE.replace("score: my.py", "score: mine.py"))
    [problem] = report.problems
    assert problem.startswith("r.yaml:8  steps[1].score: mine.py  no file 'mine.py'. Did you mean 'my.py'?")


def test_a_missing_function_is_told_with_the_right_spelling():
    [problem] = linted(
        RECIPE.replace("my.py:right\n  - select", "my.py:rigth\n  - select").replace('"right', '"rigth')
    ).problems
    assert "no function 'rigth'" in problem and "Did you mean 'right'?" in problem


def test_a_parameter_that_no_column_fills_is_told():
    Path("my.py").write_text(
        REWARD.replace("answer: str)", "answer: str, levle: int = 0)").replace("levle: int = 0", "levle: int")
    )
    problems = linted().problems
    assert len(problems) == 2  # the score step and the measure step
    assert problems[0].startswith("r.yaml:8  steps[1].score: ")
    assert "asks for 'levle'" in problems[0] and "Did you mean 'level'?" in problems[0]


def test_a_reward_that_fails_its_own_doctest_is_told():
    Path("my.py").write_text(REWARD.replace("1.0\n", "0.5\n"))
    problems = linted().problems
    assert problems and all("0.5" in problem or "Expected" in problem for problem in problems)


def test_a_reward_that_refuses_gold_answers_is_told():
    Path("my.py").write_text(REWARD.replace("== answer", "== answer and answer != '8' and answer != '10'"))
    [problem] = linted().problems
    assert "my.py:right accepts 18 of 20 gold answers of 'train' (95% wanted). First: " in problem


def test_a_template_that_is_missing_or_names_something_unknown_is_told():
    Path("bad.j2").write_text("Say {{ promt.text }}")
    [unknown] = linted(RECIPE.replace("n: 4", "n: 4, template: bad.j2")).problems
    assert "r.yaml:7  steps[0].sample: " in unknown and "unknown name 'promt'. Did you mean 'prompt'?" in unknown
    [missing] = linted(RECIPE.replace("n: 4", "n: 4, template: god.j2")).problems
    assert "no file 'god.j2'" in missing


def test_a_torn_line_of_prompts_is_told_with_file_and_line():
    Path("train.jsonl").write_text(sums(1, 2) + '{"question": "3 + 3?", \n')
    assert any("train.jsonl:3" in problem for problem in linted().problems)


def test_what_is_wrong_with_a_prompt_file_is_told_with_the_line_of_the_recipe():
    Path("r.yaml").write_text(
        RECIPE.replace("file: train.jsonl", "file: trian.jsonl").replace(
            "prompt: question, answer: answer}\nsteps", "prompt: q}\nsteps"
        )
    )
    first, second = look(read("r.yaml"))[0].problems
    assert first.startswith("r.yaml:4  prompts.train: ") and "trian.jsonl" in first
    assert second.startswith("r.yaml:5  prompts.dev: ") and "dev.jsonl:1  no column 'q'" in second


def test_a_misspelt_reward_is_told_once_and_never_recommended_to_an_expression():
    Path("r.yaml").write_text(RECIPE.replace("score: my.py:right", "score: my.py:rihgt"))
    [problem] = look(read("r.yaml"))[0].problems
    assert "r.yaml:8" in problem and "Did you mean 'right'?" in problem


def test_an_empty_prompt_file_is_told():
    Path("train.jsonl").write_text("")
    assert any("no prompts" in problem for problem in linted().problems)


def test_train_prompts_found_in_dev_are_refused_unless_the_recipe_drops_them():
    Path("dev.jsonl").write_text(sums(15))
    [problem] = linted().problems
    assert "prompts.train: 6 prompts stand in 'dev' too" in problem
    report = linted("overlap: drop\n" + RECIPE)
    assert report.ok and any("6 prompts that stand in 'dev' too will be left out" in note for note in report.notes)


def test_repeated_prompts_are_noted():
    Path("train.jsonl").write_text(sums(1) + sums(1, 3))
    assert "prompts.train: 3 of 23 prompts repeat an earlier one" in linted().notes


def test_a_column_that_looks_like_the_gold_answer_nobody_named_is_noted():
    Path("train.jsonl").write_text(sums(1).replace('"answer"', '"response"'))
    notes = linted(RECIPE.replace("train.jsonl, prompt: question, answer: answer", "train.jsonl")).notes
    assert "prompts.train: no prompt has a gold answer; if it is in a column, write `answer: response`" in notes
    assert not any("prompts.dev: no prompt" in note for note in notes)


def test_prompts_on_a_hub_are_not_read_unasked():
    report = linted(RECIPE.replace("{file: train.jsonl,", "{hub: some/where,"))
    assert report.ok
    assert "prompts.train: some/where lies on a hub, so its rows were not read" in report.notes


def test_the_walk_runs_nothing_of_a_reward_and_its_examples_come_after_it(tmp_path):
    Path("my.py").write_text(f"open({str(tmp_path / 'loaded')!r}, 'a').close()\n" + REWARD)
    Path("r.yaml").write_text(RECIPE)
    recipe, told = load("r.yaml"), []
    report, frames = look(recipe)
    assert report.problems == [] and report.notes == [] and not Path("loaded").exists()
    assert try_rewards(recipe, frames, Doctests(recipe), told.append).notes == linted().notes
    assert told == ["trying my.py:right", "trying my.py:right"]  # on train, and on dev
    assert Path("loaded").exists()


def test_problems_of_files_and_of_words_are_told_together():
    text = (
        RECIPE.replace("score: my.py", "score: mine.py")
        .replace("right = 1", "right")
        .replace("train: sft", "train: {from: round-1}")
    )
    Path("r.yaml").write_text(text)
    problems = lint("r.yaml").problems
    assert [problem.split("  ")[1].split(":")[0] for problem in problems] == [
        "steps[1].score",
        "steps[2].select",
        "steps[3].train",
    ]
    assert [problem.split("  ")[0] for problem in problems] == ["r.yaml:8", "r.yaml:9", "r.yaml:10"]


def test_a_dry_run_walks_two_rounds_and_trains_in_both():
    Path("r.yaml").write_text(RECIPE)
    sealed = dry_run(load("r.yaml", ["rounds=7"]))
    assert [seal.round for seal in sealed] == [0, 1, 2]
    assert len({record.models["policy"].digest for record in sealed}) == 3


@pytest.mark.parametrize("most", [1, 8, 32])
def test_no_stand_in_is_cut_however_few_tokens_an_answer_may_have(most):
    short = linted(RECIPE.replace("max_tokens: 64", f"max_tokens: {most}"), walked=True)
    assert short.ok and short.notes[-1] == "two rounds were walked with a fake model"


def test_a_dry_run_that_keeps_nothing_is_noted_and_one_that_cannot_go_on_is_a_problem():
    nothing = linted(RECIPE.replace("right = 1", "right = 2"), walked=True)
    assert nothing.ok and any("kept nothing to train on" in note for note in nothing.notes)
    Path("my.py").write_text(REWARD.replace("return float", "if 'think' in completion: raise KeyError('no')\n    return float"))
    [problem] = linted(RECIPE, walked=True).problems
    assert problem.startswith("dry run: round-000/measure") and "could not be scored" in problem
    unread = linted(RECIPE.replace("{file: train.jsonl,", "{hub: some/where,"), walked=True)
    assert unread.ok and "could not score the stand-ins for prompts that lie on a hub" in unread.notes[-1]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_lints_and_walks_two_rounds(name):
    report = lint_and_walk(load(name))
    assert report.problems == []
    assert report.notes[-1] == "two rounds were walked with a fake model"


def test_linting_imports_no_torch():
    code = (
        "import sys; from selfkd.recipe.lint import lint; from selfkd.recipe.load import load; report = lint(load('r.yaml'));"
        "assert report.ok, report.text(); sys.exit(bool(set(sys.modules) & {'torch', 'ray', 'vllm', 'trl', 'datasets', 'transformers'}))"
    )
    Path("r.yaml").write_text(RECIPE)
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- plan ----


def test_a_plan_counts_upper_bounds_and_says_what_it_does_not_know():
    Path("r.yaml").write_text(RECIPE)
    lines = dict(plan.plan(load("r.yaml"), Machine()).lines)
    assert lines["prompts"] == "train 20, dev 20"
    assert lines["round 1  sample"] == "80 answers, 5,120 tokens"
    assert lines["round 1  select"] == "at most 40 samples kept"
    assert lines["round 1  train"].startswith("40 rows, 40 read in all")
    assert lines["all rounds"].startswith("25,600 tokens made")  # 2 rounds x 5,120 and 3 measures x 20 x 256
    assert lines["disk, time"] == "unknown until the model is here"
    assert lines["memory"].startswith("unknown: ")


def tiny_header(folder):
    """Write what says that a model has a million parameters, and none of them."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4]}}).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "config.json").write_text("{}")


def test_a_plan_knows_a_local_model_by_its_header(tmp_path):
    tiny_header(Path("m"))
    Path("r.yaml").write_text(RECIPE)
    lines = dict(plan.plan(load("r.yaml", ["model=m"]), Machine()).lines)
    assert lines["parameters"] == "about 1 million"
    assert lines["time"].startswith("up to a minute, roughly") and "generator" not in lines
    slow = dict(plan.plan(load("r.yaml", ["model=m"]), Machine(generator="transformers")).lines)
    assert slow["generator"].startswith("transformers (slow: ")


def test_a_plan_counts_with_the_pace_that_is_known(tmp_path):
    tiny_header(Path("m"))
    Path("r.yaml").write_text(RECIPE)
    pace = Pace(made=1e6 * 20, learned=1e6 * 10, source="as it was")
    lines = dict(plan.plan(load("r.yaml", ["model=m"]), Machine(), known=pace).lines)
    learned = int(re.search(r"made, ([\d,]+) tokens learned", lines["all rounds"])[1].replace(",", ""))
    minutes = math.ceil((25_600 / 20 + learned / 10 + 2 * 2) / 60)  # and two swaps of two seconds
    assert lines["time"].startswith(f"up to {minutes} minutes, as it was;")


@pytest.mark.parametrize(("exact", "minutes"), [("true", 18), ("false", 3)])
def test_a_plan_knows_which_engines_have_nothing_to_do(exact, minutes):
    """20 prompts asked 4 times are two chunks of 64; the 20 questions of a measure are one: of 8 engines two and one work."""
    tiny_header(Path("m"))
    Path("r.yaml").write_text(RECIPE)
    pace = Pace(made=1e6 * 20, learned=1e12, source="as it was")
    machine = Machine(generators=8, cards=8, card_gb=80.0)
    lines = dict(plan.plan(load("r.yaml", ["model=m", f"exact={exact}", "chunk=64"]), machine, known=pace).lines)
    made = 2 * 5_120 / (2 if exact == "true" else 8) + 3 * 20 * 256 / (1 if exact == "true" else 8)
    assert minutes == math.ceil((made / 20 + 2 * 2) / 60)
    assert lines["time"].startswith(f"up to {minutes} minutes, as it was;")


@pytest.mark.parametrize(
    ("rounds", "said"),
    [(2, None), (3, "round 2 is counted below and not listed"), (5, "rounds 2 to 4 are counted below and not listed")],
)
def test_a_plan_says_which_rounds_it_does_not_list(rounds, said):
    Path("r.yaml").write_text(RECIPE)
    lines = plan.plan(load("r.yaml", [f"rounds={rounds}"]), Machine()).lines
    assert dict(lines).get("…") == said
    if said:
        at = lines.index(("…", said))
        assert lines[at - 1][0].startswith("round 1 ") and lines[at + 1][0].startswith(f"round {rounds} ")


# ---- reference ----


def test_the_recipe_reference_is_current():
    shown = Path(builtin_folder() / "docs" / "recipes.md").read_text()
    assert shown == reference.text(), "run: python -m selfkd.reference > docs/recipes.md"


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_of_a_verb_is_described_in_its_help(verb):
    text = reference.verb_help(verb)
    assert all(field.description and field.description in text for field in VERBS[verb].model_fields.values())


def test_a_reward_that_accepts_a_near_miss_is_named_with_the_example():
    Path("my.py").write_text("def right(completion: str, answer: str) -> float:\n    return float(answer in completion)\n")
    report = linted()
    assert report.ok and any("'Answer: -2' where the answer is '2'" in note for note in report.notes)


def test_a_reward_that_cannot_tell_right_answers_from_wrong_ones_is_a_problem():
    Path("my.py").write_text("def right(completion: str, answer: str) -> float:\n    return 1.0\n")
    problems = linted().problems
    assert len(problems) == 2 and all("must tell them apart" in problem for problem in problems)


def test_a_reward_that_takes_only_the_whole_completion_is_noted():
    Path("my.py").write_text("def right(completion: str, answer: str) -> float:\n    return float(completion == answer)\n")
    assert "my.py:right gives a gold answer of 'train' its full mark only where it is the whole completion" in linted().notes


def test_a_gold_answer_that_the_reward_cannot_read_is_a_problem_before_the_run():
    Path("train.jsonl").write_text('{"question": "a", "answer": "1,5"}\n{"question": "b", "answer": "a lot"}\n')
    problems = linted(
        RECIPE.replace("score: my.py:right", "score: reward/number.py:last_number").replace("right = 1", "last_number = 1")
    )
    [problem] = problems.problems
    assert "accepts 0 of 2 gold answers of 'train'" in problem and "the gold answer '1,5' is not one number" in problem
    assert "train.jsonl:1  answer '1,5'" in problem and "train.jsonl:2  answer 'a lot'" in problem


NUMBERS = RECIPE.replace("score: my.py:right", "score: reward/number.py:last_number").replace("right = 1", "last_number = 1")


def test_one_unreadable_gold_answer_among_many_is_named_with_its_place_and_stops_what_the_run_would_stop_at():
    Path("train.jsonl").write_text(sums(1, 29) + '{"question": "3 + 4?", "answer": "seven"}\n')
    [problem] = linted(NUMBERS).problems
    assert "r.yaml:8  steps[1].score: " in problem and "accepts 29 of 30 gold answers" in problem
    assert "train.jsonl:30  answer 'seven': " in problem and "max_failed is 1%" in problem


def test_an_unreadable_gold_answer_that_max_failed_allows_is_a_note():
    Path("train.jsonl").write_text(sums(1, 29) + '{"question": "3 + 4?", "answer": "seven"}\n')
    allowed = NUMBERS.replace(
        "score: reward/number.py:last_number", "score: {reward: reward/number.py:last_number, max_failed: 0.1}"
    )
    report = linted(allowed)
    assert report.problems == []
    assert any("train.jsonl:30  answer 'seven'" in note for note in report.notes)


def test_a_reward_whose_code_raises_on_every_gold_answer_is_told_once_with_its_line_a_count_and_an_example():
    Path("my.py").write_text(
        "def right(completion: str, answer: str) -> float:\n    return completion.split('@')[5] == answer\n"
    )
    problems = linted().problems
    assert len(problems) == 2 and all("Its code raised on 20 of them (max_failed is 1%)" in problem for problem in problems)
    once = "train.jsonl:1  answer '2': right (my.py:2): IndexError: list index out of range (so it is for 20 answers)"
    assert once in problems[0] and problems[0].count("IndexError") == 1
    assert problems[0].endswith("mend the reward first.") and "mend the gold answers" not in problems[0]


def test_a_reward_that_returns_no_number_for_any_gold_answer_is_told_once():
    Path("my.py").write_text("def right(completion: str, answer: str):\n    return 'yes'\n")
    problem, _ = linted().problems
    assert "It cannot read 20 of them" in problem
    assert problem.count("right (my.py:1): returned str 'yes', expected a number (so it is for 20 answers)") == 1


def test_a_trl_function_that_fails_on_the_gold_answer_of_every_prompt_is_a_problem():
    Path("my.py").write_text(
        "def right(completions, **kwargs):\n    return [float(x) for x in kwargs['solution'][0]['text']]\n"
    )
    problems = linted().problems
    assert any("accepts 0 of 20" in problem and "TypeError" in problem for problem in problems)
