"""Limits are checked where they are made."""

from __future__ import annotations

import pytest

from selfkd.errors import UsageError
from selfkd.sandbox import Limits


def test_a_limit_that_is_not_a_positive_number_is_refused() -> None:
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="a limit is a positive number"):
            Limits(seconds=bad)


def test_the_default_of_processor_time_is_used_only_where_none_was_set() -> None:
    assert Limits(seconds=3).for_kernel()["cpu"] == 3
    assert Limits(seconds=3).for_kernel(600)["cpu"] == 600
    assert Limits(seconds=3, cpu=2).for_kernel(600)["cpu"] == 2
