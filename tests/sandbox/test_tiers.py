"""What this host has is found by trying, and noted."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd.sandbox import tiers

pytestmark = pytest.mark.skipif(tiers.host().tier < 1, reason=f"this host has {tiers.host().walls}")


def test_a_stale_or_damaged_note_about_the_host_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh = tiers.host.__wrapped__()
    [note] = (tmp_path / "selfkd").iterdir()
    assert tiers.host.__wrapped__() == fresh
    note.write_text("{torn")
    assert tiers.host.__wrapped__() == fresh
    (tmp_path / "selfkd").joinpath(note.name).unlink()
    (tmp_path / "selfkd").rmdir()
    (tmp_path / "selfkd").write_text("a file where the folder should be")
    assert tiers.host.__wrapped__() == fresh
