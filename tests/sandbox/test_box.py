"""Odd programs end within their limits, with a reason, and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from leftovers import left_behind

from selfkd.errors import SandboxError, UsageError
from selfkd.sandbox import Limits, Sandbox, box, sites, tiers

pytestmark = pytest.mark.skipif(tiers.host().tier < 1, reason=f"this host has {tiers.host().walls}")
MB = 1 << 20
BOX = Sandbox(Limits(seconds=10, memory=256 * MB))
SHORT = Sandbox(Limits(seconds=0.4))


# ----------------------------------------------------------------------------------------------------------- odd programs

ODD = {
    "ends well": ("print(input())", True, ""),
    "empty": ("", True, ""),
    "exit 0": ("import sys; sys.exit(0)", True, ""),
    "exit with text": ("import sys; sys.exit('so long')", False, "exit status 1: so long"),
    "quit": ("exit(3)", False, "exit status 3"),
    "os._exit": ("import os; os._exit(7)", False, "exit status 7"),
    "raises": ("1 / 0", False, "exit status 1: ZeroDivisionError: division by zero"),
    "syntax": ("x = 1 +", False, "exit status 1: SyntaxError: invalid syntax"),
    "NUL": ("a\0b", False, "exit status 1: SyntaxError: source code string cannot contain null bytes"),
    "bad encoding": (b"# coding: no-such\nprint(1)", False, "exit status 1: SyntaxError: (unknown encoding|encoding problem): no-such"),
    "not UTF-8": (b"print('\xff')", False, "UnicodeDecodeError|SyntaxError"),
    "lone surrogate": ("print('\udc80')", False, "SyntaxError|UnicodeEncodeError"),
    "prints no UTF-8": ("import sys; sys.stdout.buffer.write(b'\\xff')", True, ""),
    "segfault": ("import ctypes; ctypes.string_at(0)", False, "ended by SIGSEGV"),
    "abort": ("import os; os.abort()", False, "ended by SIGABRT"),
    "endless output": ("while True: print('x' * 1000)", False, r"output limit \(1 MB of output\)"),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", False, r"output limit \(1 MB of output\)"),
    "recursion": ("def f(): f()\nf()", False, "exit status 1: RecursionError: .*"),
    "recursion without end": (
        "import sys\nsys.setrecursionlimit(1 << 30)\ndef f(): f()\nf()", False, r"memory limit \(256 MB\)|ended by SIGSEGV|.*MemoryError"
    ),
    "memory at once": ("bytearray(3 << 30)", False, "exit status 1: MemoryError"),
    "memory bit by bit": ("kept = []\nwhile True: kept.append(b'x' * 1000000)", False, r"memory limit \(256 MB\)|.*MemoryError"),
    "one huge file": ("open('f', 'wb').write(bytes(20 << 20))", False, r"exit status 1: OSError: \[Errno 27\] File too large"),
    "closes stdout": ("import os\nos.close(1)\nos.close(2)", True, ""),
    "closes stdout and prints": ("import os\nos.close(1)\nprint(1)", False, "exit status 120"),
    "duplicates stdout": ("import os\nos.dup2(1, 9)\nos.write(9, b'x')", True, ""),
    "closes everything": ("import os\nos.closerange(0, 64)", True, ""),
    "full device": ("with open('/dev/full', 'w') as f: f.write('x')", False, r"exit status 1: OSError: \[Errno 28\] No space.*"),
    "many threads": (
        "import threading, time\nfor _ in range(60): threading.Thread(target=time.sleep, args=(5,), daemon=True).start()\ntime.sleep(5)",
        False, r"processes limit \(32 processes and threads\)|exit status 1: RuntimeError: can't start new thread",
    ),
    "a thread at the end": ("import threading\nthreading.Thread(target=lambda: print('late')).start()", True, ""),
    "object at the end": ("class A:\n def __del__(self): print('gone')\na = A()", True, ""),
    "open files": ("kept = [open('/dev/null') for _ in range(100)]", False, r"exit status 1: OSError: \[Errno 24\] Too many open files.*"),
    "stops itself by SIGKILL": ("import os\nos.kill(os.getpid(), 9)", False, "ended by SIGKILL"),
    "an alarm": ("import signal, time\nsignal.alarm(1)\ntime.sleep(5)", False, "ended by SIGALRM"),
    "is an ordinary process": ("import os\nprint(os.getpid())\nassert os.getpid() > 1", True, ""),
    "no core": ("import resource\nassert resource.getrlimit(resource.RLIMIT_CORE) == (1, 1)", True, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_program_ends_with_its_reason(name: str) -> None:
    program, ok, reason = ODD[name]
    done = BOX.run(program, "given")
    assert ok is None or done.ok is ok, done
    assert re.fullmatch(reason, done.reason) or (reason and re.search(f"({reason})", done.reason)), done.reason
    assert done.seconds < 9


SLEEPERS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "ignores SIGTERM": "import signal, time\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\ntime.sleep(1000)",
    "atexit": "import atexit, time\natexit.register(time.sleep, 1000)",
    "__del__": "import time\nclass A:\n  def __del__(self): time.sleep(1000)\na = A()",
    "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    "reads for ever": "import os\nr, w = os.pipe()\nos.read(r, 1)",
    "stops itself": "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(1000)",
    "catches everything": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "trickles": "import time\nwhile True: print('.', flush=True); time.sleep(0.05)",
    "one regular expression": "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')",
}


@pytest.mark.parametrize("tier", [2, 1])
@pytest.mark.parametrize("name", SLEEPERS)
def test_a_program_that_does_not_end_is_ended(name: str, tier: int) -> None:
    done = Sandbox(SHORT.limits, tier=tier).run(SLEEPERS[name])
    assert (done.ok, done.limit, done.reason) == (False, "time", "time limit (0.4 s)")
    assert done.seconds < 5


def test_processor_time_is_limited_for_all_processes_together() -> None:
    burn = "import os\nfor _ in range(3): os.fork()\nwhile True: pass"
    done = Sandbox(Limits(seconds=30, cpu=1)).run(burn)
    assert done.limit in ("cpu", None) and not done.ok and done.seconds < 20, done


@pytest.mark.skipif(tiers.host().tier < 2, reason="needs namespaces")
@pytest.mark.parametrize(
    "program",
    [
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(1000)\n  os._exit(0)",
        "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\nprint(1)",
        "import os, time\nfor _ in range(20):\n  if os.fork() == 0: time.sleep(1000)",
    ],
)
def test_a_daemon_neither_outlives_its_program_nor_holds_its_output(program: str) -> None:
    began = time.monotonic()
    assert BOX.run(program).ok
    assert time.monotonic() - began < 5
    assert left_behind() == left_behind() | {"processes": 1}


def test_nothing_is_left_behind_by_any_of_them() -> None:
    before = left_behind()
    for tier in (2, 1):
        for program, _, _ in list(ODD.values())[:20]:
            Sandbox(BOX.limits, tier=tier).run(program)
        Sandbox(SHORT.limits, tier=tier).run("open('left', 'w').write('x')\nwhile True: pass")
        with Sandbox(SHORT.limits, tier=tier).calls("def f():\n  while True: pass") as program:
            program.call("f")
    assert left_behind() == before


@pytest.mark.parametrize("tier", [2, 1])
def test_the_working_directory_is_empty_writable_and_capped(tier: int) -> None:
    box = Sandbox(Limits(seconds=20, disk=8 * MB, file_size=4 * MB), tier=tier)
    done = box.run("import os, tempfile\nprint(os.listdir('.'))\nopen('a', 'w').write('x')\nprint(open('a').read())")
    assert done.stdout == "[]\nx\n", done
    many = "import time\nfor n in range(40):\n  open(str(n), 'wb').write(bytes(1 << 20)); time.sleep(0.01)"
    done = box.run(many)
    assert not done.ok and ("No space left" in done.reason or done.limit == "disk"), done


def test_five_megabytes_of_code_are_run_or_refused_within_the_limits() -> None:
    done = BOX.run("x = 1\n" * (5 * MB // 6) + "print(x)")
    assert done.stdout == "1\n" or done.limit in ("memory", "time") or "MemoryError" in done.reason


def test_input_of_many_megabytes_arrives_whole() -> None:
    text = "line of input\n" * 500_000
    assert BOX.run("import sys\nprint(len(sys.stdin.read()))", text).stdout == f"{len(text)}\n"
    assert BOX.run("print(sum(1 for _ in open(0)))", text).stdout == "500000\n"


def test_output_is_whole_up_to_the_cap() -> None:
    done = Sandbox(Limits(output=200_000)).run("print('x' * 150_000)")
    assert done.ok and len(done.stdout) == 150_001
    done = Sandbox(Limits(output=200_000)).run("print('x' * 300_000)")
    assert (done.limit, len(done.stdout)) == ("output", 200_000)


# ------------------------------------------------------------------------------------------------------- other interpreters


@pytest.mark.skipif(not os.access("/usr/bin/node", os.X_OK), reason="node is not installed")
def test_javascript_runs_by_node() -> None:
    box = Sandbox(Limits(seconds=20, address_space=None), argv=("/usr/bin/node", "{program}.js"))
    done = box.run("console.log(require('fs').readFileSync(0, 'utf8').trim() + '!', process.argv.length)", "hello")
    assert (done.ok, done.stdout) == (True, "hello! 2\n"), done
    assert "ENOENT" in box.run("require('fs').readFileSync('/etc/passwd')").stderr
    done = box.run("const s = require('net').connect(22, '127.0.0.1'); s.on('error', e => { console.log(e.code); })")
    assert done.stdout in ("EPERM\n", "EACCES\n"), done
    done = Sandbox(Limits(seconds=20, address_space=None, memory=200 * MB), argv=box.argv).run(
        "const a = []; for (;;) a.push(Buffer.alloc(1 << 20, 1))"
    )
    assert (done.ok, done.limit) == (False, "memory"), done


def test_a_shell_script_sees_its_interpreter_and_what_it_was_shown() -> None:
    bare = Sandbox(argv=("/usr/bin/bash", "{program}"))
    assert bare.run("read word; echo ${word^^}; echo /etc/*", "hi").stdout == "HI\n/etc/*\n"
    shown = Sandbox(argv=("/usr/bin/bash", "{program}"), see=("/usr/bin",))
    assert shown.run("tr a-z A-Z | rev", "hi").stdout in ("IH\n", "IH")


def test_another_python_by_path_and_a_fresh_one_for_each_program() -> None:
    fresh = Sandbox(warm=False)
    assert fresh.run("import sys; print(sys.argv, __name__, input())", "x").stdout == "['main.py'] __main__ x\n"
    with fresh.calls("def f(x): return x, {x}") as program:
        assert program.call("f", 2).value == (2, {2})
    other = next(
        (path for name in ("python3.12", "python3.11", "python3") if (path := shutil.which(name, path="/usr/bin"))), None
    )
    if other:
        assert Sandbox(python=other).run("import sys; print(sys.executable)").stdout.startswith("/usr/bin/python3")
    with pytest.raises(UsageError, match="is not a Python that can be run"):
        Sandbox(python="/bin/true").run("print(1)")
    with pytest.raises(UsageError, match="absolute path"):
        Sandbox(argv=("bash", "{program}")).run("")
    with pytest.raises(UsageError, match="Leave argv out"):
        Sandbox(argv=("/usr/bin/bash", "{program}")).calls("")


def test_a_folder_that_is_shown_can_be_imported_from_and_not_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "shown.py").write_text("VALUE = 42")
    (tmp_path / "shown.py").chmod(0o644)
    for warm in (True, False):
        box = Sandbox(see=(str(tmp_path),), warm=warm)
        assert box.run("import shown; print(shown.VALUE)").stdout == "42\n"
        assert not box.run(f"open({str(tmp_path / 'new')!r}, 'w')").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shown.py"]


def test_only_chosen_variables_reach_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for warm in (True, False):
        done = Sandbox(env={"MINE": "1"}, warm=warm).run("import os; print(sorted(os.environ))")
        names = "HOME LANG LC_ALL MINE OMP_NUM_THREADS OPENBLAS_NUM_THREADS PATH PYTHONDONTWRITEBYTECODE PYTHONHASHSEED PYTHONUTF8 TMPDIR TZ"
        assert done.stdout == f"{names.split()}\n"


def test_the_same_program_prints_the_same_twice() -> None:
    program = "print(set('abcdefgh'), hash('x'), {object: 1}.keys())"
    assert BOX.run(program).stdout == BOX.run(program).stdout == Sandbox(warm=False).run(program).stdout


# ------------------------------------------------------------------------------------------------------------ around a run


def test_an_event_loop_goes_on_while_a_program_runs() -> None:
    async def both() -> tuple[int, bool]:
        running = asyncio.create_task(SHORT.arun("while True: pass"))
        ticks = 0
        while not running.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, running.result().ok

    ticks, ok = asyncio.run(both())
    assert ticks > 10 and not ok


def test_a_wall_that_cannot_be_built_stops_the_program_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = sites.site(2, sites.python_view(None), "/bin/false")  # a bubblewrap that cannot make namespaces
    monkeypatch.setattr(Sandbox, "site", lambda self: broken)
    with pytest.raises(SandboxError, match="the walls could not be built: bubblewrap: it ended before") as caught:
        Sandbox().run("print(1)")
    assert "selfkd doctor" in str(caught.value)


def test_the_example_of_the_module_runs_as_printed() -> None:
    text = textwrap.dedent((box.__doc__ or "").split("\n\n", 1)[1].split("\nNothing that is", 1)[0])
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("cba") and "Returned(ok=True, value=42, reason='')" in done.stdout, done.stderr
