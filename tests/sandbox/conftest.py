"""What all tests of the sandbox share."""

from __future__ import annotations

import pytest
from leftovers import ignore_strangers

from selfkd.rewards.pool import close_idle_workers
from selfkd.sandbox import warden_pool


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    """End the idle reward workers of other tests, and count none of what they left: what is counted here is the sandbox's."""
    close_idle_workers()
    warden_pool.close_idle()
    ignore_strangers()
