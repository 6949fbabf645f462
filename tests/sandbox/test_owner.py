"""Nothing that a program does harms, holds up or outlives the one who runs it; each of these once did."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from leftovers import left_behind, wait_until_gone, wardens

from selfkd.errors import SandboxError
from selfkd.sandbox import Limits, Sandbox, sites, tiers, warden_pool, watch

pytestmark = pytest.mark.skipif(tiers.host().tier < 1, reason=f"this host has {tiers.host().walls}")
TIERS = [tier for tier in (2, 1) if tier <= tiers.host().tier]
MB = 1 << 20
ROOT = str(Path(sites.__file__).parent.parent.parent)


# -------------------------------------------------------------------------------------------------------------- limits


FILES = {
    "empty, without end": "n = 0\nwhile True:\n  open(f'e{n}', 'w').close(); n += 1",
    "room without size": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nfor n in range(20):\n  h = os.open(f'r{n}', os.O_CREAT | os.O_RDWR)\n"
        "  libc.fallocate(h, 1, ctypes.c_long(0), ctypes.c_long(4 << 20))\ntime.sleep(5)"
    ),
    "large": "for n in range(20): open(f'l{n}', 'wb').write(bytes(4 << 20))\ntime.sleep(5)",
}  # fmt: skip
HELD = {
    "unlinked": "open('u', 'w').close(); os.unlink('u')",
    "replaced": "open('a', 'w').close(); open('b', 'w').close(); os.rename('a', 'b')",
    "without a name": "os.open('.', os.O_TMPFILE | os.O_RDWR)",
    "linked twice": "open('a', 'w').close(); os.link('a', 'b')",
    "shared with nobody": "import mmap\nh = os.open('a', os.O_CREAT | os.O_RDWR); os.ftruncate(h, 4096); mmap.mmap(h, 4096)",
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_no_file_on_the_host_can_be_held_without_a_name(name: str) -> None:
    done = Sandbox(tier=1).run(f"import os\n{HELD[name]}")
    assert not done.ok and ("PermissionError" in done.reason or "not permitted" in done.reason), done


@pytest.mark.parametrize("name", FILES)
def test_files_on_the_host_are_counted_however_they_are_made(name: str) -> None:
    box = Sandbox(Limits(seconds=4, disk=16 * MB), tier=1)
    done = box.run(f"import os, time\n{FILES[name]}")
    assert done.limit == "disk", done
    assert done.seconds < 8
    assert box.run("print(1)").ok


MEMORY = {
    "of a thread that outlives the first": (
        "import threading, ctypes, time\ndef g():\n  m = bytearray(200 << 20)\n  for i in range(0, len(m), 4096): m[i] = 1\n  time.sleep(5)\n"
        "threading.Thread(target=g).start()\nctypes.CDLL(None).syscall(60 if __import__('os').uname().machine == 'x86_64' else 93, 0)"
    ),
    "of many processes": "import os, time\nfor _ in range(3): os.fork()\nm = [b'x' * (1 << 20) for _ in range(20)]\ntime.sleep(5)",
}  # fmt: skip


@pytest.mark.skipif(2 not in TIERS, reason="needs namespaces")
@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_counted_however_it_is_held(name: str) -> None:
    done = Sandbox(Limits(seconds=5, memory=64 * MB)).run(MEMORY[name])
    assert done.limit == "memory", done


@pytest.mark.skipif(2 not in TIERS, reason="needs namespaces")
def test_processor_time_is_counted_of_children_that_nobody_waits_for() -> None:
    burn = (
        "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nwhile True:\n"
        "  if os.fork() == 0:\n    until = time.process_time() + 0.3\n    while time.process_time() < until: pass\n    os._exit(0)\n"
        "  time.sleep(0.3)"
    )
    done = Sandbox(Limits(seconds=20, cpu=1)).run(burn)
    assert (done.limit, done.seconds < 15) == ("cpu", True), done


@pytest.mark.parametrize("tier", TIERS)
def test_huge_pages_of_which_little_is_kept_are_off(tier: int) -> None:
    asked = "import ctypes\nL = ctypes.CDLL(None)\nprint(L.prctl(42, 0, 0, 0, 0), L.prctl(41, 0, 0, 0, 0))"  # PR_GET_, PR_SET_THP_DISABLE
    assert Sandbox(tier=tier).run(asked).stdout == "1 -1\n"


@pytest.mark.skipif(2 not in TIERS, reason="needs namespaces")
def test_processor_time_of_orphans_is_counted() -> None:
    burn = (
        "import os, time\nt = time.monotonic()\nwhile time.monotonic() - t < 6:\n  p = os.fork()\n  if p == 0:\n    if os.fork() == 0:\n"
        "      e = time.process_time()\n      while time.process_time() - e < 0.03: pass\n    os._exit(0)\n  os.waitpid(p, 0)\n  time.sleep(0.03)"
    )
    assert Sandbox(Limits(seconds=20, cpu=1)).run(burn).limit == "cpu"


@pytest.mark.skipif(2 not in TIERS, reason="needs namespaces")
def test_process_one_is_out_of_reach() -> None:
    program = (
        "import os, resource, signal\nassert os.getppid() == 1\nfor number in range(1, 65):\n  try: os.kill(1, number)\n  except OSError: pass\n"
        "for handle in range(3, 64):\n  try: os.write(handle, b'0'); print('wrote', handle)\n  except OSError: pass\n"
        "try: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)); print('limited')\nexcept OSError: pass\nprint('still here', flush=True)\nos._exit(7)"
    )
    done = Sandbox().run(program)
    assert (done.status, done.stdout) == (7, "still here\n"), done


def test_a_busy_loop_ends_by_the_limit_it_passed() -> None:
    for tier in TIERS:
        assert (
            Sandbox(Limits(seconds=20, cpu=1), tier=tier).run("while True: pass").reason == "cpu limit (1 s of processor time)"
        )


# ------------------------------------------------------------------------------------------------------------ the owner


def test_descriptors_on_their_way_in_a_socket_hold_nobody_up() -> None:
    """The seccomp filter denies sending them; without walls a program can, and still nothing waits for it."""
    program = (
        "import os, time, threading, socket, array\ndef send():\n  time.sleep(0.05)\n  s = socket.socket(fileno=os.dup(3))\n"
        "  s.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1, 2]))])\n"
        "def f():\n  threading.Thread(target=send, daemon=True).start()\n  return 1"
    )
    began = time.monotonic()
    with Sandbox(Limits(seconds=2), tier=0, unsafe="I accept").calls(program) as functions:
        assert functions.call("f").value == 1
        time.sleep(0.3)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("tier", TIERS)
def test_an_owner_waits_without_working(tier: int) -> None:
    program = "import os, time\ndef f():\n  os.write(3, b'\\0')\n  os.close(3)\n  time.sleep(100)"
    with Sandbox(Limits(seconds=2), tier=tier).calls(program) as functions:
        before = time.process_time()
        assert not functions.call("f").ok
        assert time.process_time() - before < 0.5


def test_a_reason_is_one_short_line_that_can_be_printed() -> None:
    raw = "a\\ud800\\x1b[2J\\x00" + "x" * 1000
    with Sandbox().calls(
        f"def f(): raise ValueError('{raw}')\nclass {'E' * 5000}(Exception): pass\ndef g(): raise {'E' * 5000}()"
    ) as functions:
        for name in ("f", "g"):
            reason = functions.call(name).reason
            assert len(reason) <= 300 and reason.isprintable() and reason.encode()
    done = Sandbox().run(f"raise ValueError('{raw}')")
    assert len(done.reason) < 400 and done.reason.isprintable() and done.reason.encode()


def test_an_idle_warden_that_was_killed_is_replaced_and_nothing_leaks() -> None:
    box = Sandbox()
    before = left_behind()
    for _ in range(3):
        assert box.run("print(1)").ok
        [idle] = wardens()
        os.kill(idle, signal.SIGKILL)
        time.sleep(0.05)
        assert box.run("print(2)").stdout == "2\n"
    assert left_behind() == before


def test_a_warden_that_is_killed_at_any_moment_leaves_no_program() -> None:
    draw = random.Random(7)
    seen: set[int] = set()
    for number in range(24):
        box = Sandbox(Limits(seconds=30), tier=TIERS[number % len(TIERS)])
        warden_pool.close_idle()
        thread = threading.Thread(target=run_and_fail, args=(box,))
        thread.start()
        until = time.monotonic() + 10
        while not (found := wardens()) and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(draw.uniform(0.02, 0.12))
        seen |= set(watch.tree(found[0])[1:])
        os.kill(found[0], signal.SIGKILL)
        thread.join(30)
        assert not thread.is_alive()
    time.sleep(0.2)
    wait_until_gone(sorted(seen))
    assert not [
        path
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"from selfkd.sandbox.warden" in watch.read(str(path)) and of_ours(path)
    ]


def of_ours(path: Path) -> bool:
    """A process of this test that fell to the init process."""
    status = watch.read(str(path.with_name("status"))).decode()
    return "PPid:\t1\n" in status and path.parent.stat().st_ctime > STARTED and "State:\tZ" not in status


STARTED = time.time()


def run_and_fail(box: Sandbox) -> None:
    with pytest.raises(SandboxError):
        box.run("import time\ntime.sleep(25)")


@pytest.mark.parametrize("tier", TIERS)
def test_a_thread_that_starts_another_program_does_not_outlive_the_warden(tier: int) -> None:
    """What ties a process to its parent's life belongs to the thread that asked for it; a thread that execs has no such tie."""
    program = (
        "import os, sys, threading, time\n"
        "def g(): os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        "threading.Thread(target=g).start()\ntime.sleep(60)"
    )
    warden_pool.close_idle()
    thread = threading.Thread(target=run_or_fail, args=(Sandbox(Limits(seconds=60), tier=tier), program))
    thread.start()
    time.sleep(1.0)
    [warden] = wardens()
    below = watch.tree(warden)[1:]
    os.kill(warden, signal.SIGKILL)
    thread.join(30)
    wait_until_gone(below)


def run_or_fail(box: Sandbox, program: str) -> None:
    with contextlib.suppress(SandboxError):
        box.run(program)


# -------------------------------------------------------------------------------------------- owners in odd circumstances

CIRCUMSTANCES = {
    "SIGCHLD ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "signals blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))",
    "few descriptors": "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))",
    "a closed standard input": "os.close(0)",
    "another working directory": "os.chdir('/proc')",
    "a strict mask": "os.umask(0o777)",
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_an_owner_in_odd_circumstances_is_served_all_the_same(name: str) -> None:
    text = (
        f"import os, resource, signal, sys\nsys.path.insert(0, {ROOT!r})\n{CIRCUMSTANCES[name]}\n"
        "from selfkd.sandbox import Limits, Sandbox\n"
        f"for tier in {TIERS!r}:\n"
        "  print(Sandbox(tier=tier).run('print(input())', 'x').stdout, end='')\n"
        "  print(Sandbox(Limits(seconds=9, cpu=1), tier=tier).run('while True: pass').limit)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stdout == "x\ncpu\n" * len(TIERS), done


@pytest.mark.parametrize("tier", TIERS)
def test_a_fork_of_the_owner_does_not_keep_its_programs_alive(tier: int) -> None:
    text = (
        f"import os, sys, threading, time\nsys.path.insert(0, {ROOT!r})\nfrom selfkd.sandbox import Limits, Sandbox\n"
        f"box = Sandbox(Limits(seconds=600), tier={tier})\n"
        "threading.Thread(target=box.run, args=('import time\\ntime.sleep(600)',), daemon=True).start()\n"
        "time.sleep(0.5)\n"
        "if os.fork() == 0:\n  time.sleep(20)\n  os._exit(0)\n"
        "print('ready', flush=True)\ntime.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert owner.stdout and owner.stdout.readline() == "ready\n"
    below = watch.tree(owner.pid)[1:]
    programs = [one for one in below if b"warden" in watch.read(f"/proc/{one}/cmdline")]
    assert len(programs) == (3 if tier == 2 else 2), below
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until_gone(programs)
    for one in set(below) - set(programs):
        os.kill(one, signal.SIGKILL)
