"""The examples in every shipped reward file hold, and its parameters are within the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.core.files import builtin_folder
from selfkd.core.pool import Function
from selfkd.rewards.check import check_parameters, run_doctests
from selfkd.rewards.find import definition, find_function, names_in, parse

BUILT_IN = sorted(builtin_folder().glob("reward/*.py"))


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.name)
def test_the_doctests_of_a_shipped_reward_pass(path: Path) -> None:
    names = [name for name in names_in(parse(path)) if definition(Function(name, path, ""))]
    assert names and run_doctests(find_function(f"{path}:{names[0]}", []), 120.0) == []
    assert all(check_parameters(find_function(f"{path}:{name}", []), None) == [] for name in names)
