"""An interval is wide where little was measured, and never zero for a share of nothing."""

from __future__ import annotations

import math

from selfkd.core.stats import interval


def test_a_share_of_no_hits_is_not_certain() -> None:
    assert round(interval([0.0] * 100), 4) == round(interval([1.0] * 100), 4) == 0.0185
    assert interval([0.0, 1.0] * 50) > interval([0.0, 1.0] * 500) > 0


def test_the_interval_of_numbers_is_the_normal_one() -> None:
    assert math.isclose(interval([1.0, 2.0, 3.0]), 1.96 / math.sqrt(3))
    assert math.isnan(interval([]))
