"""A function is found by name beside the recipe or among the shipped ones, and its digest is that of its code."""

from __future__ import annotations

from pathlib import Path

import pytest
from scoring import Write, results, row, write

from selfkd.core.files import builtin_folder
from selfkd.errors import UsageError
from selfkd.rewards.check import check_parameters
from selfkd.rewards.find import find_function

__all__ = ["write"]  # a fixture


def test_a_file_next_to_the_recipe_comes_before_a_built_in_one(tmp_path: Path) -> None:
    assert find_function("reward/exact.py:match", [tmp_path]).path == builtin_folder() / "reward/exact.py"
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/exact.py").write_text("def match(completion): return 1")
    assert find_function("reward/exact.py:match", [tmp_path]).path == tmp_path / "reward/exact.py"


def test_what_cannot_be_found_names_the_nearest_and_the_places(write: Write, tmp_path: Path) -> None:
    write("def correct(completion): return 1\ndef wrong(completion): return 0", "correct")
    with pytest.raises(UsageError, match=r"no function 'corect'.*Did you mean 'correct'") as caught:
        find_function("mine.py:corect", [tmp_path])
    assert "correct, wrong" in str(caught.value)
    with pytest.raises(UsageError, match=r"no file 'mime.py'. Did you mean 'mine.py'") as caught:
        find_function("mime.py:f", [tmp_path])
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UsageError, match=r"file\.py:function"):
        find_function("mine.py", [tmp_path])
    (tmp_path / "torn.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(UsageError, match=r"torn.py:2"):
        find_function("torn.py:f", [tmp_path])


def test_the_digest_is_that_of_the_code_and_its_helpers(tmp_path: Path, write: Write) -> None:
    (tmp_path / "helper.py").write_text("VALUE = 1")
    first = write("import helper\ndef f(completion): return helper.VALUE")
    assert write("import helper\n# a comment\ndef f(completion): return helper.VALUE").digest == first.digest
    (tmp_path / "helper.py").write_text("VALUE = 2")
    assert find_function("mine.py:f", [tmp_path]).digest != first.digest


FORMS = {  # ways in which a file offers `f`, which gives 2
    "annotated": "from collections.abc import Callable\ndef g(completion): return 2\nf: Callable = g",
    "in a try": "try:\n    import nowhere\n    def f(completion): return 1\nexcept ImportError:\n    def f(completion): return 2",
    "other parameters in each branch": (
        "try:\n    import nowhere\n    def f(sample): return 1\nexcept ImportError:\n    def f(completions): return [2 for _ in completions]"
    ),
    "in an if": "import sys\nif sys.version_info > (3,):\n    def f(completion): return 2\nelse:\n    f = None",
    "in a with": "import contextlib\nwith contextlib.suppress(ImportError):\n    def f(completion): return 2",
    "decorated": "import functools\n@functools.lru_cache\ndef f(completion): return 2",
    "decorated without wraps": (
        "def timed(function):\n    def inner(*args, **kwargs): return function(*args, **kwargs)\n    return inner\n"
        "@timed\ndef f(completion, answer): return 2 * (answer == '42')"
    ),
    "a partial": "import functools\ndef g(completion, worth): return worth\nf = functools.partial(g, worth=2)",
    "a lambda": "f = lambda completion: 2",
    "one of two assigned together": "f, g = (lambda completion: 2), None",
    "an instance": "class F:\n    def __call__(self, completion): return 2\nf = F()",
    "a class": "class f:\n    def __call__(self, completion): return 2",
    "a class that inherits": "class F:\n    def __call__(self, completion): return 2\nclass f(F): pass",
    "a bound method": "class F:\n    def score(self, completion): return 2\nf = F().score",
    "imported": "from helper import f",
    "imported by a star": "from helper import *",
}


@pytest.mark.parametrize("form", FORMS)
def test_however_a_file_offers_a_function_lint_finds_what_the_run_calls(write: Write, tmp_path: Path, form: str) -> None:
    (tmp_path / "helper.py").write_text("def f(completion): return 2")
    function = write(FORMS[form])
    assert check_parameters(function, []) == [] and results(function, [row()]) == [(2.0, "")]


@pytest.mark.parametrize("form", ["a partial", "an instance", "a class", "imported", "decorated without wraps", "in a try"])
def test_a_parameter_that_nothing_fills_is_found_in_every_form(write: Write, tmp_path: Path, form: str) -> None:
    (tmp_path / "helper.py").write_text("def f(completion, level): return 2")
    (problem,) = check_parameters(write(FORMS[form].replace("completion", "completion, level")), [])
    assert "asks for 'level'" in problem and f"{tmp_path}/mine.py" in problem


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "class f:\n    def __init__(self, worth): pass\n    def __call__(self, completion): return 1",
            "Make an instance at the top level",
        ),
        ("class f:\n    pass", "'f' is a class without a method __call__"),
        ("f = 3", "'f' is of type int, which cannot be called for a score"),
    ],
)
def test_what_cannot_be_called_says_so(write: Write, source: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        results(write(source), [row()])
    assert said in str(caught.value)
