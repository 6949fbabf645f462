"""A cgroup (version 2) for the programs of one warden, where the host has delegated one.

In it the kernel itself counts memory, processes and processor time.
Documentation/admin-guide/cgroup-v2.rst. A group is made beside or below our own, where the memory and pids controllers are
handed down and we may make folders: under a systemd user session, in a delegated unit, or as root. Elsewhere `find` gives
None, and the warden counts by looking.
"""

from __future__ import annotations

import contextlib
import os
import time

ROOT = "/sys/fs/cgroup"
PREFIX = "selfkd-"
NEEDED_CONTROLLERS = {"memory", "pids"}
REMOVE_SECONDS = 1.0  # for the last process in it to go


class Cgroup:
    """One folder of the cgroup file system; its programs are put in, watched and killed together."""

    def __init__(self, path: str) -> None:
        self.path, self.lost = path, False
        self.entrance = os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        self.events_before, self.cpu_before = self._events(), self._cpu()

    def limit(self, memory: int, processes: int) -> None:
        """Set the limits of the next program. Memory is that of the whole tree, files in the working directory included."""
        for name, value in (("memory.max", memory), ("memory.oom.group", 1), ("pids.max", processes)):
            _write(f"{self.path}/{name}", value)
        with contextlib.suppress(OSError):  # a kernel without swap accounting
            _write(f"{self.path}/memory.swap.max", 0)
        self.events_before, self.cpu_before = self._events(), self._cpu()

    def enter(self) -> None:
        """Put the process that calls this into the group."""
        os.write(self.entrance, b"0")

    def cpu(self) -> float:
        """Return the seconds of processor time since `limit`, of those that have gone too."""
        return self._cpu() - self.cpu_before

    def limit_hit(self) -> str | None:
        """Return the limit that has been hit since `limit`, if one was.

        `lost` is set where somebody took the controllers away, so that nothing is known.
        """
        try:
            memory, processes = (now - before for now, before in zip(self._events(), self.events_before))
        except OSError:
            self.lost = True
            return None
        return "memory" if memory else "processes" if processes else None

    def _events(self) -> tuple[int, int]:
        return _event(f"{self.path}/memory.events", "oom_kill"), _event(f"{self.path}/pids.events", "max")

    def _cpu(self) -> float:
        with contextlib.suppress(OSError):
            return _event(f"{self.path}/cpu.stat", "usage_usec") / 1e6
        return 0.0

    def kill(self) -> None:
        """Kill everything in it, at once (Linux 5.14)."""
        with contextlib.suppress(OSError):
            _write(f"{self.path}/cgroup.kill", 1)

    def remove(self) -> None:
        """Remove the group, in which nothing is left; the last process may take a moment to go."""
        os.close(self.entrance)
        until = time.monotonic() + REMOVE_SECONDS
        while time.monotonic() < until and os.path.isdir(self.path):
            with contextlib.suppress(OSError):
                os.rmdir(self.path)
                return
            time.sleep(0.01)


def find(root: str = ROOT, own: str | None = None) -> Cgroup | None:
    """Make a new group of our own; None where the host has not delegated one."""
    here = _own_place() if own is None else own
    if here is None:
        return None
    folder = os.path.normpath(f"{root}/{here}")
    for parent in dict.fromkeys((folder, os.path.dirname(folder) if folder != root else root)):
        with contextlib.suppress(OSError):
            if _hands_down(parent):
                _remove_leftovers(parent)
                path = f"{parent}/{_prefix()}{os.getpid()}-{os.urandom(4).hex()}"
                os.mkdir(path)
                return _open(path)
    return None


def _hands_down(parent: str) -> bool:
    """Whether groups in `parent` get our controllers; where they are only offered, they are switched on."""
    given, offered = (set(_read(f"{parent}/cgroup.{name}").split()) for name in ("subtree_control", "controllers"))
    if not given >= NEEDED_CONTROLLERS and offered >= NEEDED_CONTROLLERS:
        _write(f"{parent}/cgroup.subtree_control", "+memory +pids")  # refused where processes are in `parent` itself
        return True
    return given >= NEEDED_CONTROLLERS


def _open(path: str) -> Cgroup | None:
    """Return the group if it can be used: limits set, and a process put in, which the folder's owner alone does not decide."""
    try:
        group = Cgroup(path)
    except OSError:
        os.rmdir(path)
        return None
    trying = os.fork()
    if trying == 0:
        try:
            group.limit(1 << 30, 64)
            group.enter()
            os._exit(0)
        except OSError:
            os._exit(1)
    if os.waitpid(trying, 0)[1] == 0:
        return group
    group.remove()
    return None


def _prefix() -> str:
    """Return how the names of our groups begin: with the PID namespace, since numbers of another one mean nothing here."""
    return f"{PREFIX}{os.readlink('/proc/self/ns/pid')[5:-1]}-"


def _remove_leftovers(parent: str) -> None:
    """Remove groups of wardens that were killed before they could do it, with what is left in them."""
    prefix = _prefix()
    for name in os.listdir(parent):
        if name.startswith(prefix) and not os.path.exists(f"/proc/{name.removeprefix(prefix).split('-')[0]}"):
            with contextlib.suppress(OSError):
                _write(f"{parent}/{name}/cgroup.kill", 1)
            with contextlib.suppress(OSError):
                os.rmdir(f"{parent}/{name}")


def _own_place() -> str | None:
    """Return our place in the hierarchy, None where version 2 is not in use."""
    with contextlib.suppress(OSError):
        for line in _read("/proc/self/cgroup").splitlines():
            if line.startswith("0::"):
                return line[3:]
    return None


def _event(path: str, name: str) -> int:
    found = dict(line.split() for line in _read(path).splitlines())
    return int(found.get(name, 0))


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, value: int | str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)  # the kernel makes these files, never we
    try:
        os.write(handle, str(value).encode())
    finally:
        os.close(handle)
