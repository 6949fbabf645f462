"""Thousands of programs, many of which run into a limit, leave the machine as it was."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from leftovers import left_behind

from selfkd.sandbox import Limits, Sandbox, tiers, watch

pytestmark = pytest.mark.skipif(tiers.host().tier < 2, reason=f"this host has {tiers.host().walls}")
MB = 1 << 20
WHOLE, TENTH = 100_000, 10_000
LIMITS = Limits(seconds=0.1, memory=64 * MB, address_space=256 * MB, output=20_000, disk=2 * MB, file_size=MB)
USUAL = "print(int(input()) + 1)"
UNUSUAL = (
    "while True: pass",
    "while True: print('x' * 1000)",
    "kept = []\nwhile True: kept.append(b'x' * 1000000)",
    "import os\nwhile True: os.fork()",
    "import os\nfor _ in range(3): os.fork()\nwhile True: pass",
    "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(100)",
    "import os\nos._exit(3)",
    "1 / 0",
    "import os\nos.closerange(0, 64)",
    "open('f', 'wb').write(bytes(3 << 20))",
    "import os\nfor n in range(50): os.mkdir(str(n)); open(f'{n}/x', 'w').write('x')",
    "import threading, time\nfor _ in range(9): threading.Thread(target=time.sleep, args=(100,)).start()",
    "import ctypes\nctypes.string_at(0)",
    "import os\nos.mkfifo('p')\nopen('p')",
    "import socket\na, b = socket.socketpair()\na.recv(1)",
)


def soak(count: int) -> None:
    """Run many programs and count what is left, in a process that has done nothing else and so has nothing else to lose."""
    program = f"import sys; sys.path[:] = {[str(Path(__file__).parent), *sys.path]}; import test_soak; test_soak.run_programs({count})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_programs(count: int) -> None:
    """One in twenty programs is unusual; which one is drawn with a seed, so that a failure can be repeated."""
    before, zombies = left_behind(), zombies_of_ours()
    draw = random.Random(20261125)
    programs = [draw.choice(UNUSUAL) if draw.random() < 0.05 else USUAL for _ in range(count)]
    boxes = (Sandbox(LIMITS), Sandbox(LIMITS, tier=1))

    def run(number: int) -> bool:
        done = boxes[number % 8 == 7].run(programs[number], str(number))
        return programs[number] != USUAL or done.limit == "time" or done.stdout == f"{number + 1}\n"

    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)))) as threads:
        wrong = [number for number, right in enumerate(threads.map(run, range(count))) if not right]
    assert wrong == []
    assert (after := left_behind()) == before, (before, after)
    assert zombies_of_ours() == zombies


def zombies_of_ours() -> int:
    return sum(b"\nState:\tZ" in watch.read(f"/proc/{one}/status") for one in watch.tree(os.getpid()))


def test_ten_thousand_programs_leave_nothing_behind() -> None:
    soak(TENTH)


@pytest.mark.nightly
def test_a_hundred_thousand_programs_leave_nothing_behind() -> None:
    soak(WHOLE)


def test_left_behind_sees_what_is_left(tmp_path: Path) -> None:
    """The check must be able to fail."""
    before = left_behind()
    handle = os.open(os.devnull, os.O_RDONLY)
    folder = Path("/dev/shm") / "selfkd-box-seen"
    folder.mkdir()
    assert left_behind() == before | {"descriptors": before["descriptors"] + 1, "folders": before["folders"] + 1}
    os.close(handle)
    folder.rmdir()
    assert left_behind() == before
