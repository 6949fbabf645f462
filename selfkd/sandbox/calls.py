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
from typing import Any

from selfkd.sandbox import values
from selfkd.sandbox.jail import Jail
from selfkd.sandbox.reasons import one_line, reason
from selfkd.sandbox.runner import Runner
from selfkd.sandbox.warden_pool import borrowed

HEAD_BYTES = 4  # before each frame: its length
LAST_SECONDS = 1.0  # for a process that has closed its channel to end
CALLS_CPU_SECONDS = 600.0  # for a process that answers many calls, each of which has its own deadline
MARSHAL_VERSION = 2  # every Python since 2.5 reads it, and what is sent comes from the tests, not from the program
STOPPED = "stopped"  # the limit named where we end a process that has hit none


@dataclass(frozen=True)
class Returned:
    """What a call gave: `ok` and its value, or not ok and the reason. A value of a foreign type equals nothing."""

    ok: bool
    value: Any
    reason: str


class Calls:
    """A program whose functions can be called; use it as a context manager. `broken` says why no call can succeed."""

    def __init__(self, runner: Runner, program: str | bytes) -> None:
        self.runner = runner
        self.program = program.encode("utf-8", "surrogatepass") if isinstance(program, str) else program
        self.tier = runner.site.tier
        self.broken = ""
        self.starts = 0
        self._session: Session | None = None

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def call(self, name: str, *arguments: Any, **keywords: Any) -> Returned:
        """Call `name` (or `Class.method` of a new instance) with plain data; never raises for what the program does."""
        if self._session is None and not self.broken:
            self._start()
        if self._session is None or self.broken:
            return Returned(False, None, self.broken)
        session = self._session
        session.number += 1
        return self._ask(session, marshal.dumps((session.number, name, arguments, keywords), MARSHAL_VERSION))

    def end(self) -> None:
        """End the process, if there is one; the next call starts a fresh one."""
        session, self._session = self._session, None
        if session:
            session.end(STOPPED)

    def _start(self) -> None:
        """Start a process and load the program there, as the first frame."""
        self.starts += 1
        self._session = Session(self.runner)
        loaded = self._ask(self._session, self.program)
        self.broken = "" if loaded.ok else loaded.reason

    def _ask(self, session: Session, body: bytes) -> Returned:
        """Send one frame and read one report. Anything else ends the process."""
        try:
            report = session.exchange(body)
            if report is not None:
                return Returned(True, values.read(report, session.number), "")
            self._session = None
            return Returned(False, None, session.end(None))
        except values.Failed as failed:
            return Returned(False, None, one_line(str(failed)))
        except values.Malformed as malformed:
            self.end()
            return Returned(False, None, f"malformed report: {malformed}")
        except BaseException:
            self._session = None
            session.abandon()
            raise


class Session:
    """One process with the program in it and the channel to it, from start to end. `number` is that of the last call."""

    def __init__(self, runner: Runner) -> None:
        self.limits = runner.limits
        self.number = 0
        self.buffer = bytearray()  # what has arrived of a report
        self.deadline = 0.0  # of the last exchange
        with ExitStack() as parts:
            warden = parts.enter_context(borrowed(runner.site))
            nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            parts.callback(os.close, nothing)
            self.channel, theirs = socket.socketpair()
            parts.callback(self.channel.close)
            self.channel.setblocking(False)
            with theirs:
                self.jail = Jail(warden, runner.job("calls", CALLS_CPU_SECONDS), self.limits, nothing, theirs.fileno())
            parts.callback(self.jail.close)
            self.jail.poll.register(self.channel, select.POLLIN)
            self.parts = parts.pop_all()

    def exchange(self, body: bytes) -> bytes | None:
        """Send a frame and return the report; None where the program ended, or was ended, before the report was whole."""
        unsent = memoryview(len(body).to_bytes(HEAD_BYTES, "big") + body)
        self.jail.deadline = self.deadline = time.monotonic() + self.limits.seconds
        self._receive()
        if self.buffer:
            raise values.Malformed("a report that nobody asked for")
        while self.jail.reply is None and self.jail.limit is None:
            self.jail.poll.modify(self.channel, select.POLLIN | (select.POLLOUT if unsent else 0))
            if self.channel.fileno() not in self.jail.step():
                continue
            try:
                unsent = unsent[self.channel.send(unsent, socket.MSG_NOSIGNAL) :] if unsent else unsent
            except BlockingIOError:
                pass
            except OSError:
                return None  # it closed its end
            is_open = self._receive()
            if report := self._whole_report():
                return report
            if not is_open:
                return None
        return None

    def _receive(self) -> bool:
        """Take what has arrived into the buffer. Whether more may come: False once the program has closed its end."""
        try:
            while data := self.channel.recv(1 << 16):
                self.buffer += data
                if len(self.buffer) > self.limits.output:
                    return True
            return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _whole_report(self) -> bytes | None:
        """Return the report if all of it has arrived; one that is larger than the limit ends the program."""
        if len(self.buffer) < HEAD_BYTES:
            return None
        end = HEAD_BYTES + int.from_bytes(self.buffer[:HEAD_BYTES], "big")
        if end > self.limits.output:
            self.jail.kill("output")
            return None
        if len(self.buffer) < end:
            return None
        if len(self.buffer) > end:
            raise values.Malformed("more than one report")
        report, self.buffer = bytes(self.buffer[HEAD_BYTES:end]), bytearray()
        return report

    def end(self, limit: str | None) -> str:
        """Take the process down and return why it ended.

        Without a limit it is expected to end by itself, since it has closed its channel.
        """
        with self.parts:
            self.jail.poll.unregister(self.channel)
            if limit:
                self.jail.kill(limit)
            elif self.jail.limit is None:
                self.jail.deadline = min(self.deadline, time.monotonic() + LAST_SECONDS)
            ended = self.jail.wait()
        if ended.limit == "time" and time.monotonic() < self.deadline:
            return "closed its channel and went on"
        return reason(ended, self.limits, ended.stderr.decode("utf-8", "replace")) or "ended before it answered"

    def abandon(self) -> None:
        """Give everything up, the warden too: after a failure of our own nothing is known about the process."""
        with suppress(BaseException):  # the stack raises the error that it is shown; the caller raises it itself
            self.parts.__exit__(*sys.exc_info())
