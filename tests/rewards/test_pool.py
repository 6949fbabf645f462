"""Whatever a reward does to its process costs its own sample, never a zero, never another sample, never the run."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from scoring import Write, results, row, write

import selfkd
from selfkd.errors import UsageError
from selfkd.rewards.advice import way_out
from selfkd.rewards.contract import AT_CHARS, Reason, told
from selfkd.rewards.pool import cut, spread

__all__ = ["write"]  # a fixture


# ------------------------------------------------------------------------------------------------------ what goes wrong

TROUBLE = """
import ctypes, os, re, subprocess, time
def f(completion):
    if completion == "hang": time.sleep(600)
    if completion == "regex": re.match(r"(a+)+$", "a" * 60 + "b")
    if completion == "segfault": ctypes.string_at(0)
    if completion == "exit": os._exit(0)
    if completion == "child": subprocess.Popen(["sleep", "600"]); time.sleep(600)
    if completion == "memory": return len(bytearray(8 << 30))
    if completion == "print":
        print("noise"); os.write(1, b"noise"); os.write(2, b"noise"); return 1
    if completion == "close":
        os.closerange(0, 3); return 1
    return float(completion)
"""


def test_a_hang_or_a_crash_costs_one_sample_and_nothing_else(write: Write) -> None:
    names = ["1", "hang", "2", "segfault", "3", "exit", "4", "regex", "print", "5", "close", "6"]
    got = dict(zip(names, results(write(TROUBLE), [row(name) for name in names], timeout=1.0), strict=True))
    assert got == {
        **{name: (float(name), "") for name in "123456"},
        **{name: (None, "did not answer within 1 s") for name in ("hang", "regex")},
        "segfault": (None, f"the worker died (signal {signal.SIGSEGV.value})"),
        "exit": (None, "the worker died (exit code 0)"),
        "print": (1.0, ""),
        "close": (1.0, ""),
    }


def test_memory_is_capped(write: Write) -> None:
    assert results(write(TROUBLE), [row("memory"), row("1")], memory_gb=1.0) == [(None, "MemoryError"), (1.0, "")]


def test_a_hang_in_a_group_costs_that_group(write: Write) -> None:
    f = write(
        "import time\ndef f(completions):\n    if 'hang' in completions: time.sleep(600)\n    return [1.0 for _ in completions]"
    )
    rows = [row("a", group="p1"), row("hang", group="p2"), row("b", group="p2"), row("c", group="p3")]
    late = (None, "did not answer within 0.5 s")
    assert results(f, rows, timeout=0.5) == [(1.0, ""), late, late, (1.0, "")]


def test_what_came_before_a_crash_is_not_asked_again(write: Write, tmp_path: Path) -> None:
    log = tmp_path / "log"
    f = write(f"""
import os, time
def f(completion):
    with open({str(log)!r}, "a") as out: out.write(completion + " ")
    time.sleep(0.06)
    if completion == "9": os._exit(1)
    return 1
""")
    assert [value for value, _ in results(f, [row(str(n)) for n in range(10)])] == [1.0] * 9 + [None]
    assert log.read_text().split().count("0") == 1


def test_directory_environment_and_random_numbers_are_put_back_before_each_call(write: Write) -> None:
    f = write("""
import os, random
def f(completion):
    clean = "DIRTY" not in os.environ and os.getcwd() != "/"
    os.environ["DIRTY"] = "1"; os.chdir("/")
    return random.random() if clean else -1
""")
    values = {value for value, _ in results(f, [row() for _ in range(5)])}
    assert len(values) == 1 and values != {-1.0}


SECRETS = (
    "HF_TOKEN",
    "WANDB_API_KEY",
    "my_secret",
    "DB_PASSWORD",
    "PGPASSWORD",
    "OPENAI_APIKEY",
    "API_KEYS",
    "AWS_CREDENTIALS",
    "DB_PASS",
    "MYSQL_PWD",
    "GH_PAT",
    "AUTH_BEARER",
    "BASIC_AUTH",
    "DATABASE_URL",
    "SLACK_WEBHOOK",
    "WANDB_KEY1",
    "SENTRY_DSN",
)
HARMLESS = (
    *("TOKENIZERS_PARALLELISM", "KEYBOARD", "SECRETARY", "HARMLESS", "COMPASS", "MY_PATH", "GIT_AUTHOR_NAME", "PWD", "OLDPWD"),
    *("JUDGE_BASE_URL", "COMPAT"),
)


def test_secrets_do_not_reach_a_reward_and_what_only_looks_a_little_like_one_does(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*SECRETS, *HARMLESS):
        monkeypatch.setenv(name, "x")
    f = write("import os\ndef f(completion): return completion in os.environ")
    assert [value for value, _ in results(f, [row(name) for name in SECRETS])] == [0] * len(SECRETS)
    assert [value for value, _ in results(f, [row(name) for name in HARMLESS])] == [1] * len(HARMLESS)


def test_an_address_that_holds_a_password_does_not_reach_a_reward(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "redis://me:hush@host/0")
    monkeypatch.setenv("JUDGE", "https://host:8000/v1?user=a@b")
    f = write("import os\ndef f(completion): return completion in os.environ")
    assert [value for value, _ in results(f, [row("STORE"), row("JUDGE")])] == [0, 1]


def test_a_secret_is_let_through_by_its_name_and_else_the_reason_names_it(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "x")
    f = write("import os\ndef f(completion): return os.environ['JUDGE_API_KEY'] == 'x'")
    assert results(replace(f, environment=("JUDGE_API_KEY",)), [row()]) == [(1.0, "")]
    assert results(f, [row()]) == [(None, "KeyError: 'JUDGE_API_KEY'")]
    assert "environment: [JUDGE_API_KEY]" in way_out("KeyError: 'JUDGE_API_KEY'", "mine.py")
    assert way_out("KeyError: 'JUDGE_API_KEY'", "mine.py", ("JUDGE_API_KEY",)) == ""
    at_import = write("import os\nKEY = os.environ['JUDGE_API_KEY']\ndef f(completion): return 1")
    with pytest.raises(UsageError, match=r"environment: \[JUDGE_API_KEY\]"):
        results(at_import, [row()])


def test_a_file_that_cannot_be_loaded_stops_at_once(write: Write) -> None:
    with pytest.raises(UsageError, match="ModuleNotFoundError: No module named 'nowhere'"):
        results(write("import nowhere\ndef f(completion): return 1"), [row()])
    with pytest.raises(UsageError, match="the worker died"):
        results(write("import os\nos._exit(7)\ndef f(completion): return 1"), [row()])


def test_imports_inside_the_function_are_not_on_the_first_samples_clock(write: Write, tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1.2)\nVALUE = 1")
    f = write("def g():\n    import slow_to_import\n    return slow_to_import.VALUE\ndef f(completion): return g()")
    assert results(f, [row()], timeout=0.5) == [(1.0, "")]


def test_a_file_called_like_a_standard_module_hides_nothing(write: Write) -> None:
    f = write("import random, re\ndef f(completion): return re.sub('a', '', completion) == ''", file="re.py")
    assert results(f, [row("aa")]) == [(1.0, "")]


# ------------------------------------------------------------------------------------------------------------- the pool


def test_results_come_in_order_for_twenty_thousand_rows(write: Write) -> None:
    f = write("def f(completion): return int(completion)")
    batches = cut((row(str(n), group=str(n // 4)) for n in range(20_000)), 1000)
    got = [value for batch in spread(f, batches, 2, 10.0) for value, _ in batch]
    assert got == list(range(20_000))


def test_a_batch_never_parts_a_group() -> None:
    sizes = [len(batch) for batch in cut([row(group=str(n // 7)) for n in range(70)], 10)]
    assert sizes == [14] * 5


def test_workers_are_used_again_by_the_next_call(write: Write) -> None:
    f = write("import os\ndef f(completion): return os.getpid()")
    assert results(f, [row()]) == results(f, [row()])


def test_a_changed_file_is_not_answered_by_an_old_worker(write: Write) -> None:
    assert results(write("def f(completion): return 1"), [row()]) == [(1.0, "")]
    assert results(write("def f(completion): return 2"), [row()]) == [(2.0, "")]


def test_it_works_from_any_thread(write: Write) -> None:
    f, got = write("def f(completion): return 1"), []
    thread = threading.Thread(target=lambda: got.append(results(f, [row()])))
    thread.start()
    thread.join(30)
    assert got == [[(1.0, "")]]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(pids) and not any(alive(pid) for pid in pids)


SPAWN = """
import os, subprocess, time
def f(completion):
    if completion == "fast": return 1
    child = subprocess.Popen(["sleep", "600"])
    with open({log!r}, "a") as out: out.write(f"{{os.getpid()}} {{child.pid}} ")
    time.sleep(600)
"""


def written(log: Path) -> list[int]:
    deadline = time.monotonic() + 20
    while not (log.exists() and len(log.read_text().split()) >= 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [int(word) for word in log.read_text().split()]


def test_closing_the_iterator_early_leaves_no_process_behind(write: Write, tmp_path: Path) -> None:
    f = write(SPAWN.format(log=str(tmp_path / "log")))
    stream = spread(f, [[row("fast")], [row("slow")], [row("slow")]], 2, 60.0)
    assert next(stream) == [(1.0, "")]
    pids = written(tmp_path / "log")
    stream.close()  # type: ignore[attr-defined]
    assert gone(pids)


def test_a_timeout_kills_what_the_reward_started(write: Write, tmp_path: Path) -> None:
    f = write(SPAWN.format(log=str(tmp_path / "log")))
    assert results(f, [row("slow")], timeout=0.5) == [(None, "did not answer within 0.5 s")]
    assert gone(written(tmp_path / "log"))


def test_a_hung_worker_dies_with_a_killed_parent(write: Write, tmp_path: Path) -> None:
    write(SPAWN.format(log=str(tmp_path / "log")))
    code = (
        "from pathlib import Path; from selfkd.rewards.find import find_function; from selfkd.rewards.pool import spread; f = find_function('mine.py:f', [Path('.')]); "
        "list(spread(f, [[dict(completion='slow')]], 1, 600.0))"
    )
    home = str(Path(selfkd.__file__).parent.parent)
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": home})
    pids = written(tmp_path / "log")
    parent.kill()
    parent.wait()
    assert gone(pids)


def test_a_worker_imports_neither_polars_nor_numpy(write: Write) -> None:
    f = write("import sys\ndef f(completion): return completion in sys.modules")
    assert results(f, [row("polars"), row("numpy"), row("torch"), row("random")]) == [(0, ""), (0, ""), (0, ""), (1, "")]


def test_where_a_call_raised_crosses_from_its_worker_as_a_short_text_and_its_frames_do_not(write: Write) -> None:
    function = write("def f(completion):\n    return g(completion)\ndef g(text):\n    raise ValueError('no')\n", "f")
    [(value, why)] = results(function, [row("a")])
    assert (value, why) == (None, "ValueError: no") and told("f", why) == f"f ({function.path.name}:4): ValueError: no"
    assert isinstance(why, Reason) and why.raised and why.trace == ""
    assert len(Reason("x", "y" * 10_000).at) == AT_CHARS
    assert "y" not in repr(pickle.loads(pickle.dumps(Reason("x", trace="y"))).__dict__)
