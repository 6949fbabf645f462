"""Where programs run: what is seen there, and the folders on the host."""

from __future__ import annotations

from pathlib import Path

from selfkd.sandbox import sites


def test_folders_of_killed_owners_are_cleared_away() -> None:
    place = Path(sites._work_parent())
    gone = place / f"{sites.WORK_PREFIX}{2**22 - 1}-left"
    gone.mkdir(exist_ok=True)
    mine = Path(sites.new_work_folder())
    sites.remove_leftovers.__wrapped__()
    assert (gone.exists(), mine.exists()) == (False, True)
    mine.rmdir()
