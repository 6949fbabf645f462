"""A reward runs from a copy of its file and of the local files it needs, in an empty folder: in lint, in try and in a run."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from chains import RECIPE, end, go, recipe_in
from scoring import results, row

from selfkd.core.pool import Function
from selfkd.core.source_code import code_digest
from selfkd.errors import UsageError
from selfkd.recipe.library import copy
from selfkd.recipe.lint import lint
from selfkd.rewards.check import run_doctests
from selfkd.rewards.contract import Result
from selfkd.rewards.find import find_function
from selfkd.rewards.isolate import sweep
from selfkd.rewards.load import load
from selfkd.rewards.pool import close_idle_workers


@pytest.fixture(autouse=True)
def no_worker_left():
    yield
    close_idle_workers()


def laid_out(folder: Path, files: dict[str, str], reference: str = "mine.py:f") -> Function:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return find_function(reference, [folder])


LAYOUTS = {  # each gives 3 to every completion
    "a package with an __init__ that has what is asked": {
        "mine.py": "from kit import LIMIT\ndef f(completion): return LIMIT",
        "kit/__init__.py": "LIMIT = 3",
    },
    "a module of a package, whose __init__ sets it": {
        "mine.py": "import kit.deep.part as part\ndef f(completion): return part.LIMIT",
        "kit/__init__.py": "START = 1",
        "kit/deep/__init__.py": "import kit\nkit.START += 1",
        "kit/deep/part.py": "import kit\nLIMIT = kit.START + 1",
    },
    "a package without an __init__": {
        "mine.py": "from kit.part import LIMIT\ndef f(completion): return LIMIT",
        "kit/part.py": "LIMIT = 3",
    },
    "a module beside it, relatively": {
        "mine.py": "from . import helpers\nfrom .helpers import ONE\ndef f(completion): return helpers.LIMIT + ONE",
        "helpers.py": "from .more import LIMIT\nONE = 1",
        "more.py": "LIMIT = 2",
    },
    "what the __init__ beside it has, relatively": {
        "mine.py": "from . import LIMIT\ndef f(completion): return LIMIT",
        "__init__.py": "LIMIT = 3",
    },
    "importlib and a name": {
        "mine.py": "import importlib\nhelpers = importlib.import_module('helpers')\ndef f(completion): return helpers.LIMIT",
        "helpers.py": "LIMIT = 3",
    },
    "an import inside the function": {
        "mine.py": "def f(completion):\n    import helpers\n    return helpers.LIMIT",
        "helpers.py": "LIMIT = 3",
    },
    "a helper called like an installed package": {
        "mine.py": "import yaml\nimport polars\ndef f(completion): return yaml.LIMIT + polars.ONE",
        "yaml.py": "LIMIT = 2",
        "polars/__init__.py": "ONE = 1",
    },
    "a helper called like a module of the standard library is not imported": {
        "mine.py": "import math, json\ndef f(completion): return math.floor(3.5)",
        "math.py": "raise ValueError('mine')",
        "json/__init__.py": "raise ValueError('mine')",
    },
    "data that FILES names": {
        "mine.py": "from pathlib import Path\nFILES = ['words.txt', 'data/more.json']\nHERE = Path(__file__).parent\n"
        "WORDS = (HERE / 'words.txt').read_text().split()\n"
        "def f(completion): return len(WORDS) + int(open('data/more.json').read())",
        "words.txt": "a b",
        "data/more.json": "1",
    },
    "a module whose name is made at run time, named by FILES": {
        "mine.py": "import importlib\nFILES = ['helpers.py']\nhelpers = importlib.import_module('hel' + 'pers')\n"
        "def f(completion): return helpers.LIMIT",
        "helpers.py": "LIMIT = 3",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_reward_needs_of_the_files_around_it_is_in_the_copy_that_runs(tmp_path: Path, layout: str) -> None:
    assert results(laid_out(tmp_path, LAYOUTS[layout]), [row()]) == [(3.0, "")]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "standard library" not in name])
def test_every_file_that_is_needed_is_in_the_digest(tmp_path: Path, layout: str) -> None:
    before = laid_out(tmp_path, LAYOUTS[layout]).digest
    for name, text in LAYOUTS[layout].items():
        (tmp_path / name).write_text(
            text.replace("2", "7").replace("3", "7").replace("= 1", "= 7").replace("+ 1", "+ 7") + "\nX = 1\n"
        )
        assert code_digest(tmp_path / "mine.py") != before, name
        (tmp_path / name).write_text(text)
    assert code_digest(tmp_path / "mine.py") == before


def test_a_relative_import_may_reach_above_the_folder_of_the_reward(tmp_path: Path) -> None:
    files = {
        "project/rewards/mine.py": "from ..util import LIMIT\ndef f(completion): return LIMIT",
        "project/util.py": "from .numbers import LIMIT",
        "project/numbers.py": "LIMIT = 3",
    }
    assert results(laid_out(tmp_path, files, "project/rewards/mine.py:f"), [row()]) == [(3.0, "")]


LEFT_BEHIND = {  # what works beside its neighbours and would fail in a run -> what the message says of it
    "data at import": ("WORDS = open(__file__.replace('mine.py', 'words.txt')).read()", "words.txt", "FILES = ["),
    "a module from a folder put on the path": (
        "import sys, os\nsys.path.append(os.path.join(os.path.dirname(__file__), 'lib'))\nimport util",
        "util",
        "FILES = [",
    ),
    "a name made at run time": ("import importlib\nimportlib.import_module('hel' + 'pers')", "helpers", "helpers.py"),
}


@pytest.mark.parametrize("case", LEFT_BEHIND)
def test_what_no_import_statement_names_is_missing_at_lint_with_the_way_out(tmp_path: Path, case: str) -> None:
    source, missing, way_out = LEFT_BEHIND[case]
    files = {"mine.py": f"{source}\ndef f(completion): return 1", "words.txt": "a", "lib/util.py": "", "helpers.py": ""}
    with pytest.raises(UsageError) as caught:
        run_doctests(laid_out(tmp_path, files))
    said = str(caught.value)
    assert f"{tmp_path}/mine.py  f could not be loaded" in said and missing in said and way_out in said
    assert "selfkd-rewards" not in said  # the copy is nothing to a person


def test_the_working_directory_is_no_place_to_import_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m selfkd` puts it on Python's path; a run that goes on from elsewhere would not find the module."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {"rewards/mine.py": "import kit_of_mine\ndef f(completion): return 1", "kit_of_mine.py": ""}
    function = laid_out(tmp_path, files, "rewards/mine.py:f")
    with pytest.raises(UsageError, match="No module named 'kit_of_mine'") as caught:
        run_doctests(function)
    assert f"'{tmp_path}/kit_of_mine.py' is not among them" in caught.value.fix
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_doctests(function) == []


def test_lint_says_it_and_no_run_is_created(tmp_path: Path) -> None:
    steps = RECIPE.replace("reward/number.py:last_number\n  - select", "mine.py:last_number\n  - select")
    recipe = recipe_in(tmp_path, steps)
    laid_out(
        tmp_path,
        {"mine.py": "WORDS = open('words.txt').read()\ndef last_number(completion): return 1", "words.txt": "a"},
        "mine.py:last_number",
    )
    assert any("FileNotFoundError" in problem and "FILES" in problem for problem in lint(recipe).problems)
    with pytest.raises(UsageError, match="FileNotFoundError") as caught:
        go(recipe, tmp_path / "run")
    assert f"{tmp_path}/mine.py" in str(caught.value) and not (tmp_path / "run/run.json").exists()


def test_data_that_is_opened_in_the_function_is_missing_in_its_doctest(tmp_path: Path) -> None:
    source = 'from pathlib import Path\ndef f(completion):\n    """\n    >>> f("a")\n    1.0\n    """\n    return float(completion in (Path(__file__).parent / "words.txt").read_text())'
    failures = run_doctests(laid_out(tmp_path, {"mine.py": source, "words.txt": "a"}))
    assert (
        failures[0]
        == f"{tmp_path}/mine.py:4  f(\"a\") raises FileNotFoundError: [Errno 2] No such file or directory: 'words.txt'"
    )
    assert "FILES" in failures[1]
    assert run_doctests(laid_out(tmp_path, {"mine.py": "FILES = ['words.txt']\n" + source})) == []


@pytest.mark.parametrize(
    ("named", "what"), [("gone.txt", "is not there"), ("data", "is a folder"), ("/etc/hostname", "not relative")]
)
def test_a_name_in_files_that_is_no_file_beside_it_is_refused_with_its_line(tmp_path: Path, named: str, what: str) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match=what) as caught:
        laid_out(tmp_path, {"mine.py": f"import re\nFILES = [{named!r}]\ndef f(completion): return 1"})
    assert caught.value.where == f"{tmp_path}/mine.py:2"


def test_a_helper_that_is_not_python_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not Python") as caught:
        laid_out(tmp_path, {"mine.py": "import helpers\ndef f(completion): return 1", "helpers.py": "x = 1\ndef (:\n"})
    assert caught.value.where == f"{tmp_path}/helpers.py:2"


def test_a_docstring_counts_where_the_code_reads_it(tmp_path: Path) -> None:
    plain = 'def f(completion):\n    """{}"""\n    return 1'
    read = 'def f(completion):\n    """{}"""\n    return len(f.__doc__)'

    def digest(source: str) -> str:
        return laid_out(tmp_path, {"mine.py": source}).digest

    assert digest(plain.format("one")) == digest(plain.format("three"))
    assert digest(read.format("one")) != digest(read.format("three"))


def test_a_helper_may_not_hide_an_installed_package_from_a_process_that_others_use(tmp_path: Path) -> None:
    laid_out(tmp_path, {"mine.py": "import yaml\ndef f(row): return row", "yaml.py": "LIMIT = 2"})
    with pytest.raises(ImportError, match=r"'yaml\.py' is called like the installed package 'yaml'"):
        load(tmp_path / "mine.py", "f")


def test_helpers_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        laid_out(
            tmp_path / folder,
            {
                "mine.py": "import helper_of_mine\ndef f(row): return helper_of_mine.HERE",
                "helper_of_mine.py": f"HERE = {folder!r}",
            },
        )
    assert [load(tmp_path / folder / "mine.py", "f").call({}) for folder in ("one", "two", "one")] == ["one", "two", "one"]


def test_copies_that_a_killed_process_left_are_removed_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    for name in ("selfkd-rewards-dead", "selfkd-rewards-alive", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with (tmp_path / "selfkd-rewards-alive/lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"selfkd-rewards-alive", "other"}


def test_a_recipe_is_copied_with_all_that_its_rewards_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_in(tmp_path / "from", RECIPE.replace("score: reward/number.py", "score: mine/own.py"))
    files = {
        "mine/own.py": "from . import helpers\nFILES = ['data/words.txt']\ndef last_number(completion): return 1",
        "mine/helpers.py": "LIMIT = 3",
        "mine/data/words.txt": "a",
    }
    laid_out(tmp_path / "from", files, "mine/own.py:last_number")
    copy(str(tmp_path / "from/sums.yaml"), tmp_path / "to")
    assert {name for name in files if (tmp_path / "to" / name).read_text() == files[name]} == set(files)


# ----------------------------------------------------------------------------------------------------------------- runs

OWN = RECIPE.replace("reward/number.py:last_number", "own.py:last_number")
NUMBER = "import re\n\n\ndef last_number(completion, answer):\n    found = re.findall(r'[0-9]+', completion)\n    return float(found[-1:] == [answer]){}\n"


def test_a_comment_in_a_reward_and_more_rounds_go_on_with_the_same_chain(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path / "a", OWN)
    laid_out(tmp_path / "a", {"own.py": NUMBER.format("")}, "own.py:last_number")
    go(recipe, tmp_path / "a/run")
    laid_out(tmp_path / "a", {"own.py": NUMBER.format("  # as the paper has it")}, "own.py:last_number")
    run = go(recipe_in(tmp_path / "a", OWN, "rounds=3"), tmp_path / "a/run")
    whole = recipe_in(tmp_path / "b", OWN, "rounds=3")
    laid_out(tmp_path / "b", {"own.py": NUMBER.format("")}, "own.py:last_number")
    assert run.rounds == 3 and end(run) == end(go(whole, tmp_path / "b/run"))


def test_two_files_of_one_code_with_other_comments_are_frozen_side_by_side(tmp_path: Path) -> None:
    text = OWN.replace("  - measure: own.py:last_number", "  - measure: twin.py:last_number")
    recipe = recipe_in(tmp_path, text)
    for name in ("own", "twin"):
        laid_out(tmp_path, {f"{name}.py": NUMBER.format(f"  # {name}")}, f"{name}.py:last_number")
    run = go(recipe, tmp_path / "run")
    assert {entry.path.rpartition("/")[2] for entry in run.code.values()} == {"own.py", "twin.py"}
    folder = {"mine/own.py": NUMBER.format("  # one"), "mine2/own.py": NUMBER.format("  # two")}
    text = OWN.replace("own.py", "mine/own.py", 1).replace("measure: own.py", "measure: mine2/own.py")
    recipe = recipe_in(tmp_path / "same", text)
    laid_out(tmp_path / "same", folder, "mine/own.py:last_number")
    run = go(recipe, tmp_path / "same/run")
    said = {(run.folder / entry.path).read_text().count("# one") for entry in run.code.values()}
    assert said == {0, 1} and len({entry.digest for entry in run.code.values()}) == 1


def test_a_run_uses_the_data_that_was_frozen(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, OWN)
    reward = "FILES = ['worth.txt']\ndef last_number(completion):\n    return float(open('worth.txt').read())\n"
    laid_out(tmp_path, {"own.py": reward, "worth.txt": "1"}, "own.py:last_number")
    run = go(recipe, tmp_path / "run")
    (tmp_path / "worth.txt").write_text("0")
    again: list[Result] = results(run.function("own.py:last_number", {}), [row()])
    assert again == [(1.0, "")] and code_digest(tmp_path / "own.py") != run.code["own.py:last_number"].digest
