"""A pool of worker processes that run a user's function: in batches, in order, with a deadline per call and a memory cap.

A call that hangs or crashes takes down its own worker and nothing else: its sample gets the reason instead of a value, and
the rest of the batch goes on in a fresh worker. What a call is: `selfkd.rewards.contract`; what a worker is:
`selfkd.rewards.process`. A worker starts in about 50 ms, and a start is what a hung sample costs.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from selfkd.core.pool import Function
from selfkd.errors import BackendError, UsageError
from selfkd.rewards.contract import Parameters, Result, Row
from selfkd.rewards.process import WorkerLost, WorkerProcess, WorkerSpec, spec_of
from selfkd.rewards.worker import Failed

Question = str | tuple[str, dict[str, Any]]

FAILED_STARTS = 3  # workers in a row that may die before they begin a sample
IDLE_WORKERS = 8  # kept for the next call: starting one costs 50 ms, importing sympy another second
MEMORY_GB = 4.0

_idle: list[WorkerProcess] = []
_idle_lock = threading.Lock()


def cut(rows: Iterable[dict[str, Any]], size: int = 1024) -> Iterator[list[dict[str, Any]]]:
    """Yield batches of about `size` rows that never part the samples of one prompt; rows of a group must be neighbours."""
    batch: list[dict[str, Any]] = []
    for row in rows:
        if len(batch) >= size and row["group"] != batch[-1]["group"]:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def spread(
    function: Function,
    batches: Iterable[list[dict[str, Any]]],
    workers: int,
    timeout: float,
    memory_gb: float = MEMORY_GB,
    prints: bool = False,
) -> Iterator[list[Result]]:
    """Yield the results of each batch, in order, from at most `workers` processes; closing the iterator kills what is running.

    A batch must hold whole groups. `prints` lets what the function prints through, to standard error. UsageError where the
    function's file cannot be loaded; a call that fails is a result.
    """
    pool = WorkerPool(spec_of(function, memory_gb, prints), timeout)
    waiting: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(workers, "reward") as threads:
        try:
            for batch in batches:
                waiting.append(threads.submit(pool.score, batch))
                while waiting and (waiting[0].done() or len(waiting) >= 2 * workers):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            pool.stop()


def loaded(function: Function, memory_gb: float = MEMORY_GB) -> Parameters:
    """Have a worker load the function, from a copy of its file in an empty folder, and return what it can be given by name.

    UsageError where it cannot be loaded so. The worker is kept for a next call.
    """
    worker = take_worker(spec_of(function, memory_gb), lambda _: None)
    keep_idle(worker)
    return worker.takes


def question(function: Function, asked: Question, timeout: float = 60.0, memory_gb: float = MEMORY_GB) -> Any:
    """Put one of `worker.QUESTIONS` to a new worker, or have it call what is `asked`, as (module:function, arguments), with the function.

    UsageError where the file cannot be loaded, or no answer comes in time.
    """
    worker = WorkerProcess(spec_of(function, memory_gb))
    try:
        worker.load()
        worker.send(asked)
        answer = worker.receive(timeout, start=timeout)
    except WorkerLost as lost:
        name = asked if isinstance(asked, str) else asked[0].partition(":")[2]
        raise UsageError(f"{function.name}: {name}: {lost.reason}", str(function.path)) from None
    else:
        if isinstance(answer, Failed):
            raise UsageError(f"{function.name}: {answer.why}", str(function.path))
        return answer
    finally:
        worker.close()


def worker_facts(function: Function, timeout: float = 60.0) -> dict[str, Any]:
    """Return what a worker that has loaded the function computes with; an idle one is asked where there is one."""
    worker = take_worker(spec_of(function, MEMORY_GB), lambda worker: None)
    try:
        worker.send("facts")
        said: dict[str, Any] = worker.receive(timeout, start=timeout)
    except WorkerLost as lost:
        worker.close()
        raise BackendError(f"a worker cannot say what it computes with: {lost.reason}", str(function.path)) from None
    keep_idle(worker)
    return said


class WorkerPool:
    """The workers of one `spread`: each thread takes one, has a batch scored, and gives it back."""

    def __init__(self, spec: WorkerSpec, timeout: float) -> None:
        self.spec, self.timeout = spec, timeout
        self.busy: set[WorkerProcess] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for worker in self.busy:
                worker.kill()

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Return the results of one batch. Every death but those at a start settles at least one sample, so this ends."""
        results: list[Result | None] = [None] * len(rows)
        starts = 0
        while (todo := [place for place, result in enumerate(results) if result is None]) and not self.stopped:
            worker = take_worker(self.spec, self.register)
            try:
                worker.score([rows[place] for place in todo], todo, results, self.timeout)
                self.unregister(worker, keep_idle)
            except WorkerLost as lost:
                begun = worker.running_place()
                self.unregister(worker, WorkerProcess.close)
                fallen = [place for place in worker.places_of_call(begun, rows, todo) if results[place] is None]
                starts = 0 if fallen else starts + 1
                for place in fallen:
                    results[place] = (None, lost.reason)
                if starts >= FAILED_STARTS:
                    raise BackendError(f"{starts} workers in a row: {lost.reason}", self.spec.shown) from None
        return [result or (None, "stopped") for result in results]

    def register(self, worker: WorkerProcess) -> None:
        """Count a worker as busy, before it loads anything: a stop must reach it too."""
        with self.lock:
            self.busy.add(worker)
            if self.stopped:
                worker.kill()

    def unregister(self, worker: WorkerProcess, then: Callable[[WorkerProcess], None]) -> None:
        with self.lock:
            self.busy.discard(worker)
        then(worker)


def take_worker(spec: WorkerSpec, register: Callable[[WorkerProcess], None]) -> WorkerProcess:
    """Return an idle worker that has loaded this very function, or a new one that loads it now."""
    with _idle_lock:
        equal = next((worker for worker in _idle if worker.spec == spec), None)
        if equal:
            _idle.remove(equal)
    worker = equal or WorkerProcess(spec)
    register(worker)
    if not worker.ready:
        worker.load()
    return worker


def keep_idle(worker: WorkerProcess) -> None:
    """Keep the worker for a next call; the ones idle for longest are closed where there are too many."""
    with _idle_lock:
        _idle.append(worker)
        surplus = [_idle.pop(0) for _ in range(len(_idle) - IDLE_WORKERS)]
    for old in surplus:
        old.close()


@atexit.register
def close_idle_workers() -> None:
    """End the workers that were kept for a next call."""
    with _idle_lock:
        workers = [worker for worker in _idle if worker.spec.owner == os.getpid()]
        _idle.clear()
    for worker in workers:
        worker.close()
