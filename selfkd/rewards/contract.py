"""Calling a user's function by the names of its parameters, and reading what it returns. Runs inside the worker processes.

Names are the contract. A function receives only what it names:

    prompt completion answer meta sample          of one sample: text of the last user message, the reply, the gold answer,
                                                  the prompt's meta columns (a dict), the sample's light columns (a dict)
    <a meta column> or a key of `params:`         by its own name
    prompts completions answers metas samples     lists over all samples of one prompt: the function is called once per
    completion_ids                                prompt and returns a list, so a majority vote is an ordinary reward

Beside a plural, `prompt`, `answer`, `meta` and meta columns are the prompt's own single values, except in a TRL reward
function (a plural and `**kwargs`), where all columns are lists as TRL gives them. TRL passes lists of messages for
conversational prompts; here prompts and completions are always texts. `async def` is awaited. A function that asks for an
answer (without a default) is not called for a prompt that has none: a comparison with None would be a quiet zero.

A failure is a value with a reason, never a zero: `(None, "ValueError: ...")`. Imports the standard library only, so that a
worker starts fast.
"""

from __future__ import annotations

import asyncio
import contextlib
import dis
import fcntl
import importlib
import inspect
import json
import math
import mmap
import numbers
import os
import pickle
import random
import re
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

Row = Mapping[str, Any]
Result = tuple[float | None, str]
ABSTAINED = "abstained"
SINGULAR = {"prompt": "prompt", "completion": "completion", "answer": "answer", "meta": "meta", "sample": "sample"}
PLURAL = {f"{name}s": name for name in SINGULAR} | {"completion_ids": "token_ids"}
CONTRACT = (*SINGULAR, *PLURAL)
WHY_CHARS = 300
LENGTH = struct.Struct("<Q")  # stands before each message of the pipes
PART_SECONDS = 0.2  # a worker hands over what it has this often, so a crash repeats little
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")  # differs from process to process; a reason is part of a digest


@dataclass(frozen=True)
class Reward:
    """A loaded function and how to call it. `needs` are parameters without a default; `everything` is a `**kwargs`."""

    call: Callable[..., Any]
    params: Mapping[str, Any]
    module: ModuleType
    names: tuple[str, ...]
    needs: frozenset[str]
    everything: bool

    @property
    def grouped(self) -> bool:
        return any(name in PLURAL for name in self.names) or (self.names == () and self.everything)

    @property
    def trl(self) -> bool:
        return self.grouped and self.everything

    def wants(self) -> frozenset[str] | None:
        """Which keys of a row the function can see, None for all: the rest need not be sent to a worker."""
        if self.everything:
            return None
        return keys_of(self.names, self.params) | ({"group"} if self.grouped else set())

    def results(self, rows: Sequence[Row], counter: Any = None) -> Iterator[tuple[int, float | None, str]]:
        """(place, value, why) of each row. `counter[0]` says which call is running: 1 + the place of its first row."""
        for places in self.units(rows):
            if counter is not None:
                counter[0] = places[0] + 1
            surroundings.restore()
            values = self.score([rows[place] for place in places])
            for place, (value, why) in zip(places, values, strict=True):
                yield place, value, why

    def units(self, rows: Sequence[Row]) -> Iterable[list[int]]:
        """The rows of each call: one, or those of one prompt."""
        if not self.grouped:
            return ([place] for place in range(len(rows)))
        groups: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row["group"], []).append(place)
        return groups.values()

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Call once. Whatever goes wrong inside is the reason that these rows have no value."""
        try:
            arguments = self.arguments(rows)
            returned = self.call(**arguments)
            if inspect.isawaitable(returned):
                returned = loop().run_until_complete(awaited(returned))
            return each(returned, len(rows)) if self.grouped else [valued(returned)]
        except (Exception, SystemExit) as error:  # sys.exit() is the function's own doing
            return [(None, brief(error))] * len(rows)

    def arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        metas = [json.loads(row["meta"]) if isinstance(row.get("meta"), str) else row.get("meta") or {} for row in rows]
        found: dict[str, Any] = {}
        for name in self.names:
            if name in self.params:
                continue
            value = self.value(name, rows, metas)
            if value is not Missing:
                found[name] = value
            elif name in self.needs:
                raise Unscored(f"this prompt has no {name}" if name == "answer" else f"no '{name}' in the meta of this prompt")
        return found | dict(self.params) | (self.rest(rows, metas, found) if self.everything else {})

    def value(self, name: str, rows: Sequence[Row], metas: Sequence[Mapping[str, Any]]) -> Any:
        if name in PLURAL:
            return metas if name == "metas" else [row.get(PLURAL[name]) for row in rows]
        if name == "meta":
            return metas if self.trl else metas[0]
        if name in SINGULAR:
            missing = name == "answer" and rows[0].get("answer") is None
            return Missing if missing else [row.get(name) for row in rows] if self.trl else rows[0].get(name)
        if name not in metas[0]:
            return Missing
        return [meta.get(name) for meta in metas] if self.trl else metas[0][name]

    def rest(self, rows: Sequence[Row], metas: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
        """What `**kwargs` receives: all meta columns and the contract, as lists in a TRL function."""
        contract = ("prompts", "completions", "completion_ids", "answer") if self.trl else tuple(SINGULAR)
        names = [name for name in dict.fromkeys((*metas[0], *contract)) if name not in found and name not in self.params]
        values = {name: self.value(name, rows, metas) for name in names}
        return {name: value for name, value in values.items() if value is not Missing}

    def notes(self) -> Any:
        """What the file's own `notes()` says of this host, as plain JSON for the record; if it fails, why."""
        try:
            return json.loads(json.dumps(self.module.notes(), allow_nan=False))
        except (Exception, SystemExit) as error:  # a note is no reason to lose the scores
            return {"failed": brief(error)}

    def doctests(self) -> list[str]:
        """Failures of the doctests of the whole file, one line each."""
        import doctest  # here: it imports a debugger and a test framework

        found: list[str] = []

        class Runner(doctest.DocTestRunner):
            def report_start(self, out: Any, test: Any, example: Any) -> None: ...

            def report_failure(self, out: Any, test: Any, example: Any, got: str) -> None:
                found.append(
                    f"{said(test, example)} gives {got.strip() or 'nothing'}, expected {example.want.strip() or 'nothing'}"
                )

            def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
                found.append(f"{said(test, example)} raises {brief(exc_info[1])}")

        def said(test: Any, example: Any) -> str:
            line = (test.lineno or 0) + example.lineno + 1
            return f"{self.module.__file__}:{line}  {example.source.strip()[:WHY_CHARS]}"

        for test in doctest.DocTestFinder(exclude_empty=True).find(self.module, self.module.__name__):
            Runner().run(test, out=lambda text: None, clear_globs=False)
        return found


def keys_of(names: Iterable[str], params: Mapping[str, Any]) -> frozenset[str]:
    """The keys of a row behind parameter names; a name outside the contract is a meta column."""
    return frozenset((SINGULAR | PLURAL).get(name, "meta") for name in names if name not in params)


class Missing:
    """Says that a row has no such value, which is not the same as the value None."""


class Unscored(Exception):
    """The function cannot be asked about this row; the message is the whole reason."""


async def awaited(value: Any) -> Any:
    return await value


@cache
def loop() -> asyncio.AbstractEventLoop:
    """One for the life of the process: a client that an async function keeps is bound to its loop."""
    return asyncio.new_event_loop()


def load(path: str | Path, name: str, params: Mapping[str, Any] | None = None) -> Reward:
    """Run the file and take the function out of it. Whatever the file raises comes through."""
    module = loaded(Path(path))
    call = getattr(module, name)
    parameters = list(inspect.signature(call).parameters.values())
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    prepare(call, module)
    return Reward(
        call,
        dict(params or {}),
        module,
        tuple(one.name for one in named),
        frozenset(one.name for one in named if one.default is one.empty),
        any(one.kind is one.VAR_KEYWORD for one in parameters),
    )


def loaded(path: Path) -> ModuleType:
    """The file as a module of its own. Its folder goes *last* on the path: reward/math.py must not become `import math`."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"selfkd_file_{path.stem}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    # Not through importlib: its cache cannot tell apart two versions of one length written within one second.
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module


def prepare(call: Callable[..., Any], module: ModuleType) -> None:
    """Make the imports that stand inside the function now, so that its first sample does not pay for them.

    Importing sympy takes a second on an idle machine; on a busy one the first sample of each worker would be late.
    """
    seen: set[CodeType] = set()
    waiting = [code for code in [getattr(inspect.unwrap(call), "__code__", None)] if code]
    while waiting:
        code = waiting.pop()
        seen.add(code)
        around = [getattr(vars(module).get(name), "__code__", None) for name in code.co_names]
        waiting += [other for other in (*code.co_consts, *around) if isinstance(other, CodeType) and other not in seen]
        for name in imported(code):
            try:
                importlib.import_module(name)
            except Exception:  # the function meets this error itself, and its samples carry the reason
                continue


def imported(code: CodeType) -> Iterator[str]:
    return (step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME" and step.argval)


class Surroundings:
    """Working directory, environment and random numbers, put back before each call: results must not depend on order.

    An audit hook notices changes, so an innocent function pays nothing; seeding costs 4 microseconds.
    """

    def __init__(self) -> None:
        self.watching = self.changed = False

    def watch(self) -> None:
        self.folder, self.variables, self.watching = os.getcwd(), dict(os.environ), True
        sys.addaudithook(self.notice)

    def notice(self, event: str, _: Any) -> None:
        if event in ("os.chdir", "os.putenv", "os.unsetenv"):
            self.changed = True

    def restore(self) -> None:
        if not self.watching:
            return
        if self.changed:
            os.chdir(self.folder)
            os.environ.clear()
            os.environ.update(self.variables)
            self.changed = False
        random.seed(0)
        if numpy := sys.modules.get("numpy.random"):
            numpy.seed(0)


surroundings = Surroundings()


# -------------------------------------------------------------------------------------------------------------- reading


def valued(returned: Any) -> Result:
    """What one sample's function returned, as (value, why)."""
    why = ""
    if isinstance(returned, tuple):
        if len(returned) != 2:
            return None, f"returned a tuple of {len(returned)}, expected (value, why)"
        returned, why = returned[0], plain(returned[1])[:WHY_CHARS]
    if returned is None:
        return None, f"{ABSTAINED}: {why}" if why else ABSTAINED
    if type(returned) not in (float, int, bool):
        returned = scalar(returned)
    if not isinstance(returned, numbers.Real):
        return None, f"returned {type(returned).__name__} {plain(returned)[:60]!r}, expected a number"
    try:
        value = float(returned)
    except OverflowError:
        return None, "returned a number that is too large"
    return (value, why) if math.isfinite(value) else (None, f"returned {value}")


def scalar(value: Any) -> Any:
    """The Python number inside a numpy or torch scalar; anything else as it is."""
    try:
        return value.item() if callable(getattr(value, "item", None)) else value
    except (ValueError, TypeError, RuntimeError):
        return value


def each(returned: Any, count: int) -> list[Result]:
    """What a group's function returned, one result per sample; anything but a list of that length is nobody's value."""
    values = returned.tolist() if callable(getattr(returned, "tolist", None)) else returned
    if not isinstance(values, list | tuple):
        return [(None, f"returned {type(returned).__name__}, expected a list of {count}")] * count
    if len(values) != count:
        return [(None, f"returned {len(values)} values for {count} completions")] * count
    return [valued(value) for value in values]


def failed(value: float | None, why: str) -> bool:
    """True where the function failed, False where it gave a value or abstained by returning None."""
    return value is None and not why.startswith(ABSTAINED)


def brief(error: BaseException) -> str:
    """`ValueError: first line`, short enough for a table."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, Unscored):
        return text
    return plain(f"{type(error).__name__}: {text}".removesuffix(": "))[:WHY_CHARS]


def plain(value: Any) -> str:
    return ADDRESS.sub("0x...", str(value))


# ---------------------------------------------------------------------------------------------------- the worker itself


def serve(lifeline: int, shared: int, memory: int) -> None:
    """The life of a worker: load one function, then answer until the pipe closes."""
    commands, replies = os.dup(0), os.dup(1)  # what the function prints goes nowhere; it cannot reach these two
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    die_with_parent(lifeline)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    counter = memoryview(mmap.mmap(shared, mmap.PAGESIZE)).cast("Q")
    stream = os.fdopen(commands, "rb")
    try:
        reward = load(**read(stream))
        write(replies, (reward.wants(), reward.grouped))
    except BaseException as error:  # SystemExit too: whatever it was, the parent must hear it
        write(replies, brief(error))
        return
    surroundings.watch()
    while (message := read(stream)) is not None:
        if isinstance(message, str):
            write(replies, getattr(reward, message)())
        else:
            for part in parts(reward.results(message, counter)):
                write(replies, part)
        counter[0] = 0


def parts(results: Iterator[tuple[int, float | None, str]]) -> Iterator[list[tuple[int, float | None, str]]]:
    """Results in lists that are handed over while the next ones are being made."""
    part, since = [], time.monotonic()
    for result in results:
        part.append(result)
        if time.monotonic() - since > PART_SECONDS:
            yield part
            part, since = [], time.monotonic()
    if part:
        yield part


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


def read(stream: Any) -> Any:
    """The next message, None where the parent closed the pipe."""
    head = stream.read(LENGTH.size)
    return pickle.loads(stream.read(LENGTH.unpack(head)[0])) if len(head) == LENGTH.size else None


def write(handle: int, message: Any) -> None:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    view = memoryview(LENGTH.pack(len(data)) + data)
    while view:
        view = view[os.write(handle, view) :]
