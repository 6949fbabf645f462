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
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from selfkd.errors import SandboxError, UsageError
from selfkd.sandbox import sites, tiers
from selfkd.sandbox.calls import Calls
from selfkd.sandbox.limits import Limits
from selfkd.sandbox.runner import Done, Runner

ACCEPTED = "I accept"


@dataclass(frozen=True)
class Sandbox:
    """How programs are run. Without `argv` they are Python, by this interpreter, and warm: forked from a clean one.

    `argv`: another interpreter, such as ("/usr/bin/node", "{program}.js"); the program is written to that file in its working
    directory. `python`: another Python, by path; `warm=False`: a fresh interpreter for each program. `see`: more paths to show,
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
        """Run a whole program. Raise SandboxError where this host has no walls for it, or the sandbox itself failed."""
        return self.runner().run(program, stdin)

    async def arun(self, program: str | bytes, stdin: str | bytes = "") -> Done:
        """`run` without holding up the event loop."""
        return await asyncio.to_thread(self.run, program, stdin)

    def calls(self, program: str | bytes) -> Calls:
        """Return the functions of a Python program, to be called one after another in one process (a context manager).

        Raise SandboxError where this host has no walls for it.
        """
        if self.argv is not None:
            raise UsageError("functions can only be called in Python programs", "Sandbox.calls", "Leave argv out.")
        return Calls(self.runner(), program)

    # ------------------------------------------------------------------------------------------------------------ parts

    def site(self) -> sites.Site:
        """Return where programs of this sandbox run. Raise SandboxError where the network would stay open."""
        host = tiers.host()
        tier = host.tier if self.tier is None else min(host.tier, self.tier)
        if tier < 1 and self.unsafe != ACCEPTED:
            raise SandboxError(host.refusal if host.tier < 1 else f"tier 0 has no walls; unsafe is not {ACCEPTED!r}")
        needed = sites.python_view(self.python) if self.argv is None else sites.interpreter_view(self.argv[0])
        own = sites.python_view(None) if host.bubble else ()
        return sites.site(tier, (*needed, *own, *self._seen()), host.bubble if tier == 2 else "")

    def runner(self) -> Runner:
        """Return what runs the programs of this sandbox, at its site."""
        return Runner(self.site(), self.limits, self.argv, self._fresh_python(), self._seen(), self.env)

    def _fresh_python(self) -> str | None:
        """Return the Python to be started for each program; None where each is forked from the warden, which is this one.

        Bubblewrap can only start programs.
        """
        if self.argv is not None or (self.warm and self.python in (None, sys.executable) and not tiers.host().bubble):
            return None
        return os.path.realpath(self.python or sys.executable)

    def _seen(self) -> tuple[str, ...]:
        return tuple(os.path.abspath(path) for path in self.see)
