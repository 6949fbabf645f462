"""What all tests of the sandbox share."""

from __future__ import annotations

import pytest

from selfkd.rewards.pool import close_idle_workers


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    """End the idle reward workers of other tests: what is counted among our children here is the sandbox's."""
    close_idle_workers()
