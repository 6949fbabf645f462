"""Wardens are lent, kept, replaced, and end with their owner however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from leftovers import wait_until_gone, wardens

from selfkd.errors import SandboxError
from selfkd.sandbox import Limits, Sandbox, sites, tiers, warden_pool, watch

pytestmark = pytest.mark.skipif(tiers.host().tier < 1, reason=f"this host has {tiers.host().walls}")
BOX = Sandbox()
ROOT = str(Path(sites.__file__).parent.parent.parent)


def test_threads_run_programs_side_by_side() -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: BOX.run(f"print({n})").stdout, range(40)))
    assert found == [f"{n}\n" for n in range(40)]


def test_a_forked_process_uses_wardens_of_its_own() -> None:
    BOX.run("print(1)")
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, BOX.run("print(2)").stdout.encode())
        warden_pool.close_idle()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"2\n"
    assert BOX.run("print(3)").stdout == "3\n"
    os.close(reading), os.close(writing)


OWNER = """
import os, sys
sys.path.insert(0, {root!r})
from selfkd.sandbox import Limits, Sandbox
box = Sandbox(Limits(seconds=600), tier={tier})
box.run("print(1)")
print("ready", flush=True)
box.run("import time\\nopen('left', 'w').write('x')\\ntime.sleep(600)")
"""


@pytest.mark.parametrize("tier", [2, 1])
def test_everything_ends_with_its_owner_however_the_owner_ends(tier: int) -> None:
    text = OWNER.format(root=ROOT, tier=tier)
    owner = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert owner.stdout and owner.stdout.readline() == "ready\n"
    time.sleep(0.3)
    below = watch.tree(owner.pid)[1:]
    assert len(below) == (3 if tier == 2 else 2), "a warden, a program, and at tier 2 process 1 of its namespace"
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until_gone(below)


@pytest.mark.parametrize("tier", [2, 1])
def test_a_program_dies_with_its_warden_and_the_next_one_gets_a_new_warden(tier: int) -> None:
    box, failed = Sandbox(Limits(seconds=60), tier=tier), []

    def run() -> None:
        try:
            box.run("import time\ntime.sleep(60)")
        except SandboxError as error:
            failed.append(str(error))

    warden_pool.close_idle()
    thread = threading.Thread(target=run)
    thread.start()
    until = time.monotonic() + 20
    while not any(len(watch.tree(one)) > 1 for one in wardens()) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.2)
    warden, *programs = watch.tree(wardens()[0])
    os.kill(warden, signal.SIGKILL)
    thread.join(20)
    assert failed and "the sandbox's own process ended (status -9)" in failed[0]
    wait_until_gone(programs)
    assert box.run("print(1)").ok


def test_wardens_are_kept_for_the_next_program_but_not_too_many() -> None:
    BOX.run("print(1)")
    kept = wardens()
    BOX.run("print(2)")
    assert wardens() == kept
    with ThreadPoolExecutor(warden_pool.MAX_IDLE_WARDENS + 4) as threads:
        list(threads.map(lambda _: BOX.run("import time; time.sleep(0.3)"), range(warden_pool.MAX_IDLE_WARDENS + 4)))
    assert len(wardens()) <= warden_pool.MAX_IDLE_WARDENS
