"""Worker processes that run a user's function: in batches, in order, with a deadline per call and a memory cap.

A call that hangs or crashes takes down its own worker and nothing else: its sample gets the reason instead of a value, and
the rest of the batch goes on in a fresh worker. What a call is: `selfkd.rewards.contract`.
Python's own timeouts would not do: `signal.alarm` works only in a main thread, and a regular expression gone wild holds the
interpreter lock. So the parent watches a counter in shared memory and kills from outside.

A worker imports neither polars nor torch: it starts in about 50 ms, and a start is what a hung sample costs.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import mmap
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from selfkd.core.pool import Function
from selfkd.errors import BackendError, UsageError
from selfkd.rewards.contract import LENGTH, Result, Row
from selfkd.rewards.contract import failed as failed


def cut(rows: Iterable[dict[str, Any]], size: int = 1024) -> Iterator[list[dict[str, Any]]]:
    """Batches of about `size` rows that never part the samples of one prompt; rows of a group must be neighbours."""
    batch: list[dict[str, Any]] = []
    for row in rows:
        if len(batch) >= size and row["group"] != batch[-1]["group"]:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")

LOAD_SECONDS = 120.0  # to import the file, and whatever it imports, on a busy machine
STARTS = 3  # workers in a row that may die before they begin a sample
KEPT = 8  # idle workers kept for the next call: starting one costs 50 ms, importing sympy another second
START = "import sys; from selfkd.rewards.contract import serve; serve(*map(int, sys.argv[1:]))"


class Target(NamedTuple):
    """What a worker loads. Two equal targets may share a worker, so everything that could change an answer is in it."""

    path: str
    name: str
    params: str
    digest: str
    memory_gb: float
    folder: str
    owner: int  # a forked copy of this process must not talk to its parent's workers


class Lost(Exception):
    """The worker is gone; `reason` is what its sample is told."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def spread(
    function: Function, batches: Iterable[list[dict[str, Any]]], workers: int, timeout: float, memory_gb: float = 4.0
) -> Iterator[list[Result]]:
    """The results of each batch, in order, from at most `workers` processes; closing the iterator kills what is running.

    A batch must hold whole groups. UsageError where the function's file cannot be loaded; a call that fails is a result.
    """
    crew = Crew(target(function, memory_gb), timeout)
    waiting: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(workers, "reward") as threads:
        try:
            for batch in batches:
                waiting.append(threads.submit(crew.score, batch))
                while waiting and (waiting[0].done() or len(waiting) >= 2 * workers):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            crew.stop()


def ask(function: Function, question: str, timeout: float = 60.0) -> Any:
    """One question (`doctests`) to a new worker. UsageError where the file cannot be loaded, or no answer comes in time."""
    worker = Worker(target(function, 4.0))
    try:
        worker.load()
        worker.send(question)
        return worker.receive(timeout, start=timeout)
    except Lost as lost:
        raise UsageError(f"{function.name}: {question}: {lost.reason}", str(function.path)) from None
    finally:
        worker.close()


def target(function: Function, memory_gb: float) -> Target:
    params = json.dumps(dict(function.params), sort_keys=True)
    return Target(str(function.path), function.name, params, function.digest, memory_gb, os.getcwd(), os.getpid())


class Crew:
    """The workers of one `spread`: each thread hires one, asks, and hands it back."""

    def __init__(self, target: Target, timeout: float) -> None:
        self.target, self.timeout = target, timeout
        self.busy: set[Worker] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for worker in self.busy:
                worker.kill()

    def enlist(self, worker: Worker) -> None:
        with self.lock:
            self.busy.add(worker)
            if self.stopped:
                worker.kill()

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Results of one batch. Every death but those of a start-up settles at least one sample, so this ends."""
        results: list[Result | None] = [None] * len(rows)
        starts = 0
        while (todo := [place for place, result in enumerate(results) if result is None]) and not self.stopped:
            worker = hire(self.target, self.enlist)
            try:
                worker.score([rows[place] for place in todo], todo, results, self.timeout)
                self.dismiss(worker, release)
            except Lost as lost:
                begun = worker.place()
                self.dismiss(worker, Worker.close)
                fallen = [place for place in worker.same_unit(rows, todo, begun) if results[place] is None]
                starts = 0 if fallen else starts + 1
                for place in fallen:
                    results[place] = (None, lost.reason)
                if starts >= STARTS:
                    raise BackendError(f"{starts} workers in a row: {lost.reason}", self.target.path) from None
        return [result or (None, "stopped") for result in results]

    def dismiss(self, worker: Worker, how: Callable[[Worker], None]) -> None:
        with self.lock:
            self.busy.discard(worker)
        how(worker)


_idle: list[Worker] = []

_idle_lock = threading.Lock()


def hire(target: Target, enlist: Callable[[Worker], None]) -> Worker:
    """An idle worker that has loaded this very target, or a new one."""
    with _idle_lock:
        equal = next((worker for worker in _idle if worker.target == target), None)
        if equal:
            _idle.remove(equal)
    worker = equal or Worker(target)
    enlist(worker)
    if not worker.loaded:
        worker.load()
    return worker


def release(worker: Worker) -> None:
    with _idle_lock:
        _idle.append(worker)
        surplus = [_idle.pop(0) for _ in range(len(_idle) - KEPT)]
    for old in surplus:
        old.close()


@atexit.register
def dismiss_idle() -> None:
    """End the workers kept for a next call."""
    with _idle_lock:
        workers = [worker for worker in _idle if worker.target.owner == os.getpid()]
        _idle.clear()
    for worker in workers:
        worker.close()


class Worker:
    """One process and its pipes. It dies with us: the kernel kills its whole group when our end of `lifeline` closes."""

    def __init__(self, target: Target) -> None:
        self.target, self.loaded, self.grouped = target, False, False
        self.wants: frozenset[str] | None = None
        lifeline, ours = os.pipe()
        self.lifeline = os.fdopen(ours, "wb")
        shared = tempfile.TemporaryFile()  # noqa: SIM115  it must outlive the start of the process
        shared.truncate(mmap.PAGESIZE)
        self.counter = mmap.mmap(shared.fileno(), mmap.PAGESIZE)
        numbers = [lifeline, shared.fileno(), int(target.memory_gb * (1 << 30))]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment(),
            pass_fds=numbers[:2],
            start_new_session=True,  # Ctrl-C stops the driver, which then stops its workers; a kill reaches its children
        )
        os.close(lifeline)
        shared.close()
        assert self.process.stdin and self.process.stdout
        self.commands, self.replies = self.process.stdin, self.process.stdout
        self.buffer = bytearray()

    def load(self) -> None:
        try:
            self.send(dict(path=self.target.path, name=self.target.name, params=json.loads(self.target.params)))
            answer = self.receive(LOAD_SECONDS)
        except Lost as lost:
            answer = lost.reason
        if isinstance(answer, str):
            self.close()
            raise UsageError(f"{self.target.name} could not be loaded: {answer}", self.target.path)
        self.wants, self.grouped = answer
        self.loaded = True

    def score(self, rows: Sequence[Row], places: Sequence[int], results: list[Result | None], timeout: float) -> None:
        """Fill `results` at `places`, part by part, so that what came before a crash is not asked again."""
        wants = self.wants
        self.send([row if wants is None else {key: row.get(key) for key in wants} for row in rows])
        missing = len(rows)
        while missing:
            part = self.receive(timeout)
            missing -= len(part)
            for place, value, why in part:
                results[places[place]] = (value, why)

    def same_unit(self, rows: Sequence[Row], todo: Sequence[int], begun: int | None) -> list[int]:
        """The places that fall with the call that was running: one sample, or a whole group."""
        if begun is None:
            return []
        place = todo[begun]
        return [other for other in todo if rows[other].get("group") == rows[place].get("group")] if self.grouped else [place]

    def place(self) -> int | None:
        """The first sample of the call that is running; None before the first one and after the last one."""
        return int(LENGTH.unpack_from(self.counter)[0]) - 1 if any(self.counter[: LENGTH.size]) else None

    def send(self, message: Any) -> None:
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self.counter[: LENGTH.size] = bytes(LENGTH.size)
        view = memoryview(LENGTH.pack(len(data)) + data)
        try:
            while view:
                view = view[os.write(self.commands.fileno(), view) :]
        except BrokenPipeError:
            raise Lost(self.death()) from None

    def receive(self, timeout: float, start: float = LOAD_SECONDS) -> Any:
        """The next message. The clock is that of one call: it starts anew whenever the counter moves; `start` is for the rest.

        A gap in our own attention (this process was stopped, or starved) counts as one second at most.
        """
        poll = select.poll()
        poll.register(self.replies, select.POLLIN | select.POLLHUP)
        stuck, seen, before = 0.0, self.place(), time.monotonic()
        while (message := self.whole()) is None:
            if poll.poll(1000 * min(0.25, timeout / 4)):
                data = os.read(self.replies.fileno(), 1 << 20)
                if not data:
                    raise Lost(self.death())
                self.buffer += data
            now, at = time.monotonic(), self.place()
            stuck = stuck + min(now - before, 1.0) if at == seen else 0.0
            seen, before = at, now
            limit = timeout if at is not None else start
            if stuck > limit:
                raise Lost(f"did not answer within {limit:g} s")
        return message[0]

    def whole(self) -> tuple[Any] | None:
        """The first complete message of the buffer, taken out of it."""
        if len(self.buffer) < LENGTH.size:
            return None
        end = LENGTH.size + LENGTH.unpack_from(self.buffer)[0]
        if len(self.buffer) < end:
            return None
        message = pickle.loads(memoryview(self.buffer)[LENGTH.size : end])  # our own process wrote it
        self.buffer = self.buffer[end:]
        return (message,)

    def death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        self.kill()
        code = self.process.wait()
        return f"the worker died (signal {-code})" if code < 0 else f"the worker died (exit code {code})"

    def kill(self) -> None:
        """The worker and every process it started. Callable from any thread, any number of times."""
        if self.lifeline.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self.process.wait()
        self.commands.close()
        self.replies.close()
        self.lifeline.close()


def environment() -> dict[str, str]:
    """Ours without secrets; one thread per library, since there is one worker per core; hashes that do not vary."""
    kept = {name: value for name, value in os.environ.items() if not any(word in name.upper() for word in SECRET)}
    home = str(Path(__file__).resolve().parents[2])
    paths = [path for path in sys.path if path]
    return (
        {"OMP_NUM_THREADS": "1"}
        | kept
        | {
            "PYTHONPATH": os.pathsep.join(paths if home in paths else [*paths, home]),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
    )
