"""The lease of a run: one driver at a time, recognised by process and heartbeat.

It only saves work that two drivers would do twice; being correct rests on put-if-absent commits, never on a lease.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import TypedDict

from selfkd.core.storage import put_json
from selfkd.errors import BusyError, Stopped

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 60.0  # longer than the directory caches of NFS (30 to 60 s by default)

_held: set[Path] = set()  # leases of this very process: one it began to take and never held is nobody's


class Process(TypedDict):
    """Which process holds a lease: `boot` and `started` tell it from one with the same pid after a restart."""

    host: str
    boot: str
    pid: int
    started: str


class Lease:
    """Keeps a second driver away from a run: numbered files put if absent, and a heartbeat beside the newest.

    A holder is dead when its process is gone (same host) or when its heartbeat did not move for `PATIENCE_SECONDS` on the
    contender's own clock (another host; clocks are never compared). Losing it costs work, never correctness.
    """

    def __init__(self, folder: Path, tmp: Path) -> None:
        self.folder, self.tmp = folder, tmp
        self._stop = threading.Event()

    def __enter__(self) -> Lease:
        while True:
            newest = self._newest()
            if newest and self._alive(newest):
                holder = self._holder(newest)
                raise BusyError(
                    f"another driver holds this run (process {holder['pid']} on {holder['host']})",
                    str(self.folder.parent),
                    "Wait for it, stop it, or give this run another name: --name X",
                )
            if self._take(newest + 1):
                self.epoch = newest + 1
                _held.add(self._path(self.epoch, ".json"))
                self._beat = threading.Thread(target=self._beating, daemon=True)
                self._beat.start()
                return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        try:
            self._beat.join()
        finally:  # a second Ctrl-C in a notebook must not leave this very process holding it
            _held.discard(self._path(self.epoch, ".json"))
            self._path(self.epoch, ".done").touch()

    def confirm(self) -> None:
        """Raise Stopped where another process took the lease over because this one seemed dead to it (a stalled disk or host)."""
        if self._newest() > self.epoch:
            raise Stopped("another driver took this run over while this one did not answer", str(self.folder.parent))

    def _newest(self) -> int:
        return max((int(path.stem) for path in self.folder.glob("*.json")), default=0)

    def _take(self, epoch: int) -> bool:
        try:
            return put_json(self._path(epoch, ".json"), this_process(), self.tmp)
        except FileNotFoundError:  # another process holds it since a moment ago, and has emptied tmp/: look again
            return False

    def _path(self, epoch: int, suffix: str) -> Path:
        return self.folder / f"{epoch:06d}{suffix}"

    def _beating(self) -> None:
        count = 0
        while not self._stop.wait(BEAT_SECONDS if count else 0):
            count += 1
            self._path(self.epoch, ".beat").write_text(str(count))

    def _holder(self, epoch: int) -> Process:
        holder: Process = json.loads(self._path(epoch, ".json").read_text())
        return holder

    def _alive(self, epoch: int) -> bool:
        """Whether the holder of lease number `epoch` still drives; waits for its heartbeat where it is on another host."""
        if self._path(epoch, ".done").exists():
            return False
        holder, me = self._holder(epoch), this_process()
        if (holder["host"], holder["boot"]) != (me["host"], me["boot"]):
            return self._beats(epoch)
        if holder["pid"] == me["pid"] and self._path(epoch, ".json") not in _held:
            return False
        return started_at(holder["pid"]) == holder["started"]

    def _beats(self, epoch: int) -> bool:
        before = self._count(epoch)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 5)
            if self._count(epoch) != before:
                return True
        return False

    def _count(self, epoch: int) -> str:
        beat = self._path(epoch, ".beat")
        return beat.read_text() if beat.exists() else ""


def this_process() -> Process:
    """Return what tells this process from every other one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else "",
        "pid": os.getpid(),
        "started": started_at(os.getpid()),
    }


def started_at(pid: int) -> str:
    """Return the start time of a process in clock ticks, or '' if it is gone: a reused pid has another one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie holds nothing
    except FileNotFoundError:
        return str(pid) if not Path("/proc").is_dir() and _exists(pid) else ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def holder(folder: Path) -> str:
    """Return who holds the newest lease in `folder`, such as 'process 123 on host, heartbeat 3 s ago'; empty where nobody does.

    On this machine the process itself is looked for; a lease of another machine counts while its heartbeat is fresh by the
    folder's own clock. Never waits, so on another machine it may be late by `PATIENCE_SECONDS`.
    """
    newest = max(folder.glob("*.json"), key=lambda path: int(path.stem), default=None)
    if newest is None or newest.with_suffix(".done").exists():
        return ""
    found = json.loads(newest.read_text("utf-8"))
    beat = newest.with_suffix(".beat")
    age = max(0.0, time.time() - (beat if beat.exists() else newest).stat().st_mtime)
    here = found["host"] == socket.gethostname()
    alive = started_at(found["pid"]) == found["started"] if here else age < PATIENCE_SECONDS
    alive = alive and not (here and found["pid"] == os.getpid() and newest not in _held)
    return f"process {found['pid']} on {found['host']}, heartbeat {age:.0f} s ago" if alive else ""
