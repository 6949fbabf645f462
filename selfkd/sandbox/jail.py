"""Running one program behind walls, seen from outside: its deadline, what it writes, and how it ended.

Everything a program produces is read here as bytes with a cap. Knows nothing of what is compared with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from dataclasses import dataclass

from selfkd.errors import SandboxError
from selfkd.sandbox.limits import Limits
from selfkd.sandbox.warden import KILL, Job, Reply
from selfkd.sandbox.warden_pool import END_SECONDS, WardenProcess

READ_BYTES = 1 << 16  # as much as a pipe holds
LIMIT_OF_SIGNAL: dict[int, str] = {
    signal.SIGXCPU: "cpu",
    signal.SIGXFSZ: "file_size",
}  # what the kernel sends at a limit per process


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


class Jail:
    """One program in a warden's hands, from its start to its end; the clock of `seconds` may be set anew while it runs."""

    def __init__(self, warden: WardenProcess, job: Job, limits: Limits, stdin: int, channel: int) -> None:
        """Start the program. `stdin` and `channel` are descriptors for it; they stay the caller's to close."""
        self.warden, self.limits = warden, limits
        self.streams: dict[int, bytearray] = {}
        self.limit: str | None = None
        self.reply: Reply | None = None
        self.poll = select.poll()
        self.poll.register(warden.socket, select.POLLIN)
        self.began = time.monotonic()
        self.deadline = self.began + limits.seconds
        theirs: list[int] = []
        try:
            for _ in ("stdout", "stderr"):
                ours, end = os.pipe()
                theirs.append(end)
                self.streams[ours] = bytearray()
                self.poll.register(ours, select.POLLIN)
                os.set_blocking(ours, False)
            warden.send(json.dumps(job).encode(), [stdin, *theirs, channel])
        except BaseException:
            self.close()
            raise
        finally:
            for end in theirs:
                os.close(end)

    def step(self) -> set[int]:
        """Wait for anything to happen, read what was written, and keep the limits; return the descriptors that are ready."""
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
            data = os.read(handle, READ_BYTES)
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
            self.warden.send(KILL)
            self.deadline = time.monotonic() + END_SECONDS

    def wait(self) -> Ended:
        """Wait until nothing of it is left. What it wrote before its end is read to the last byte, up to the cap."""
        while self.reply is None:
            self.step()
        for handle, stream in self.streams.items():
            # All that was written is in the pipe by now. Its end may never come: a descriptor can be on its way in a socket.
            with contextlib.suppress(BlockingIOError):
                while len(stream) <= self.limits.output and (data := os.read(handle, READ_BYTES)):
                    stream += data
        return self._ended(self.reply)

    def _ended(self, reply: Reply) -> Ended:
        if "failed" in reply:
            raise SandboxError(
                f"the walls could not be built: {reply['failed']}", "", "selfkd doctor says what this host allows."
            )
        status = os.waitstatus_to_exitcode(reply["status"])
        out, err = (bytes(stream) for stream in self.streams.values())
        if self.warden.site.bubble and 128 < status < 128 + signal.SIGSYS:
            status = 128 - status  # bubblewrap says so where the program was ended by a signal
        limit = self.limit or reply["limit"] or LIMIT_OF_SIGNAL.get(-status)
        if limit is None and len(out) + len(err) > self.limits.output:
            limit = "output"
        return Ended(status, limit, out, err, time.monotonic() - self.began, reply["cpu"], reply["memory"])

    def close(self) -> None:
        for handle in self.streams:
            os.close(handle)
