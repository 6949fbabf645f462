"""What a site means for Landlock, without building a wall."""

from __future__ import annotations

from selfkd.sandbox import kernel
from selfkd.sandbox.walls import DEVICES, Site, rights


def test_below_tier_2_a_program_may_make_files_in_its_folder_and_nothing_else() -> None:
    allowed = dict(rights(Site(tier=1, view=("/usr/lib",), work="/work", abi=7)))
    assert set(allowed) == {"/usr/lib", "/work", *DEVICES}
    assert allowed["/usr/lib"] & kernel.WRITE_FILE == 0
    assert allowed["/work"] & kernel.MAKE_REG
    assert allowed["/work"] & (kernel.EXECUTE | kernel.MAKE_CHAR | kernel.MAKE_BLOCK | kernel.IOCTL_DEV) == 0


def test_process_1_is_ours_only_where_we_make_the_namespaces() -> None:
    assert Site(tier=2, view=(), work="", abi=7).own_init
    assert not Site(tier=2, view=(), work="", abi=7, bubble="/usr/bin/bwrap").own_init
    assert not Site(tier=1, view=(), work="/work", abi=7).own_init
