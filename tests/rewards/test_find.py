"""A function is found by name beside the recipe or among the shipped ones, and its digest is that of its code."""

from __future__ import annotations

from pathlib import Path

import pytest
from scoring import Write, write

from selfkd.core.files import builtin_folder
from selfkd.errors import UsageError
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
