"""Running one program behind walls, seen from outside: its deadline, what it writes, and how it ended.

The owner's side of `selfkd.sandbox.warden`. Everything a program produces is read here as bytes with a cap. Callable from any
thread or worker process: each program borrows a warden of its own, and nothing relies on signals of this process.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from selfkd.errors import SandboxError, UsageError
from selfkd.sandbox import sites, watch
from selfkd.sandbox.walls import WORK, Site

KEPT = 8  # idle wardens kept for the next program
END_SECONDS = 30.0  # for a warden to take a killed program down, on a busy machine
START = "import sys; sys.path.append(sys.argv[3]); from selfkd.sandbox.warden import run; run()"
PYTHON = ("-S", "-s", "-B")
MB = 1 << 20
MOST, LONGEST = 1 << 50, 1e6
REASON_CHARS = 300
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": WORK,
    "TMPDIR": WORK,
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",  # the same program prints its sets in the same order
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Limits:
    """What a program may use, its processes together. Sizes in bytes, times in seconds.

    `seconds` of wall time; `cpu` of processor time (None: as many as `seconds`); `memory` that is resident; `address_space` of
    each process (None: no such limit; what a Python program gets as a MemoryError); `processes` and threads; open `files`;
    `file_size` of one file; `disk` of the working directory; `output` on both streams, or of one returned value.
    """

    seconds: float = 10.0
    cpu: float | None = None
    memory: int = 512 * MB
    address_space: int | None = 1024 * MB
    processes: int = 32
    files: int = 64
    file_size: int = 16 * MB
    disk: int = 64 * MB
    output: int = MB

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in asdict(self).items() if value is not None}
        most = {"seconds": LONGEST, "cpu": LONGEST}
        if bad := [name for name, value in numbers.items() if not 0 < value < most.get(name, MOST)]:
            raise UsageError(f"a limit is a positive number, not {numbers[bad[0]]}", f"Limits.{bad[0]}")

    def job(self, cpu: float | None = None) -> dict[str, Any]:
        return {**asdict(self), "cpu": cpu or self.cpu or self.seconds}


@dataclass(frozen=True)
class Ended:
    """How a program ended. `status` is its exit status, negative for a signal; `limit` names the limit that ended it."""

    status: int
    limit: str | None
    stdout: bytes
    stderr: bytes
    seconds: float
    cpu: float
    memory: int


def line(text: str) -> str:
    """Text of a program as one short line that is safe to print and to encode."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:REASON_CHARS]).strip()


class Warden:
    """One warden process and the socket to it."""

    def __init__(self, site: Site) -> None:
        self.site, self.work = site, ""
        if site.tier < 2:
            sites.clear_left()
            self.work = sites.folder()
        self.socket, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with end:  # not below 3, where the new process's own streams go
            theirs = socket.socket(fileno=fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3))
        root = str(Path(__file__).resolve().parent.parent.parent)
        settings = json.dumps({"site": asdict(replace(site, work=self.work))})
        self.process = subprocess.Popen(
            [os.path.realpath(sys.executable), *PYTHON, "-c", START, str(theirs.fileno()), settings, root],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("SELFKD_DEBUG") == "1" else subprocess.DEVNULL,
            env=ENVIRONMENT,
            pass_fds=[theirs.fileno()],
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the owner, who then takes the warden down
        )
        theirs.close()
        _all.add(self)

    def send(self, message: bytes, handles: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self.socket, [message], list(handles))
        except OSError:
            raise self.lost() from None

    def receive(self) -> dict[str, Any]:
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            raise self.lost()
        found: dict[str, Any] = json.loads(data)
        return found

    def lost(self) -> SandboxError:
        self.close()
        return SandboxError(
            f"the sandbox's own process ended (status {self.process.returncode})", "", "SELFKD_DEBUG=1 shows why."
        )

    def close(self) -> None:
        """Idle or not: the warden takes its program down and ends."""
        self.socket.close()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            for one in watch.tree(self.process.pid):  # stuck: what is below it goes too
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
            self.process.wait()
        if self.work:
            shutil.rmtree(self.work, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------- wardens

_idle: list[Warden] = []
_all: weakref.WeakSet[Warden] = weakref.WeakSet()
_lock = threading.Lock()


def _after_fork() -> None:
    """A fork of this process must neither use its parent's wardens nor keep them alive."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()
    for one in list(_all):
        one.socket.close()


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def warden(site: Site) -> Iterator[Warden]:
    """A warden of this site, for the caller alone. It is kept for the next one unless something went wrong."""
    with _lock:
        found = next((one for one in _idle if one.site == site), None)
        if found:
            _idle.remove(found)
    if found and found.process.poll() is not None:  # somebody killed it meanwhile
        found.close()
        found = None
    one = found or Warden(site)
    try:
        yield one
    except BaseException:
        one.close()
        raise
    with _lock:
        _idle.append(one)
        surplus = [_idle.pop(0) for _ in range(len(_idle) - KEPT)]
    for old in surplus:
        old.close()


@atexit.register
def close_idle() -> None:
    """End the wardens kept for a next program."""
    with _lock:
        mine = list(_idle)
        _idle.clear()
    for one in mine:
        one.socket.close()  # all of them first, so that they end side by side
    for one in mine:
        one.close()


# ----------------------------------------------------------------------------------------------------------------- a jail


class Jail:
    """One program in a warden's hands, from its start to its end; the clock of `seconds` may be set anew while it runs."""

    def __init__(
        self, warden: Warden, job: dict[str, Any], limits: Limits, stdin: int, channel: int, cpu: float | None = None
    ) -> None:
        """`stdin` and `channel` are descriptors for the program; they stay the caller's to close."""
        self.warden, self.limits = warden, limits
        self.streams: dict[int, bytearray] = {}
        self.limit: str | None = None
        self.reply: dict[str, Any] | None = None
        self.poll = select.poll()
        self.poll.register(warden.socket, select.POLLIN)
        theirs: list[int] = []
        try:
            for _ in ("stdout", "stderr"):
                ours, end = os.pipe()
                theirs.append(end)
                self.streams[ours] = bytearray()
                self.poll.register(ours, select.POLLIN)
                os.set_blocking(ours, False)
            self.began = time.monotonic()
            self.deadline = self.began + limits.seconds
            warden.send(json.dumps({**job, "limits": limits.job(cpu)}).encode(), [stdin, *theirs, channel])
        except BaseException:
            self.close()
            raise
        finally:
            for end in theirs:
                os.close(end)

    def step(self) -> set[int]:
        """Wait for anything to happen, read what was written, and keep the limits; the descriptors that are ready."""
        patience = self.deadline - time.monotonic()
        if patience <= 0 and self.limit is not None:
            raise self.warden.lost()
        if patience <= 0:
            self.kill("time")
            patience = END_SECONDS
        ready = {handle for handle, _ in self.poll.poll(max(0.0, 1000 * patience) + 1)}
        for handle in ready & self.streams.keys():
            self._read(handle)
        if self.warden.socket.fileno() in ready:
            self.reply = self.warden.receive()
        return ready

    def _read(self, handle: int) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(handle, 1 << 16)
            self.streams[handle] += data
            if not data:
                self.poll.unregister(handle)
        if sum(map(len, self.streams.values())) > self.limits.output:
            for stream in self.streams.values():
                del stream[self.limits.output :]
            self.kill("output")

    def kill(self, limit: str) -> None:
        """End it; the first limit named is the one that ended it."""
        if self.limit is None:
            self.limit = limit
            self.warden.send(b"K")
            self.deadline = time.monotonic() + END_SECONDS

    def wait(self) -> Ended:
        """Until nothing of it is left. What it wrote before its end is read to the last byte, up to the cap."""
        while self.reply is None:
            self.step()
        for handle, stream in self.streams.items():
            # All that was written is in the pipe by now. Its end may never come: a descriptor can be on its way in a socket.
            with contextlib.suppress(BlockingIOError):
                while len(stream) <= self.limits.output and (data := os.read(handle, 1 << 16)):
                    stream += data
        return self._ended(self.reply)

    def _ended(self, reply: dict[str, Any]) -> Ended:
        if "failed" in reply:
            raise SandboxError(
                f"the walls could not be built: {reply['failed']}", "", "selfkd doctor says what this host allows."
            )
        status = os.waitstatus_to_exitcode(reply["status"])
        out, err = (bytes(stream) for stream in self.streams.values())
        if self.warden.site.bubble and 128 < status < 128 + signal.SIGSYS:
            status = 128 - status  # bubblewrap says so where the program was ended by a signal
        limit = self.limit or reply["limit"] or {-signal.SIGXCPU: "cpu", -signal.SIGXFSZ: "file_size"}.get(status)
        if limit is None and len(out) + len(err) > self.limits.output:
            limit = "output"
        return Ended(status, limit, out, err, time.monotonic() - self.began, reply["cpu"], reply["memory"])

    def close(self) -> None:
        for handle in self.streams:
            os.close(handle)
