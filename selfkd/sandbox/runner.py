"""Running programs at a given site. What this host allows is not asked here: `box` and `tiers` choose the site.

It is one step of the way down: `box` (a user's wishes) and `tiers` (attacks) > `runner` and `calls` > `jail` > `warden_pool`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from selfkd.sandbox.jail import Ended, Jail
from selfkd.sandbox.limits import Limits
from selfkd.sandbox.reasons import reason
from selfkd.sandbox.walls import PYTHON_FLAGS, WORK_FOLDER, Site
from selfkd.sandbox.warden import Job
from selfkd.sandbox.warden_pool import ENVIRONMENT, borrowed


@dataclass(frozen=True)
class Done:
    """How a program ended. `ok`: by itself, with exit status 0, within all limits; that alone says nothing about its answer.

    `reason` is one line where it is not ok. `status` is the exit status, negative for a signal. `limit` names the limit that
    ended it (time, cpu, memory, processes, output, file_size, disk). `memory` is its peak in bytes. `tier` is the walls' tier.
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
class Runner:
    """How programs are run at `site`. Without `argv` and `python` they are Python, forked from the warden itself.

    `argv`: an interpreter and its arguments, with "{program}" where the program's file belongs. `python`: the path of a Python
    that is started for each program. `import_path`: folders that Python programs can import from. `env`: variables beside the
    few that are set.
    """

    site: Site
    limits: Limits
    argv: tuple[str, ...] | None = None
    python: str | None = None
    import_path: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def run(self, program: str | bytes, stdin: str | bytes = "") -> Done:
        """Run a whole program. Raise SandboxError where its walls could not be built, or the sandbox itself failed."""
        with (
            borrowed(self.site) as warden,
            _file_in_memory(stdin) as given,
            _file_in_memory(program) as text,
            closing(Jail(warden, self.job("script"), self.limits, given, text)) as jail,
        ):
            return self._done(jail.wait(), warden.work)

    def job(self, kind: str, cpu: float | None = None) -> Job:
        """Return what the warden is asked for: `kind` is that of `inside.main`, `cpu` holds where the limits name none."""
        return {
            "argv": self._command(kind),
            "kind": kind,
            "import_path": list(self.import_path),
            "env": {**ENVIRONMENT, **self.env},
            "limits": self.limits.for_kernel(cpu),
        }

    def _command(self, kind: str) -> list[str] | None:
        """Return the command that starts a fresh interpreter; None where the program is forked from the warden."""
        if self.argv is not None:
            return list(self.argv)
        if self.python is None:
            return None
        text = Path(__file__).with_name("inside.py").read_text("utf-8")
        start = f"{text}\n\nmain({kind!r}, {list(self.import_path)!r})\n"
        return [self.python, *PYTHON_FLAGS, "-c", start]

    def _done(self, ended: Ended, work: str) -> Done:
        out, err = (stream.decode("utf-8", "replace") for stream in (ended.stdout, ended.stderr))
        if work:
            err = err.replace(work, WORK_FOLDER)  # a name that differs each time must not be part of a reason
        why = reason(ended, self.limits, err)
        return Done(
            ok=not why,
            reason=why,
            stdout=out,
            stderr=err,
            status=ended.status,
            limit=ended.limit,
            seconds=ended.seconds,
            cpu=ended.cpu,
            memory=ended.memory,
            tier=self.site.tier,
        )


@contextmanager
def _file_in_memory(content: str | bytes) -> Iterator[int]:
    """Give a descriptor to read `content` from: a file in memory, so that nobody has to feed a pipe."""
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
