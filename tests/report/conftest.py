"""One finished run for all tests of readers; who changes a run copies it first."""

from __future__ import annotations

from pathlib import Path

import pytest
from chains import go, recipe_in


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("status")
    return go(recipe_in(folder), folder / "runs" / "sums").folder
