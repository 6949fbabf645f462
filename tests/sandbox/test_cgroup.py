"""A cgroup counts where the host has delegated one, seen with files in place of a kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selfkd.sandbox import cgroup


def fake_group(folder: Path, controllers: str = "cpu memory pids") -> None:
    """The files of a cgroup that a kernel would make."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.subtree_control").write_text(controllers)
    (folder / "cgroup.controllers").write_text(controllers)
    for name in ("cgroup.procs", "cgroup.kill", "memory.max", "memory.swap.max", "memory.oom.group", "pids.max"):
        (folder / name).write_text("")
    (folder / "memory.events").write_text("low 0\noom 0\noom_kill 0\n")
    (folder / "pids.events").write_text("max 0\n")


def test_a_delegated_cgroup_is_used_and_an_undelegated_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = tmp_path / "user.slice/app.slice"
    fake_group(unit / "mine.scope", "")
    assert cgroup.find(str(tmp_path), "/user.slice/app.slice/mine.scope") is None  # nothing is handed down
    assert cgroup.find(str(tmp_path), "/../../etc") is None
    fake_group(unit)
    left = unit / f"{cgroup._prefix()}{2**22 - 1}-0"
    left.mkdir()
    made = os.mkdir

    def filled(path: str, *mode: int) -> None:
        """The kernel fills a new group's folder."""
        made(path, *mode)
        with monkeypatch.context() as plain:
            plain.setattr(os, "mkdir", made)
            fake_group(Path(path), "")

    monkeypatch.setattr(os, "mkdir", filled)
    group = cgroup.find(str(tmp_path), "/user.slice/app.slice/mine.scope")
    assert group and group.path.startswith(str(unit / f"{cgroup._prefix()}{os.getpid()}-"))
    assert not left.exists()
    (unit / "cgroup.subtree_control").write_text("")  # on offer, but not switched on
    assert cgroup.find(str(tmp_path), "/user.slice/app.slice/mine.scope") is not None
    assert (unit / "cgroup.subtree_control").read_text() == "+memory +pids"
    group.limit(1000, 7)
    assert [(Path(group.path) / name).read_text() for name in ("memory.max", "memory.swap.max", "pids.max")] == [
        "1000",
        "0",
        "7",
    ]
    assert group.limit_hit() is None
    (Path(group.path) / "pids.events").write_text("max 3\n")
    assert group.limit_hit() == "processes"
    (Path(group.path) / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    assert group.limit_hit() == "memory"
    group.enter()
    group.kill()
    (Path(group.path) / "memory.events").unlink()  # somebody switched the controller off
    assert group.limit_hit() is None and group.lost
    assert (
        set((Path(group.path) / "cgroup.procs").read_text()) == {"0"} and (Path(group.path) / "cgroup.kill").read_text() == "1"
    )
