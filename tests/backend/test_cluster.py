"""A private Ray cluster: what a killed or stopped driver leaves behind (nothing), and who can reach it (nobody)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toys import links

TESTS = Path(__file__).parent.parent

DRIVER = """
from pathlib import Path
from selfkd.backend.base import Sampling
from selfkd.backend.machine import Machine
from selfkd.backend.ray.dispatcher import RayBackend
from toys import NUMERICS, OLD, Toy, chunks_of, fetch, learn
log = Path({log!r})
backend = RayBackend(Machine(generators=2), NUMERICS, log, engine=Toy, trainer=learn, loader=fetch)
{more}
for reply in backend.generate(OLD, chunks_of(log, "answer", {order!r}, {order!r}), Sampling()):
    print("answered", flush=True)
backend.close()
print("closed", flush=True)
"""
STOPPING = """
import signal
from selfkd.errors import Stopped
def stop(*_): raise Stopped("stopped")
signal.signal(signal.SIGTERM, stop)
import sys
def leave(kind, error, trace): backend.close(); print("left", flush=True); import os; os._exit(75)
sys.excepthook = leave
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Another Python with a private cluster of its own; returned once its first chunk is answered."""
    started: list[subprocess.Popen[str]] = []

    def start(order: str = "hang", more: str = "") -> subprocess.Popen[str]:
        code = DRIVER.format(log=str(tmp_path), order=order, more=more)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "answered\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def descendants(root: int) -> dict[int, str]:
    """{pid: start time} of all that `root` started, and what those started."""
    from selfkd.backend.ray.guardian import processes

    running = processes()
    found: dict[int, str] = {}
    while more := {pid: start for pid, (parent, start) in running.items() if parent in (root, *found) and pid not in found}:
        found |= more
    return found


def alive(members: dict[int, str]) -> list[int]:
    """Those that still run; a zombie does not."""
    left = []
    for pid, started in members.items():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[19] == started and fields[0] not in "ZX":
            left.append(pid)
    return left


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
def test_a_killed_driver_leaves_no_process_and_no_folder(driver: Any) -> None:
    process = driver()
    members = descendants(process.pid)
    folders = {word for pid in members for word in _words(pid) if word.startswith("--temp-dir=")}
    assert len(members) > 8
    assert len(folders) == 1
    process.kill()
    deadline = time.monotonic() + 15
    while alive(members) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert {pid: _words(pid) for pid in alive(members)} == {}
    assert not Path(folders.pop().removeprefix("--temp-dir=")).exists()


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
def test_a_driver_that_is_asked_to_stop_is_gone_in_ten_seconds_with_all_it_started(driver: Any) -> None:
    process = driver(more=STOPPING)
    members = descendants(process.pid)
    process.terminate()
    out, _ = process.communicate(timeout=10)
    assert "left" in out
    assert process.returncode == 75
    assert alive(members) == []


def test_a_private_cluster_listens_on_loopback_only_and_keeps_its_token(cluster: Any) -> None:
    if cluster.used:
        pytest.skip("this test session runs on a Ray that was there before")
    assert "RAY_AUTH_TOKEN" not in os.environ
    members = {os.getpid(): "", **descendants(os.getpid())}
    sockets = {link for pid in members for link in links(Path(f"/proc/{pid}/fd"))} - cluster.sockets_before
    tables = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1].split(":")[0] for row in tables if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert len(listening) > 3
    assert {address for address in listening if "7F00" not in address and "100007F" not in address} == set()
