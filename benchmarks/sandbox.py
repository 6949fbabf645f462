"""`make bench-sandbox`: what the walls cost, and what a plain subprocess lets through; into the tables of docs/sandbox.md.

Takes about two minutes. Ways of running a program take turns, so that noise falls on all of them alike: read the differences.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from selfkd.sandbox import Limits, Sandbox, attacks, host, sites, tiers, warden_pool, watch
from selfkd.sandbox.limits import MB
from selfkd.sandbox.targets import targets
from selfkd.sandbox.walls import PYTHON_FLAGS

DOCS = Path(__file__).parent.parent / "docs/sandbox.md"
ROUNDS, PROGRAMS, PARALLEL = 150, 400, 16
HELLO = "print(1)"
WORK = "n = sum(i * i for i in range(200_000))\nprint(n)"  # about 20 ms
BARE = [os.path.realpath(sys.executable), *PYTHON_FLAGS, "-c", "pass"]
TWENTY = (
    "tcp", "tcp_listen", "udp", "unix_stream", "abstract_socket", "netlink", "read_passwd", "read_others_file",
    "read_environment_of_owner", "read_descriptors_of_owner", "write_outside", "overwrite", "remove", "change_mode",
    "symlink_escape", "signal_owner", "change_limits_of_owner", "unshare_again", "shared_memory", "secret_in_environment",
)  # fmt: skip


def bare() -> None:
    os.waitpid(os.posix_spawn(BARE[0], BARE, {}), 0)


def boxes() -> dict[str, Sandbox]:
    """The ways to run a Python program, by name."""
    found = {"tier 2, warm": Sandbox(), "tier 2, cold": Sandbox(warm=False)}
    return found | {"tier 1, warm": Sandbox(tier=1), "tier 1, cold": Sandbox(warm=False, tier=1)}


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def starts() -> Iterator[tuple[str, str]]:
    """p50 and p95 of one program after the other, and what each way costs over a bare interpreter."""
    ways: dict[str, Callable[[], object]] = {"bare `python -S -c pass`": bare}
    ways["`subprocess.run`, no walls"] = lambda: subprocess.run(BARE, capture_output=True)
    ways |= {name: (lambda box=box: box.run(HELLO)) for name, box in boxes().items()}
    if bubble := shutil.which("bwrap"):
        bubbled = tiers.runner_at(sites.site(2, sites.python_view(None), bubble), Limits())
        ways["tier 2, cold, by bubblewrap"] = lambda: bubbled.run(HELLO)
    for call in ways.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, call in ways.items():
            times[name].append(1000 * timed(call))
    floor = statistics.median(times["bare `python -S -c pass`"])
    for name, found in times.items():
        p50, p95 = statistics.median(found), statistics.quantiles(found, n=20)[-1]
        yield f"start to end of a program, {name}", f"{p50:.1f} ms, p95 {p95:.1f} ms; {p50 - floor:+.1f} ms"


def throughput() -> Iterator[tuple[str, str]]:
    for name, box in boxes().items():
        rates = []
        for cores in (1, 2):
            with on(cores):
                rates.append(PROGRAMS / timed(lambda box=box, cores=cores: many(box, HELLO, PROGRAMS, cores)))
                warden_pool.close_idle()
        yield (
            f"programs per second, {name}",
            f"{rates[0]:.0f} on one core, {rates[1]:.0f} on two ({rates[1] / rates[0]:.2f} times)",
        )


def many(box: Sandbox, program: str, count: int, threads: int) -> list[float]:
    """Seconds of each of `count` programs, so many at a time."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda _: timed(lambda: box.run(program)), range(count)))


@contextmanager
def on(cores: int) -> Iterator[None]:
    """This process and what it starts on so many cores."""
    usable = sorted(os.sched_getaffinity(0))
    warden_pool.close_idle()
    os.sched_setaffinity(0, usable[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def parallel() -> Iterator[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0))
    for threads in (cores, PARALLEL):
        many(Sandbox(), "import time; time.sleep(0.2)", threads, threads)  # so that all wardens are there
        began = time.perf_counter()
        times = sorted(many(Sandbox(), WORK, 10 * PARALLEL, threads))
        rate = 10 * PARALLEL / (time.perf_counter() - began)
        yield (
            f"programs of 20 ms of work, {threads} at a time, warm",
            f"{rate:.0f} a second; each {1000 * statistics.median(times):.0f} ms, p95 {1000 * times[int(0.95 * len(times))]:.0f} ms",
        )


def tests() -> Iterator[tuple[str, str]]:
    """A whole completion with twenty tests, by the code reward."""
    from selfkd.core.files import builtin_folder
    from selfkd.core.user_module import load_module

    reward = load_module(builtin_folder() / "reward/code.py").code_tests
    calls = [{"call": "f", "args": [n], "returns": n + 1} for n in range(20)]
    prints = [{"input": f"{n}", "output": f"{n + 1}"} for n in range(20)]
    for name, program, given in (
        ("function calls", "```python\ndef f(n): return n + 1\n```", calls),
        ("standard input and output", "```python\nprint(int(input()) + 1)\n```", prints),
    ):
        for warm in (True, False):
            times = [1000 * timed(lambda: reward(program, given, warm=warm)) for _ in range(15)]  # noqa: B023
            yield f"a completion with 20 tests, {name}, {'warm' if warm else 'cold'}", f"{statistics.median(times):.0f} ms"


def memory() -> Iterator[tuple[str, str]]:
    """Memory that is nobody else's or shared by parts (PSS), while a program of one line waits."""
    for name, box in boxes().items():
        warden_pool.close_idle()
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(box.run, "import time; time.sleep(1)")
            time.sleep(0.6)
            [warden] = watch.children(os.getpid())
            program = watch.tree(warden)[-1]
            sizes = [watch.proportional_memory(one) / MB for one in (program, warden)]
            waiting.result()
        yield f"memory (PSS), {name}", f"{sizes[0]:.1f} MB for the program, {sizes[1]:.1f} MB for its warden"


def doors() -> Iterator[Sequence[str]]:
    """Twenty attacks: in a plain subprocess with a timeout, and behind each tier."""
    view = sites.python_view(None)
    tried = {tier: tiers.results(sites.site(tier, view), TWENTY) for tier in (1, 2)}
    for name in TWENTY:
        yield name.replace("_", " "), *(verdict(found) for found in (plainly(name), tried[1][name], tried[2][name]))


def verdict(evidence: str) -> str:
    return "**gets through**" if evidence else "denied"


def plainly(name: str) -> str:
    """One attack in a subprocess with a timeout, which is how evaluation scripts run model-written code; in a scratch folder."""
    with targets() as (aims, evidence):
        program = f"{Path(attacks.__file__).read_text()}\nprint(attack({name!r}, {aims!r}))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, cwd=aims["folder"])
        return done.stdout.strip() or evidence()


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def rows() -> Iterator[tuple[str, str]]:
    for part in (starts, throughput, parallel, tests, memory):
        yield from part()


def put(name: str, text: str) -> None:
    """Between the marks of that name in the document."""
    before, _, rest = DOCS.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    assert end, f"docs/sandbox.md has no marks for {name}"
    DOCS.write_text(f"{before}<!-- {name} -->\n{text}\n{end}{after}")


def main() -> None:
    user = "root" if os.geteuid() == 0 else "an ordinary user"
    where = (
        f"Made by `make bench-sandbox` on {date.today()}, Linux {platform.release().split('-')[0]} {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, as {user}, {host().walls}. One session on a "
        "shared machine; medians of turns taken. Differences are to the bare interpreter."
    )
    put("figures", f"{where}\n\n{table(['what', 'measured'], rows())}")
    put("doors", table(["attack", "plain subprocess", "tier 1", "tier 2"], doors()))
    print(DOCS.read_text().partition("<!-- figures -->")[2])


if __name__ == "__main__":
    main()
