"""The sandbox as its users meet it: run a program, call its functions, read how it ended. The verdict is the caller's.

    from selfkd.sandbox import Limits, Sandbox

    box = Sandbox(Limits(seconds=2))
    done = box.run("print(input()[::-1])", stdin="abc")
    print(done.stdout, done.reason, done.tier)
    with box.calls("def double(x): return 2 * x") as program:
        print(program.call("double", 21))

Nothing that is compared with an answer is decided inside: a program only ever makes data. Callable from any thread, and from
an event loop by `await box.arun(...)`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfkd.errors import SandboxError, UsageError
from selfkd.sandbox import sites
from selfkd.sandbox.jail import ENVIRONMENT, MB, PYTHON, Ended, Jail, Limits, line, warden
from selfkd.sandbox.walls import WORK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selfkd.sandbox.calls import Calls

ACCEPTED = "I accept"


@dataclass(frozen=True)
class Done:
    """How a program ended. `ok`: by itself, with exit status 0, within all limits; that alone says nothing about its answer.

    `reason` is one line where it is not ok. `status` is the exit status, negative for a signal. `limit` names the limit that
    ended it (time, cpu, memory, processes, output, file_size, disk). `memory` is its peak in bytes. `tier` is that of the walls.
    """

    ok: bool
    reason: str
    stdout: str
    stderr: str
    status: int
    limit: str | None
    seconds: float
    cpu: float
    memory: int
    tier: int


@dataclass(frozen=True)
class Sandbox:
    """How programs are run. Without `argv` they are Python, by this interpreter, warm: forked from a clean, started one.

    `argv`: another interpreter, such as ("/usr/bin/node", "{program}.js"); the program is written to that file in its working
    directory. `python`: another Python, by path; `warm=False`: a fresh interpreter for each program. `see`: more paths to be seen
    read-only; for Python, folders are put on the import path. `env`: variables beside the few that are set. `tier`: use at most
    these walls; below tier 1 nothing is run unless `unsafe` is "I accept".
    """

    limits: Limits = field(default_factory=Limits)
    argv: tuple[str, ...] | None = None
    python: str | None = None
    warm: bool = True
    see: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    tier: int | None = None
    unsafe: str | None = None

    def run(self, program: str | bytes, stdin: str | bytes = "") -> Done:
        """Run a whole program. SandboxError where this host has no walls for it, or the sandbox itself failed."""
        site = self.site()
        with warden(site) as one, _file(stdin) as given, _file(program) as text:
            jail = Jail(one, self.job("script"), self.limits, given, text)
            try:
                return self.done(jail.wait(), site.tier, one.work)
            finally:
                jail.close()

    async def arun(self, program: str | bytes, stdin: str | bytes = "") -> Done:
        """`run` without holding up the event loop."""
        return await asyncio.to_thread(self.run, program, stdin)

    def calls(self, program: str | bytes) -> Calls:
        """The functions of a Python program, to be called one after another in one process (a context manager)."""
        from selfkd.sandbox.calls import Calls

        if self.argv is not None:
            raise UsageError("functions can only be called in Python programs", "Sandbox.calls", "Leave argv out.")
        return Calls(self, program)

    # ------------------------------------------------------------------------------------------------------------ parts

    @property
    def forked(self) -> bool:
        """Whether programs are forked from the warden itself, which is this very interpreter; bubblewrap can only start them."""
        from selfkd.sandbox import tiers

        return self.argv is None and self.warm and self.python in (None, sys.executable) and not tiers.host().bubble

    def site(self) -> sites.Site:
        """Where programs of this sandbox run; refuses where the network would stay open."""
        from selfkd.sandbox import tiers

        host = tiers.host()
        tier = host.tier if self.tier is None else min(host.tier, self.tier)
        if tier < 1 and self.unsafe != ACCEPTED:
            raise SandboxError(host.refusal if host.tier < 1 else f"tier 0 has no walls; unsafe is not {ACCEPTED!r}")
        view = sites.python_view(self.python) if self.argv is None else sites.view_of(self.argv[0])
        own = sites.python_view(None) if host.bubble else ()
        shown = (*view, *own, *self._seen())
        return sites.site(tier, shown, host.bubble if tier == 2 else "")

    def job(self, kind: str) -> dict[str, Any]:
        env = {**ENVIRONMENT, **self.env}
        if self.forked:
            return {"argv": None, "kind": kind, "extra": self._seen(), "env": env}
        argv = list(self.argv or self._interpreter(kind))
        return {"argv": argv, "kind": kind, "extra": [], "env": env}

    def _seen(self) -> list[str]:
        return [os.path.abspath(path) for path in self.see]

    def _interpreter(self, kind: str) -> list[str]:
        text = Path(__file__).with_name("inside.py").read_text("utf-8")
        start = f"{text}\n\nmain({kind!r}, {self._seen()!r})\n"
        return [os.path.realpath(self.python or sys.executable), *PYTHON, "-c", start]

    def done(self, ended: Ended, tier: int, work: str) -> Done:
        out, err = (stream.decode("utf-8", "replace") for stream in (ended.stdout, ended.stderr))
        err = err.replace(work, WORK) if work else err  # a name that differs each time must not stand in a reason
        reason = why(ended, self.limits, err)
        return Done(
            not reason, reason, out, err, ended.status, ended.limit, ended.seconds, ended.cpu, ended.memory, tier
        )  # fmt: skip


def why(ended: Ended, limits: Limits, stderr: str = "") -> str:
    """One line that says why a program did not end well, the same each time it ends so; '' where it did."""
    if ended.limit:
        return told(ended.limit, limits)
    if ended.status < 0:
        return f"ended by {_signal(-ended.status)}"
    last = next((text for text in reversed(stderr.splitlines()) if text.strip()), "")
    return "" if ended.status == 0 else f"exit status {ended.status}{': ' + line(last) if last else ''}"


def told(limit: str, limits: Limits) -> str:
    """A limit with its size."""
    sizes = {
        "time": f"{limits.seconds:g} s",
        "cpu": f"{limits.cpu or limits.seconds:g} s of processor time",
        "memory": f"{limits.memory / MB:g} MB",
        "processes": f"{limits.processes} processes and threads",
        "output": f"{limits.output / MB:g} MB of output",
        "file_size": f"{limits.file_size / MB:g} MB in one file",
        "disk": f"{limits.disk / MB:g} MB of files",
    }
    return f"{limit.replace('_', ' ')} limit ({sizes[limit]})" if limit in sizes else limit


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _file(content: str | bytes) -> Iterator[int]:
    """A descriptor to read `content` from: a file in memory, so that nobody has to feed a pipe."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    writing = os.memfd_create("selfkd", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(writing, view) :]
        reading = os.open(f"/proc/self/fd/{writing}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writing)
    try:
        yield reading
    finally:
        os.close(reading)
