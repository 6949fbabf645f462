"""What the documents say is so: the commands exist, the recipe and the reward work as printed, the tree is the tree."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import consoles

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.cli import main
from selfkd.recipe import reference
from selfkd.recipe.load import load
from selfkd.steps import VERBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return consoles.blocks(ROOT / "README.md", language)


def test_the_recipe_and_the_reward_of_the_readme_make_a_chain(tmp_path, monkeypatch):
    [recipe], [reward, notebook] = blocks("yaml"), blocks("python")
    (tmp_path / "mine.yaml").write_text(recipe)
    (tmp_path / "mine.py").write_text(reward)
    for split, first in (("train", 10), ("dev", 50)):
        rows = [{"question": f"{first + i} + 1", "answer": str(first + i + 1)} for i in range(8)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    run = Run.open(load("mine.yaml", ["rounds=1"]), tmp_path / "run", Machine(backend="fake"))
    walk(run, Fake({}), run.begin())
    assert run.sealed()[1].metrics["dev/prompts"] == 8
    scope: dict = {"__name__": "mine"}
    exec(reward, scope)
    [examples] = doctest.DocTestFinder(exclude_empty=False).find(scope["right"], "right", module=False, globs=scope)
    assert doctest.DocTestRunner(verbose=False).run(examples) == doctest.TestResults(failed=0, attempted=1)
    monkeypatch.setattr("selfkd.report.notebook.read_machine", lambda path: Machine(backend="fake"))
    exec(notebook, {})
    assert len(Run.at(tmp_path / "runs/mine").sealed()) == 1 + load("mine.yaml").rounds


def test_every_command_of_the_documents_exists():
    named = {
        word
        for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]
        for word in re.findall(r"`?selfkd ([a-z]+)\b", path.read_text())
    }
    wanted = {"run", "resume", "status", "show", "verify", "lint", "try", "recipes", "cp", "doctor", "help"}
    assert wanted <= set(main.COMMANDS)
    words = {"runs", "is", "works", "on", "finds", "asks"}  # of sentences
    assert named - words <= set(main.COMMANDS), named - words - set(main.COMMANDS)


def test_the_tree_of_the_readme_names_every_module_in_its_package_and_nothing_else():
    tree = README[README.index("## The tree") : README.index("All documents:")]
    tree = tree[tree.index("\n  core/") : tree.index("\nrecipes/")]
    sections = dict(re.findall(r"^  (\w+)/(.*?)(?=^  \w+/|\Z)", tree + "\n", re.MULTILINE | re.DOTALL))
    packages = {path.parent.name: path.parent for path in (ROOT / "selfkd").glob("*/__init__.py")}
    assert sections.keys() == packages.keys()
    for name, folder in packages.items():
        there = {path.name for path in folder.rglob("*.py") if path.name != "__init__.py"}
        named = set(re.findall(r"\b\w+\.py\b", sections[name])) | {f"{verb}.py" for verb in VERBS if name == "steps"}
        assert named == there, name
    assert f"one file each: {' '.join(VERBS)}" in sections["steps"]


def test_the_programs_of_the_readme_are_scored_as_printed(tmp_path, monkeypatch, capsys):
    [line] = re.findall(r"^printf '%s\\n' '(.*)' > programs.jsonl$", README, re.MULTILINE)
    (tmp_path / "programs.jsonl").write_text(line + "\n")
    monkeypatch.chdir(tmp_path)
    assert main.main(["try", "reward/code.py:code_tests", "programs.jsonl"]) == 0
    assert "code_tests 1   1 of 1 tests" in README and "code_tests 1   1 of 1 tests" in capsys.readouterr().out


def test_every_file_that_the_documents_link_to_is_there():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_recipe_reference_is_that_of_the_schema():
    assert (ROOT / "docs/recipes.md").read_text().strip() == reference.text().strip()


def test_the_public_surface_is_what_it_was_meant_to_be():
    assert list(VERBS) == [
        "replay",
        "gold",
        "sample",
        "bring",
        "score",
        "judge",
        "apply",
        "select",
        "build",
        "train",
        "average",
        "measure",
    ]


def test_the_head_of_each_shipped_recipe_says_how_to_run_it_what_to_expect_and_what_is_as_in_the_paper():
    for path in (ROOT / "recipes").glob("*.yaml"):
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        for word in ("# run ", "# expect ", "# fidelity: "):
            assert any(line.startswith(word) for line in head), f"{path.name}: {word}"


def test_no_file_says_where_it_was_made():
    for path in [
        *ROOT.glob("*.*"),
        *(ROOT / "selfkd").rglob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        *(ROOT / "docs").glob("*"),
        *(ROOT / "locks").glob("*"),
    ]:
        if path.is_file() and path.suffix in (".py", ".md", ".txt", ".toml", ".yaml"):
            assert not re.search(r"/(root|home|work)/\w+/", path.read_text()), path.name


def test_every_file_that_contributing_names_is_there():
    """`core/pool.py` means selfkd/core/pool.py; a bare `test_x.py` or `checkpoint.py` lies in the folder named before it."""
    for row in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        folder = ROOT
        for name in re.findall(r"`([\w./-]+\.(?:py|json|md|yaml)|(?:selfkd|tests|reward|recipes|docs)/[\w/]*)`", row):
            homes = [folder / name, ROOT / name, ROOT / "selfkd" / name]
            [*found] = [path for path in homes if path.exists()]
            assert found, f"{name} in: {row[:100]}"
            folder = found[0] if found[0].is_dir() else found[0].parent


def test_every_name_that_contributing_gives_to_look_for_is_in_the_code():
    source = "\n".join(path.read_text() for path in (ROOT / "selfkd").rglob("*.py"))
    plain = {*VERBS, "trl", "extends", "num_tokens", "loss_type", "beta"}
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## To change X")[1].split("## The format")[0]
    for name in re.findall(r"`(\w+)`", table):
        defined = rf"(?m)\b(?:def|class) {name}\b|^{name}\b.*=|^\s+{name}: "
        assert name in plain or re.search(defined, source), name
