"""The owner's side of wardens: each is a process that is started once, lent to one program at a time, and kept for the next.

Knows nothing of programs and limits. Callable from any thread or worker process; nothing relies on signals of this process.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from selfkd.errors import SandboxError
from selfkd.sandbox import sites, watch
from selfkd.sandbox.walls import PYTHON_FLAGS, WORK_FOLDER, Site
from selfkd.sandbox.warden import Reply

MAX_IDLE_WARDENS = 8
END_SECONDS = 30.0  # for a warden to take a killed program down, on a busy machine
WARDEN_CODE = "import sys; sys.path.append(sys.argv[3]); from selfkd.sandbox.warden import run; run()"
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": WORK_FOLDER,
    "TMPDIR": WORK_FOLDER,
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",  # the same program prints its sets in the same order
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class WardenProcess:
    """One warden process and the socket to it."""

    def __init__(self, site: Site) -> None:
        self.site, self.work = site, ""
        if site.tier < 2:
            sites.remove_leftovers()
            self.work = sites.new_work_folder()
        self.socket, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with end:  # not below 3, where the new process's own streams go
            theirs = socket.socket(fileno=fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3))
        with theirs:
            self.process = self._start(theirs.fileno())
        _all.add(self)

    def _start(self, control: int) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parent.parent.parent)
        settings = json.dumps({"site": asdict(replace(self.site, work=self.work))})
        return subprocess.Popen(
            [os.path.realpath(sys.executable), *PYTHON_FLAGS, "-c", WARDEN_CODE, str(control), settings, root],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("SELFKD_DEBUG") == "1" else subprocess.DEVNULL,
            env=ENVIRONMENT,
            pass_fds=[control],
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the owner, who then takes the warden down
        )

    def send(self, message: bytes, handles: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(self.socket, [message], list(handles))
        except OSError:
            raise self.lost() from None

    def receive(self) -> Reply:
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            raise self.lost()
        reply: Reply = json.loads(data)
        return reply

    def lost(self) -> SandboxError:
        """Take down what is left of a warden that has ended or does not answer, and return the error to raise."""
        self.close()
        return SandboxError(
            f"the sandbox's own process ended (status {self.process.returncode})", "", "SELFKD_DEBUG=1 shows why."
        )

    def close(self) -> None:
        """Close the socket, idle or not: the warden then takes its program down and ends."""
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


# ------------------------------------------------------------------------------------------------------------- the pool

_idle: list[WardenProcess] = []
_all: weakref.WeakSet[WardenProcess] = weakref.WeakSet()
_lock = threading.Lock()


def _after_fork() -> None:
    """Forget the wardens of the parent: its fork must neither use them nor keep them alive."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()
    for one in list(_all):
        one.socket.close()


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def borrowed(site: Site) -> Iterator[WardenProcess]:
    """Lend a warden of this site to the caller alone. It is kept for the next one unless the caller's block raised."""
    warden = _idle_at(site) or WardenProcess(site)
    try:
        yield warden
    except BaseException:
        warden.close()
        raise
    with _lock:
        _idle.append(warden)
        surplus = [_idle.pop(0) for _ in range(len(_idle) - MAX_IDLE_WARDENS)]
    for old in surplus:
        old.close()


def _idle_at(site: Site) -> WardenProcess | None:
    """Take an idle warden of this site out of the pool; None where there is none that lives."""
    with _lock:
        found = next((one for one in _idle if one.site == site), None)
        if found:
            _idle.remove(found)
    if found and found.process.poll() is not None:  # somebody killed it meanwhile
        found.close()
        return None
    return found


@atexit.register
def close_idle() -> None:
    """End the wardens that are kept for a next program."""
    with _lock:
        mine = list(_idle)
        _idle.clear()
    for one in mine:
        one.socket.close()  # all of them first, so that they end side by side
    for one in mine:
        one.close()
