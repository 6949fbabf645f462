"""The filter of system calls by itself, interpreted."""

from __future__ import annotations

import struct

import pytest

from selfkd.sandbox import seccomp


def decide(code: bytes, number: int, *arguments: int, arch: int = seccomp.ARCHES["x86_64"]) -> int:
    """What the kernel would answer: the filter, interpreted."""
    data = struct.pack("=iIQ6Q", number, arch, 0, *[*arguments, *[0] * 6][:6])
    steps = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    at, word = 0, 0
    while True:
        operation, yes, no, value = steps[at]
        at += 1
        if operation == seccomp.LOAD:
            (word,) = struct.unpack_from("=I", data, value)
        elif operation == seccomp.AND:
            word &= value
        elif operation == seccomp.RETURN:
            return value & 0xFFFF if value != seccomp.ALLOW else 0
        else:
            holds = {seccomp.EQUAL: word == value, seccomp.ABOVE: word >= value, seccomp.SET: bool(word & value)}[operation]
            at += yes if holds else no


@pytest.mark.parametrize("machine", sorted(seccomp.ARCHES))
def test_the_filter_denies_what_it_names_and_nothing_else(machine: str) -> None:
    place = list(seccomp.ARCHES).index(machine)
    arch = seccomp.ARCHES[machine]
    code = seccomp.build(machine=machine)
    named = {one if isinstance(one, int) else one[place] for one in seccomp.ALWAYS_DENIED.values()} - {None}
    special = {seccomp.CLONE3, seccomp.SOCKETPAIR[place], seccomp.IOCTL[place]}
    for number in range(470):
        expected = 1 if number in named else 38 if number == seccomp.CLONE3 else 0
        if number not in special - {seccomp.CLONE3}:
            assert decide(code, number, arch=arch) == expected, number


def test_the_filter_looks_at_arguments_where_they_matter() -> None:
    clone, pair, prlimit, kill = 56, 53, 302, 62
    loose = seccomp.build(machine="x86_64")
    tight = seccomp.build(
        seccomp.Rules(namespaces=False, signals=False, forks=False, execs=False, truncating_reads=False), "x86_64"
    )
    assert decide(loose, clone, 17) == 0 and decide(loose, clone, 0x10000000 | 17) == 1
    assert decide(tight, clone, 17) == 1 and decide(tight, clone, seccomp.CLONE_THREAD | 0x900) == 0
    assert decide(tight, clone, seccomp.CLONE_THREAD | 0x10000000) == 1
    assert decide(loose, pair, 1, 1 | 0o2000000) == 0 and decide(loose, pair, 1, 2) == 1 and decide(loose, pair, 1, 5) == 1
    assert decide(loose, prlimit, 77) == 1 and decide(loose, prlimit, 0) == 0
    for number, at, allowed, denied in (
        (72, 1, (0, 1, 2, 3, 4, 1030), seccomp.DENIED_FCNTL),  # fcntl: duplicates, flags
        (16, 1, seccomp.ALLOWED_IOCTL, (0x8901, 0x8902, 0x40086602, 0x40087602, 0x5412, 0)),  # ioctl
        (157, 0, (3, 15, 38, 22), seccomp.DENIED_PRCTL),  # prctl
        (9, 3, (0x2, 0x22, 0x20022), (0x21, 0x23, 0x40022)),  # mmap
    ):
        assert [decide(loose, number, *[0] * at, value) for value in allowed] == [0] * len(allowed), number
        assert [decide(loose, number, *[0] * at, value | 0xFF << 32) for value in denied] == [1] * len(denied), number
    assert [decide(code, 9, 0, 0, 0, 0x1) for code in (loose, tight)] == [0, 1]
    # Opened so as to be emptied: by one who may write Landlock decides, by one who only reads it is refused.
    assert [decide(tight, 257, 0, 0, flags) for flags in (0x241, 0x242, 0x41, 0, 0x200, 0x203)] == [0, 0, 0, 0, 1, 1]
    assert [decide(loose, 257, 0, 0, flags) for flags in (0x241, 0x200, 0x203)] == [0, 0, 0]
    assert [decide(code, 2, 0, 0x410002) for code in (loose, tight)] == [0, 1]
    assert [decide(code, 59) for code in (loose, tight)] == [0, 1]
    assert decide(loose, kill, 1) == 0 and decide(tight, kill, 1) == 1
    assert decide(loose, 0x40000000 + 39) == 1
    assert decide(loose, 20, arch=0x40000003) == 1  # the i386 calls
