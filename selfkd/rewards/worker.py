"""The life of a worker process: load one function, then score batches and answer questions until the pipe closes.

Its parent is `selfkd.rewards.process`. Imports the standard library only, so that a worker starts in about 50 ms.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import mmap
import os
import pickle
import random
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from selfkd.core.user_module import SHOWN
from selfkd.rewards.contract import WHY_CHARS, Placed, beside, reason_of
from selfkd.rewards.load import load

LENGTH = struct.Struct("<Q")  # precedes each message of the pipes
PART_SECONDS = 0.2  # a worker hands over what it has this often, so a crash repeats little


def serve(lifeline: int, shared: int, memory: int) -> None:
    """Live until the parent closes the pipe. `shared` holds the counter of the call that runs, `memory` is a limit in bytes.

    What the function prints goes to standard error, which the parent opened or not.
    """
    commands, replies = take_pipes()
    die_with_parent(lifeline)
    limit_resources(memory)
    counter = memoryview(mmap.mmap(shared, mmap.PAGESIZE)).cast("Q")
    file: dict[str, Any] = read(commands)
    try:
        reward = load(**file, alone=True)
        write(replies, (reward.wants(), reward.takes))
    except BaseException as error:  # SystemExit too: whatever it was, the parent must hear of it
        write(replies, beside(reason_of(error), file["path"]))
        return
    surroundings = Surroundings()

    def before_call(place: int) -> None:
        counter[0] = place + 1
        surroundings.restore()

    while (message := read(commands)) is not None:
        if isinstance(message, str):
            write(replies, QUESTIONS[message](reward.module))
        elif isinstance(message, tuple):
            write(replies, called(message[0], message[1], reward.call))
        else:
            for part in parts(reward.results(message, before_call)):
                write(replies, part)
        counter[0] = 0


def take_pipes() -> tuple[BinaryIO, int]:
    """Return the pipes from and to the parent; what the function prints or reads is then not in them."""
    commands, replies = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    return os.fdopen(commands, "rb"), replies


def die_with_parent(lifeline: int) -> None:
    """Ask the kernel for SIGKILL to our group when the parent's end closes, however the parent ends.

    PR_SET_PDEATHSIG would not do: it fires when the *thread* that started us ends. Without F_SETSIG (macOS) a thread
    waits for the end of file instead; a call that never lets go of the interpreter lock then outlives its parent.
    """
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    else:
        threading.Thread(target=lambda: os.read(lifeline, 1) or os._exit(0), daemon=True).start()


def limit_resources(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def parts(results: Iterable[Placed]) -> Iterator[list[Placed]]:
    """Yield results in lists that are handed over while the next ones are being made."""
    part: list[Placed] = []
    since = time.monotonic()
    for result in results:
        part.append(result)
        if time.monotonic() - since > PART_SECONDS:
            yield part
            part, since = [], time.monotonic()
    if part:
        yield part


def read(stream: BinaryIO) -> Any:
    """Return the next message, None where the parent closed the pipe."""
    head = stream.read(LENGTH.size)
    return pickle.loads(stream.read(LENGTH.unpack(head)[0])) if len(head) == LENGTH.size else None


def write(handle: int, message: Any) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    view = memoryview(LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(handle, view) :]


class Surroundings:
    """Working directory, environment and random numbers, put back before each call: results must not depend on order.

    An audit hook notices changes, so an innocent function pays nothing; seeding costs 4 microseconds.
    """

    def __init__(self) -> None:
        self.folder, self.variables, self.changed = os.getcwd(), dict(os.environ), False
        sys.addaudithook(self.notice)

    def notice(self, event: str, _: tuple[Any, ...]) -> None:
        if event in ("os.chdir", "os.putenv", "os.unsetenv"):
            self.changed = True

    def restore(self) -> None:
        if self.changed:
            os.chdir(self.folder)
            os.environ.clear()
            os.environ.update(self.variables)
            self.changed = False
        random.seed(0)
        if numpy := sys.modules.get("numpy.random"):
            numpy.seed(0)


# ------------------------------------------------------------------------------------------------------------- questions


def doctest_failures(module: ModuleType) -> list[str]:
    """Run the doctests of the whole file; return its failures, one line each."""
    import doctest  # here: it imports a debugger and a test framework

    found: list[str] = []

    class Runner(doctest.DocTestRunner):
        def report_start(self, out: Any, test: doctest.DocTest, example: doctest.Example) -> None: ...

        def report_failure(self, out: Any, test: doctest.DocTest, example: doctest.Example, got: str) -> None:
            given, wanted = got.strip() or "nothing", example.want.strip() or "nothing"
            found.append(f"{located(test, example)} gives {given}, expected {wanted}")

        def report_unexpected_exception(
            self, out: Any, test: doctest.DocTest, example: doctest.Example, exc_info: tuple[Any, BaseException, Any]
        ) -> None:
            found.append(f"{located(test, example)} raises {beside(reason_of(exc_info[1]), str(module.__file__))}")

    def located(test: doctest.DocTest, example: doctest.Example) -> str:
        line = (test.lineno or 0) + example.lineno + 1
        return f"{vars(module)[SHOWN]}:{line}  {example.source.strip()[:WHY_CHARS]}"

    try:
        tests = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__)
    except ValueError as error:  # of an example that is no Python session; it says which docstring, and in which line of it
        return [f"{vars(module)[SHOWN]}  the examples of a docstring cannot be read: {error}"]
    for test in tests:
        Runner().run(test, out=lambda text: None, clear_globs=False)
    return found


def notes(module: ModuleType) -> Any:
    """Return what the file's own `notes()` says of this host, as plain JSON for the record; if it fails, why."""
    try:
        return json.loads(json.dumps(module.notes(), allow_nan=False))
    except (Exception, SystemExit) as error:  # a note is no reason to lose the scores
        return {"failed": reason_of(error)}


class Failed(NamedTuple):
    """What came of a question that could not be answered."""

    why: str


def called(target: str, arguments: dict[str, Any], function: Callable[..., Any]) -> Any:
    """Return what `module:name` of selfkd says of the function; Failed where it raises, for want of a package perhaps."""
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(function, **arguments)
    except Exception as error:
        return Failed(reason_of(error))


def facts(module: ModuleType) -> dict[str, Any]:
    """Return what this worker computes with, the packages that the function imported among it."""
    from selfkd.core import facts as known  # here: it reads the versions of packages

    return {**known.of_process(()), **known.loaded_versions()}


QUESTIONS: dict[str, Callable[[ModuleType], Any]] = {"doctests": doctest_failures, "notes": notes, "facts": facts}
