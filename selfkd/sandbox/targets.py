"""Things of ours for the attacks to aim at: files, sockets, a message queue, memory, a variable. Harmless if they are hit.

Each watches what happens to it, so that an attack that got through is seen from outside, whatever the program says.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

VICTIMS = ("truncated", "removed", "renamed", "changed")  # one file for each attack that would take it from the next
PROBE_VARIABLE = "SELFKD_PROBE"
IPC_PRIVATE, IPC_RMID, IPC_NOWAIT = 0, 0, 0o4000
NEW_QUEUE = 0o1600  # IPC_CREAT, for this user only
Aims = dict[str, str | int]  # what an attack is given, by name


@contextmanager
def targets() -> Iterator[tuple[Aims, Callable[[], str]]]:
    """Give the names of all targets, and a function that returns what has happened to them since it was last called."""
    marker = secrets.token_hex(16)
    memory = ctypes.create_string_buffer(b"in the owner's memory")
    with ExitStack() as stack:
        folder, shown = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"selfkd-{name}-"))) for name in ("targets", "shown")
        )
        sockets = stack.enter_context(contextlib.closing(Sockets(folder, marker)))
        files = Files(folder, shown, marker)
        aims: Aims = {
            **files.names(),
            **sockets.names(),
            "owner": os.getpid(),
            "address": ctypes.addressof(memory),
            "marker": marker,
            "root": os.geteuid() == 0,
            "queue": stack.enter_context(message_queue()),
        }
        stack.enter_context(variable(PROBE_VARIABLE, marker))

        def evidence() -> str:
            arrival, change = sockets.arrival(), files.change()  # both are asked, so that nothing is left for the next attack
            return arrival or change

        yield aims, evidence


class Files:
    """Files to read, change and remove: those in `folder` are hidden from a program, the one in `shown` may be read."""

    def __init__(self, folder: Path, shown: Path, marker: str) -> None:
        self.folder, self.shown = folder, shown
        shown.chmod(0o755)
        _write(shown / "kept", marker[::-1], 0o644)
        for name in ("secret", *VICTIMS):
            _write(folder / name, marker, 0o600)
        self.state = self._state()

    def names(self) -> Aims:
        paths = {name: f"{self.folder}/{name}" for name in ("secret", *VICTIMS)}
        return {"folder": str(self.folder), "shown": str(self.shown), **paths}

    def change(self) -> str:
        """Return whether anything has changed since the last call, in words."""
        before, self.state = self.state, self._state()
        return "" if before == self.state else "files outside changed"

    def _state(self) -> list[tuple[str, int, int, bytes]]:
        """Return names, modes, times and contents."""
        return [
            (path.name, path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for folder in (self.folder, self.shown)
            for path in sorted(folder.iterdir())
        ]


def _write(path: Path, text: str, mode: int) -> None:
    path.write_text(text)
    path.chmod(mode)


class Sockets:
    """Sockets that listen: on the loopback device, in the file system, and by an abstract name."""

    def __init__(self, folder: Path, marker: str) -> None:
        self.abstract = f"selfkd-{marker[:8]}"
        self.unix, self.datagram = f"{folder}/unix", f"{folder}/datagram"
        self.all: list[socket.socket] = []
        try:
            self.tcp = self._listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)).getsockname()[1]
            self.udp = self._listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)).getsockname()[1]
            self._listen(socket.AF_UNIX, socket.SOCK_STREAM, self.unix)
            self._listen(socket.AF_UNIX, socket.SOCK_DGRAM, self.datagram)
            self._listen(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{self.abstract}")
        except BaseException:
            self.close()
            raise

    def _listen(self, family: int, kind: int, address: str | tuple[str, int]) -> socket.socket:
        one = socket.socket(family, kind)
        self.all.append(one)
        one.bind(address)
        one.setblocking(False)
        if kind == socket.SOCK_STREAM:
            one.listen()
        return one

    def names(self) -> Aims:
        return {
            "tcp": self.tcp,
            "udp": self.udp,
            "unix": self.unix,
            "datagram": self.datagram,
            "abstract": self.abstract,
        }

    def arrival(self) -> str:
        """Return whether anything has arrived, in words; all of it is taken."""
        found = ""
        for one in self.all:
            with contextlib.suppress(BlockingIOError):
                while True:
                    if one.type == socket.SOCK_STREAM:
                        one.accept()[0].close()
                    else:
                        one.recv(64)
                    found = "a socket outside was reached"
        return found

    def close(self) -> None:
        for one in self.all:
            one.close()


@contextmanager
def message_queue() -> Iterator[int]:
    """Give the number of a System V queue that holds one message."""
    libc = ctypes.CDLL(None)
    queue: int = libc.msgget(IPC_PRIVATE, NEW_QUEUE)
    libc.msgsnd(queue, b"\1" + bytes(15), ctypes.c_size_t(8), IPC_NOWAIT)
    try:
        yield queue
    finally:
        libc.msgctl(queue, IPC_RMID, None)


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set a variable of this process's environment."""
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
