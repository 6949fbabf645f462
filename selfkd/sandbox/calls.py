"""Calling the functions of a program one after another, each with its own deadline, and reading plain data back.

The program is loaded once and stays; a call sees what earlier calls left in its globals, as it would in an import. A call that
hangs, crashes or reports anything but one honest value ends the process; the next call starts a fresh one.
"""

from __future__ import annotations

import marshal
import os
import select
import socket
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfkd.sandbox import values
from selfkd.sandbox.jail import Jail, line, warden

if TYPE_CHECKING:
    from selfkd.sandbox.box import Sandbox

HEAD = 4
GOING_SECONDS = 1.0  # for a process that has closed its channel to end
MANY_SECONDS = 600.0  # of processor time for a process that answers many calls, each of which has its own deadline


@dataclass(frozen=True)
class Returned:
    """What a call gave: `ok` and its value, or not ok and the reason. A value of a foreign type equals nothing."""

    ok: bool
    value: Any
    reason: str


class Calls:
    """A program whose functions can be called; use it as a context manager. `broken` says why no call can succeed."""

    def __init__(self, box: Sandbox, program: str | bytes) -> None:
        self.box, self.program = box, program.encode("utf-8", "surrogatepass") if isinstance(program, str) else program
        self.broken, self.tier, self.number = "", 0, 0
        self.jail: Jail | None = None
        self.parts = ExitStack()
        self.starts = 0

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.end("stopped")

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Returned:
        """Call `name` (or `Class.method` of a new instance) with plain data; never raises for what the program does."""
        if self.jail is None and not self.broken:
            self._start()
        if self.broken:
            return Returned(False, None, self.broken)
        self.number += 1
        # Version 2 of marshal: every Python since 2.5 reads it, and what is sent comes from the tests, not from the program.
        return self._ask(marshal.dumps((self.number, name, arguments, keywords), 2))

    def _start(self) -> None:
        self.number, self.buffer = 0, bytearray()
        self.starts += 1
        site = self.box.site()
        self.tier = site.tier
        try:
            one = self.parts.enter_context(warden(site))
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            self.parts.callback(os.close, null)
            self.socket, theirs = socket.socketpair()
            self.parts.callback(self.socket.close)
            self.socket.setblocking(False)
            limits = self.box.limits
            with theirs:
                self.jail = Jail(one, self.box.job("calls"), limits, null, theirs.fileno(), limits.cpu or MANY_SECONDS)
            self.parts.callback(self.jail.close)
            self.jail.poll.register(self.socket, select.POLLIN)
        except BaseException:
            self._drop()
            raise
        loaded = self._ask(self.program)
        self.broken = "" if loaded.ok else loaded.reason

    def _ask(self, body: bytes) -> Returned:
        """One frame there, one report back. Anything else ends the process."""
        assert self.jail
        try:
            report = self._exchange(len(body).to_bytes(HEAD, "big") + body)
            if report is None:
                return Returned(False, None, self.end(None))
            return Returned(True, values.read(report, self.number), "")
        except values.Failed as failed:
            return Returned(False, None, line(str(failed)))
        except values.Malformed as malformed:
            self.end("stopped")
            return Returned(False, None, f"malformed report: {malformed}")
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        """Our own failure: nothing is known about the process, so its warden goes too."""
        self.jail = None
        with suppress(BaseException):  # the stack raises the error that it is shown; the caller raises it itself
            self.parts.__exit__(*sys.exc_info())

    def _exchange(self, frame: bytes) -> bytes | None:
        """The report, None where the program ended or was ended before it was whole."""
        jail, pending = self.jail, memoryview(frame)
        assert jail
        jail.deadline = self.until = time.monotonic() + self.box.limits.seconds
        if self._received():
            raise values.Malformed("a report that nobody asked for")
        while jail.reply is None and jail.limit is None:
            jail.poll.modify(self.socket, select.POLLIN | (select.POLLOUT if pending else 0))
            if self.socket.fileno() not in jail.step():
                continue
            try:
                pending = pending[self.socket.send(pending, socket.MSG_NOSIGNAL) :] if pending else pending
            except BlockingIOError:
                pass
            except OSError:
                return None  # it closed its end
            self._received()
            if report := self._whole(jail):
                return report
            if self._closed:
                return None
        return None

    def _received(self) -> bool:
        """Take what has arrived into the buffer; whether there is anything in it."""
        self._closed = False
        try:
            while data := self.socket.recv(1 << 16):
                self.buffer += data
                if len(self.buffer) > self.box.limits.output:
                    break
            self._closed = not data
        except BlockingIOError:
            pass
        except OSError:
            self._closed = True
        return bool(self.buffer)

    def _whole(self, jail: Jail) -> bytes | None:
        if len(self.buffer) < HEAD:
            return None
        end = HEAD + int.from_bytes(self.buffer[:HEAD], "big")
        if end > self.box.limits.output:
            jail.kill("output")
            return None
        if len(self.buffer) < end:
            return None
        if len(self.buffer) > end:
            raise values.Malformed("more than one report")
        report, self.buffer = bytes(self.buffer[HEAD:end]), bytearray()
        return report

    def end(self, limit: str | None) -> str:
        """Take the process down; why it ended. Without a limit it is expected to end by itself: it closed its channel."""
        from selfkd.sandbox.box import why

        if self.jail is None:
            return ""
        jail, self.jail = self.jail, None
        try:
            jail.poll.unregister(self.socket)
            if limit:
                jail.kill(limit)
            elif jail.limit is None:
                jail.deadline = min(self.until, time.monotonic() + GOING_SECONDS)
            ended = jail.wait()
        finally:
            self.parts.close()
        if ended.limit == "time" and time.monotonic() < self.until:
            return "closed its channel and went on"
        return why(ended, self.box.limits, ended.stderr.decode("utf-8", "replace")) or "ended before it answered"
