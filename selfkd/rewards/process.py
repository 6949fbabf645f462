"""One worker process as its parent sees it: started, fed, watched by a clock, and killed from outside.

Python's own timeouts would not do: `signal.alarm` works only in a main thread, and a regular expression gone wild holds the
interpreter lock. So the parent watches a counter in shared memory. What the process itself does: `selfkd.rewards.worker`.
"""

from __future__ import annotations

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
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfkd.core.pool import Function
from selfkd.errors import UsageError
from selfkd.rewards.advice import is_secret, way_out
from selfkd.rewards.contract import Parameters, Result, Row
from selfkd.rewards.isolate import isolated
from selfkd.rewards.worker import LENGTH

LOAD_SECONDS = 120.0  # to import the file, and whatever it imports, on a busy machine
START = "import sys; from selfkd.rewards.worker import serve; serve(*map(int, sys.argv[1:]))"


class WorkerSpec(NamedTuple):
    """What a worker has loaded, and where. Equal ones may share a worker, so everything that can change an answer counts."""

    path: str  # of the copy that it runs
    shown: str  # how messages call the file
    name: str
    params: str
    digest: str
    memory_gb: float
    folder: str  # its working directory
    environment: tuple[str, ...]
    prints: bool  # what the function prints is seen on standard error
    owner: int  # a forked copy of this process must not talk to its parent's workers


class WorkerLost(Exception):
    """The worker is gone; `reason` is why the sample of its call has no value."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def spec_of(function: Function, memory_gb: float, prints: bool = False) -> WorkerSpec:
    """Return what a worker of this process must load to run `function`: a copy of its file, in the folder of that copy."""
    path = function.path.absolute() if function.in_place else isolated(function.path)
    folder = os.getcwd() if function.in_place else str(path.parent)
    params = json.dumps(dict(function.params), sort_keys=True)
    shown, allowed = str(function.path), tuple(function.environment)
    return WorkerSpec(str(path), shown, function.name, params, function.digest, memory_gb, folder, allowed, prints, os.getpid())


class WorkerProcess:
    """One process and its pipes. It dies with us: the kernel kills its whole group when our end of `lifeline` closes."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec, self.ready = spec, False
        self.wants: frozenset[str] | None = None
        self.takes = Parameters((), frozenset(), False)
        lifeline, ours = os.pipe()
        self.lifeline = os.fdopen(ours, "wb")
        shared = tempfile.TemporaryFile()  # noqa: SIM115  it must outlive the start of the process
        shared.truncate(mmap.PAGESIZE)
        self.counter = mmap.mmap(shared.fileno(), mmap.PAGESIZE)
        numbers = [lifeline, shared.fileno(), int(spec.memory_gb * (1 << 30))]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if spec.prints else subprocess.DEVNULL,
            bufsize=0,
            cwd=spec.folder,
            env=environment(spec.environment),
            pass_fds=numbers[:2],
            start_new_session=True,  # Ctrl-C stops the driver, which then stops its workers; a kill reaches its children
        )
        os.close(lifeline)
        shared.close()
        assert self.process.stdin and self.process.stdout
        self.commands, self.replies = self.process.stdin, self.process.stdout
        self.buffer = bytearray()

    def load(self) -> None:
        """Have the file loaded; UsageError where it cannot be."""
        try:
            params = json.loads(self.spec.params)
            self.send(dict(path=self.spec.path, shown=self.spec.shown, name=self.spec.name, params=params))
            answer = self.receive(LOAD_SECONDS)
        except WorkerLost as lost:
            answer = lost.reason
        if isinstance(answer, str):
            self.close()
            fix = way_out(answer, self.spec.shown, self.spec.environment)
            raise UsageError(f"{self.spec.name} could not be loaded: {answer}", self.spec.shown, fix)
        self.wants, self.takes = answer
        self.ready = True

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

    def places_of_call(self, begun: int | None, rows: Sequence[Row], todo: Sequence[int]) -> list[int]:
        """Return the places of `todo` whose call was the one at `begun`: one sample, or a whole group."""
        if begun is None:
            return []
        place = todo[begun]
        return (
            [other for other in todo if rows[other].get("group") == rows[place].get("group")] if self.takes.grouped else [place]
        )

    def running_place(self) -> int | None:
        """Return the first sample of the call that is running; None before the first one and after the last one."""
        return int(LENGTH.unpack_from(self.counter)[0]) - 1 if any(self.counter[: LENGTH.size]) else None

    def send(self, message: Any) -> None:
        """Write one message; WorkerLost where nobody reads it."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        self.counter[: LENGTH.size] = bytes(LENGTH.size)
        view = memoryview(LENGTH.pack(len(data)) + data)
        try:
            while view:
                view = view[os.write(self.commands.fileno(), view) :]
        except BrokenPipeError:
            raise WorkerLost(self.death()) from None

    def receive(self, timeout: float, start: float = LOAD_SECONDS) -> Any:
        """Return the next message, or raise WorkerLost where the process died or a call took too long.

        The clock is that of one call: it starts anew whenever the counter moves; `start` is the limit outside of calls. A gap
        in our own attention (this process was stopped, or starved) counts as one second at most.
        """
        poll = select.poll()
        poll.register(self.replies, select.POLLIN | select.POLLHUP)
        stuck, seen, before = 0.0, self.running_place(), time.monotonic()
        while (message := self.take_message()) is None:
            if poll.poll(1000 * min(0.25, timeout / 4)):
                data = os.read(self.replies.fileno(), 1 << 20)
                if not data:
                    raise WorkerLost(self.death())
                self.buffer += data
            now, at = time.monotonic(), self.running_place()
            stuck = stuck + min(now - before, 1.0) if at == seen else 0.0
            seen, before = at, now
            limit = timeout if at is not None else start
            if stuck > limit:
                raise WorkerLost(f"did not answer within {limit:g} s")
        return message[0]

    def take_message(self) -> tuple[Any] | None:
        """Take the first complete message out of the buffer; None where there is none yet."""
        if len(self.buffer) < LENGTH.size:
            return None
        end = LENGTH.size + LENGTH.unpack_from(self.buffer)[0]
        if len(self.buffer) < end:
            return None
        message = pickle.loads(memoryview(self.buffer)[LENGTH.size : end])  # our own process wrote it
        self.buffer = self.buffer[end:]
        return (message,)

    def death(self) -> str:
        """End the process and return how it died, or was killed now."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        self.kill()
        code = self.process.wait()
        return f"the worker died (signal {-code})" if code < 0 else f"the worker died (exit code {code})"

    def kill(self) -> None:
        """Kill the worker and every process it started. Callable from any thread, any number of times."""
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


def import_paths() -> list[str]:
    """Return where we import from, without the folder that Python adds by itself: that of the script, or the working directory.

    What a reward finds there would be found by nobody who goes on with the run from another folder.
    """
    named = {os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path}
    paths = [os.path.abspath(path) for path in sys.path if path]
    script = os.path.dirname(os.path.abspath(sys.argv[0]))
    added = {os.getcwd(), *(path for path in paths[:1] if path == script)} - named
    return [path for path in paths if path not in added]


def environment(allowed: Collection[str] = ()) -> dict[str, str]:
    """Return our variables without secrets, and hashes that do not vary; one thread per library, with one worker per core.

    `allowed` are secrets that are handed on by name.
    """
    harmless = {name: value for name, value in os.environ.items() if not is_secret(name, allowed, value)}
    home = str(Path(__file__).resolve().parents[2])
    paths = import_paths()
    fixed = {
        "PYTHONPATH": os.pathsep.join(paths if home in paths else [*paths, home]),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return {"OMP_NUM_THREADS": "1"} | harmless | fixed
