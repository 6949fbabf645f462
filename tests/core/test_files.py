"""A file that a person names is found and named back as it was typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.core.files import as_typed, locate, reference_parts
from selfkd.errors import UsageError


def test_a_path_below_the_working_directory_is_named_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_typed(tmp_path / "runs/one") == "runs/one" == as_typed(Path("runs/one"))
    assert as_typed(tmp_path.parent / "other") == str(tmp_path.parent / "other")


def test_a_reference_has_a_file_and_a_function() -> None:
    assert reference_parts("a/b.py:fn") == ("a/b.py", "fn") and reference_parts("b.py") == ("", "b.py")


def test_a_file_next_to_the_recipe_comes_before_one_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("here")
    (tmp_path / "recipe").mkdir()
    assert locate("a.txt", [tmp_path / "recipe"]) == tmp_path / "a.txt"
    (tmp_path / "recipe/a.txt").write_text("beside")
    assert locate("a.txt", [tmp_path / "recipe"]) == tmp_path / "recipe/a.txt"
    with pytest.raises(UsageError, match=r"no file 'b\.txt'\. Did you mean 'a\.txt'"):
        locate("b.txt", [])
