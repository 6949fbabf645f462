"""What a program tries and does not get: by user, by tier, on hosts that refuse namespaces or lack Landlock."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from confined import USERS, ask

from selfkd.core.user_module import load_module
from selfkd.sandbox import Limits, Sandbox, attacks, kernel, sites, tiers

NEEDS_WALLS = pytest.mark.skipif(tiers.host().tier < 2, reason=f"this host has {tiers.host().walls}")

# What gets through where nothing but resource limits stands: the sockets, the files, the processes, the kernel's doors.
OPEN_AT_0 = {
    "tcp", "udp", "unix_stream", "unix_datagram", "unix_datagram_pair", "abstract_socket", "read_passwd", "read_others_file",
    "write_outside", "overwrite", "truncate", "rename_away", "remove", "change_mode", "change_time",
    "symlink_escape", "signal_owner", "unshare_again", "keyring",
    "shared_memory", "change_limits_of_owner", "signal_by_descriptor", "outlive_owner", "lock_outside", "queue_by_number",
    "remove_queue", "shared_memory_of_nobody", "deep_pipe", "pass_descriptor",
}  # fmt: skip


@NEEDS_WALLS
@pytest.mark.parametrize("who", USERS)
def test_every_attack_is_denied_at_tiers_2_and_1_and_reported_at_tier_0(who: str) -> None:
    found = ask(who, "nothing", "through")
    assert (found["2"], found["1"]) == ([], [])
    assert set(found["0"]) >= OPEN_AT_0
    assert set(found["0"]) <= set(attacks.ALL)


@NEEDS_WALLS
@pytest.mark.parametrize("who", USERS)
@pytest.mark.parametrize(("lacking", "tier"), [("nothing", 2), ("namespaces", 1), ("landlock", 0)])
def test_a_host_gets_the_tier_that_holds_there(who: str, lacking: str, tier: int) -> None:
    found = ask(who, lacking, "host")
    assert (found["tier"], found["uid"] == 0) == (tier, who == "root")
    assert found["attacks"] == len(attacks.ALL) > 50
    assert bool(found["lacks"]) == (tier < 2)
    if lacking == "namespaces":
        assert "unshare: Operation not permitted" in found["lacks"][0]


@NEEDS_WALLS
def test_without_walls_the_sandbox_refuses_in_one_line_and_runs_only_what_was_accepted() -> None:
    found = ask(USERS[-1], "landlock", "refusal")
    assert found["said"].startswith("this host cannot close the network to model-written code, so none is run")
    assert "no Landlock in kernel" in found["said"] and "Linux 5.13 or newer" in found["said"]
    assert "\n" not in found["said"]
    assert (found["accepted"], found["tier"]) == ("1\n", 0)


@NEEDS_WALLS
@pytest.mark.parametrize("who", USERS)
@pytest.mark.parametrize("lacking", ["nothing", "namespaces"])
def test_bombs_end_by_the_limit_they_hit(who: str, lacking: str) -> None:
    found = ask(who, lacking, "limits")
    forks = [False, "processes", "processes limit (32 processes and threads)"]
    refused = [False, None, "exit status 1: PermissionError: [Errno 1] Operation not permitted"]
    assert found["memory"][0] is False and (found["memory"][1] == "memory" or "MemoryError" in found["memory"][2])
    assert found["forks"] == (forks if lacking == "nothing" else refused)
    assert found["shared"] in ([forks, [False, "memory", "memory limit (512 MB)"]] if lacking == "nothing" else [refused])
    assert found["daemon"] == ([True, None, ""] if lacking == "nothing" else refused)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.parametrize("who", USERS)
def test_the_walls_hold_where_bubblewrap_makes_the_namespaces(who: str) -> None:
    assert ask(who, "nothing", "bubble") == {}


# ------------------------------------------------------------------------------------------- what a plain subprocess does


@NEEDS_WALLS
def test_a_plain_subprocess_lets_through_what_the_sandbox_denies() -> None:
    """The twenty of docs/sandbox.md, and the way the table there is made."""
    bench = load_module(Path(__file__).parents[2] / "benchmarks/sandbox.py")
    denied = tiers.results(sites.site(2, sites.python_view(None)), bench.TWENTY)
    assert len(denied) == 20 and not any(denied.values())
    through = [name for name in bench.TWENTY if bench.plainly(name)]
    assert len(through) >= 18, sorted(set(bench.TWENTY) - set(through))


# ----------------------------------------------------------------------------------------- traces of those who came before


@NEEDS_WALLS
def test_a_program_finds_no_trace_of_an_earlier_one_in_the_memory_it_was_forked_with() -> None:
    """The scan asks the kernel to read each page, so that a hole is an error and not a crash."""
    scan = """
import ctypes, os, gc
libc = ctypes.CDLL(None)
reading, writing = os.pipe()
first, second = (bytes(int(part, 16) for part in half.split()) for half in input().split(","))
def pages(around):
    here = id(around) & ~4095
    return range(max(4096, here - (64 << 20)), here + (64 << 20), 4096)
hits = pages_read = 0
for page in pages(object()):
    if libc.write(writing, ctypes.c_void_p(page), ctypes.c_size_t(4096)) == 4096:
        pages_read += 1
        text = os.read(reading, 4096)
        hits += any(part.startswith(second) for part in text.split(first)[1:])
print(hits, pages_read > 100, [one for one in gc.get_objects() if isinstance(one, dict) and "settings" in one])
"""
    marker = b"a-marker-of-an-earlier-program"
    spaced = ",".join(
        " ".join(f"{byte:x}" for byte in half) for half in (marker[:15], marker[15:])
    )  # the scan holds no whole one
    box = Sandbox(Limits(seconds=20))
    held = box.run(f"kept = {marker.decode()!r} * 1000\n" + scan, stdin=spaced)
    assert int(held.stdout.split()[0]) > 0, "the scan must find what is there"
    assert box.run(scan, stdin=spaced).stdout == "0 True []\n"


@NEEDS_WALLS
@pytest.mark.parametrize("tier", [2, 1])
def test_files_and_queues_of_one_program_are_gone_before_the_next(tier: int) -> None:
    box = Sandbox(tier=tier)
    left = box.run("open('left', 'w').write('x')\nimport os\nprint(os.listdir('.'))")
    assert left.stdout == "['left']\n"
    assert box.run("import os\nprint(os.listdir('.'))").stdout == "[]\n"


@NEEDS_WALLS
def test_older_landlock_lets_nothing_more_through_at_tier_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before ABI 6 it cannot tell one's own processes from others', before ABI 4 it knows no TCP, before ABI 3 no truncation."""
    view = sites.python_view(None)
    for abi in {1, 3, 5} & set(range(kernel.landlock_abi())):
        found = tiers.results(sites.site(1, view, abi=abi))
        assert {name for name, evidence in found.items() if evidence} == set(), abi
        monkeypatch.setattr(Sandbox, "site", lambda self, abi=abi: sites.site(1, view, abi=abi))
        assert Sandbox().run("open('f', 'w').write('x')\nprint(open('f', 'w').write('yz'))").stdout == "2\n", abi
