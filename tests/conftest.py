"""What every test has: nothing of this machine's own settings, no hub that is asked, and no idle worker of the test before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the cache of the person who runs the tests, and nothing of theirs is met."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFKD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings of the person who runs the tests must not reach them."""
    for name in ("SELFKD_DEBUG", "RAY_ADDRESS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("selfkd.backend.model_sizes.ask_hub", no_hub)
    yield


def no_hub(name: str, revision: str | None) -> Any:
    raise OSError("no test asks a hub")
