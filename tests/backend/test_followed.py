"""Processes that an engine did not start itself end with it, however it ends; the extension that does so is found by its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from selfkd.backend.engine.vllm_options import EXTENSIONS, OWNER
from selfkd.backend.engine.worker_extension import WorkerExtension

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="vLLM has processes of its own on Linux")

FOLLOWER = "import sys, time, selfkd.backend.engine.followed; print('up', flush=True); time.sleep(600)"
CORE = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {FOLLOWER!r}]); time.sleep(600)"
ENGINE = "import os, subprocess, sys, time; os.environ[{owner!r}] = str(os.getpid()); subprocess.Popen([sys.executable, '-c', {below!r}]); time.sleep(600)"


def test_vllm_finds_the_extension_by_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OWNER, raising=False)
    for name in EXTENSIONS.values():
        module, _, attribute = name.rpartition(".")
        assert getattr(import_module(module), attribute) is WorkerExtension


@pytest.mark.parametrize("below", [FOLLOWER, CORE], ids=["core", "worker below a core"])
def test_a_process_below_a_killed_engine_is_gone_within_seconds(below: str) -> None:
    """The pipe of its output closes once nobody is left who holds it; the core of the second case is no follower, and is killed here."""
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE.format(owner=OWNER, below=below)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert engine.stdout and engine.stdout.readline() == b"up\n"
        [follower] = [pid for pid in processes_of(engine.pid) if FOLLOWER.encode() in command(pid).split(b"\0")]
        engine.kill()
        engine.wait()
        until = time.monotonic() + 30
        while command(follower) and time.monotonic() < until:
            time.sleep(0.1)
        assert not command(follower)
    finally:
        if processes_of(engine.pid):
            os.killpg(engine.pid, signal.SIGKILL)


def test_a_process_that_somebody_else_started_follows_nobody_unless_the_engine_is_gone_already() -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    environment = {**os.environ, OWNER: str(other.pid)}
    look = "import threading, time, selfkd.backend.engine.followed; time.sleep(1); print(threading.active_count())"
    try:
        assert subprocess.run([sys.executable, "-c", look], env=environment, capture_output=True).stdout == b"1\n"
    finally:
        other.kill()
        other.wait()
    assert subprocess.run([sys.executable, "-c", look], env=environment).returncode == -signal.SIGKILL


def processes_of(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[3]) == session and command(int(path.name)):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def command(pid: int) -> bytes:
    """Its command line; nothing once it is gone, or only its parent has not noticed yet."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
