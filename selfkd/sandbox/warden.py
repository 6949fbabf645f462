"""The process that puts up the walls, watches from outside and takes everything down again: one program at a time.

Its owner (`selfkd.sandbox.jail`) sends a job and four descriptors (input, output, errors, channel); the warden forks, hands
them to the program and answers once nothing of the program is left. Programs, inputs and outputs never pass through here, so a
program that is forked from this process finds no trace of another one's in its memory. Single-threaded, and started with a
clean environment: it is the zygote of warm programs.

It dies with its owner: the control socket then reads empty, and every program dies with the warden (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import asdict, replace
from typing import Any, NoReturn

from selfkd.sandbox import bubble, cgroup, walls, watch
from selfkd.sandbox import kernel as k

KILL, READY = b"K", "ready"
TICKS_MS = (2, 4, 8, 10)  # between looks at a running program: often at first, when a bomb would go off
FIRST_FREE = 6  # below: input, output, errors, channel, what went wrong, the gate
OWN_UIDS = 0x70000000  # as root, programs run as a user of their own in a range that no system assigns
ENTRY, MOST_FILES = 4096, 4096  # what a file costs however small, and how many there may be below tier 2
OF_BUBBLE = 2  # processes of bubblewrap itself in the tree
Job = dict[str, Any]


class Warden:
    """The warden's own state: where programs run, who asks, and the cgroup that counts for it, if the host has one."""

    def __init__(self, control: int, given: str) -> None:
        site = read_site(json.loads(given)["site"])
        k.prctl("SUBREAPER", k.SUBREAPER, 1)
        self.owner = socket.socket(fileno=control)
        self.group = cgroup.find()
        counted = site.counted or self.group is not None
        self.site = replace(site, counted=counted, uid=None if site.uid is None else OWN_UIDS | os.getpid())

    def serve(self) -> tuple[str, list[str]] | None:
        """Until the owner leaves: None. In a forked child that is to become a warm program: (kind, import paths)."""
        while True:
            message, handles = receive(self.owner)
            if not message:
                self.leave()
            if message == KILL:
                continue  # meant for a program that had ended by itself meanwhile
            job = json.loads(message)
            try:
                program = self.start(job, handles)
            except OSError as error:
                reply: Job = {"failed": wrong(error)}
            else:
                if program is None:
                    return job["kind"], job["extra"]
                reply = program if isinstance(program, dict) else self.guarded(program, job)
            if self.site.work:
                empty(self.site.work)
            self.owner.send(json.dumps(reply).encode())

    def start(self, job: Job, handles: list[int]) -> int | Job | None:
        """Fork a program behind its walls: its process number, or {"failed": why}. None in the child that is a warm program."""
        if self.group:
            self.group.limit(job["limits"]["memory"], job["limits"]["processes"] + walls.SLACK)
        said, saying = os.pipe()
        gate, opening = os.pipe()
        moved = [*handles, saying, gate]
        first = os.fork()
        if first == 0:
            self.become(job, moved)
            return None
        try:
            for handle in moved:
                os.close(handle)
            if self.site.tier == 2 and not self.site.bubble:
                os.waitpid(first, 0)  # it only made the namespaces; its child, process 1 in there, has fallen to us
            with contextlib.suppress(BrokenPipeError):  # it has ended, and said why
                os.write(opening, b"!")
            lines = read_all(said).splitlines()
        finally:
            os.close(opening)
            os.close(said)
        failed = [line for line in lines if line != READY and not line.isdigit()]
        if self.site.bubble and READY not in lines:
            failed.append("bubblewrap: it ended before the program began")
        if failed:
            sweep()
            return {"failed": failed[0]}
        return int(lines[0]) if lines and lines[0] != READY else first

    def become(self, job: Job, handles: list[int]) -> None:
        """The child's way to the program. Returns only in a warm program, with the walls up; what fails is said and ends it."""
        site = self.site
        try:
            if self.group:
                self.group.enter()
            _raise_oom_score()
            _place(handles)
            os.setsid()
            if site.bubble:
                bubble.enter(site, json.dumps({"site": asdict(site), "job": job}), job["limits"]["disk"])
            if site.tier == 2:
                walls.enter(site, job["limits"]["disk"])
                if process := os.fork():
                    os.write(4, f"{process}\n".encode())
                    os._exit(0)
            else:
                os.chdir(site.work)
            _wait_for_parent()
            settle(site, job)
            _start(site, job)
        except Exception as error:  # whatever it is, the program must not run behind half of its walls
            fail(error)

    def guarded(self, process: int, job: Job) -> Job:
        """`guard`; if that fails, nothing of the program goes on unwatched."""
        try:
            return self.guard(process, job)
        except BaseException:
            os.kill(process, signal.SIGKILL)
            sweep()
            raise

    def guard(self, process: int, job: Job) -> Job:
        """Wait for the end, or bring it about; {"status": wait status, "limit": name or null, "cpu": s, "memory": peak bytes}."""
        ending = os.pidfd_open(process)
        poll = select.poll()
        poll.register(ending, select.POLLIN)
        poll.register(self.owner, select.POLLIN)
        self.process = process
        watcher = watch.Watcher(process)
        limit, peak, look = None, 0, 0
        while ending not in (ready := [handle for handle, _ in poll.poll(TICKS_MS[min(look, len(TICKS_MS) - 1)])]):
            look += 1
            if limit is None:
                used = watcher.look(job["limits"]["memory"])
                peak, limit = max(peak, used.memory), self.over(used, job["limits"])
            if ready and self.owner.recv(16) == b"":
                self.leave()
            if ready or limit:
                self.kill(process)
        os.close(ending)
        _, status, spent = os.wait4(process, 0)
        if self.group:
            self.group.kill()
        sweep()
        limit = limit or (self.group.passed() if self.group else None)
        peak = max(peak, spent.ru_maxrss * 1024)
        return {"status": status, "limit": limit, "cpu": spent.ru_utime + spent.ru_stime, "memory": peak}

    def over(self, used: watch.Use, limits: Job) -> str | None:
        """Which limit the tree as a whole has passed."""
        if used.memory > limits["memory"]:
            return "memory"
        if used.cpu > limits["cpu"]:
            return "cpu"
        if used.tasks > limits["processes"] + (OF_BUBBLE if self.site.bubble else 0):
            return "processes"
        return "disk" if self.site.work and size(self.site.work, self.process) > limits["disk"] else None

    def kill(self, process: int) -> None:
        if self.group:
            self.group.kill()
        os.kill(process, signal.SIGKILL)

    def leave(self) -> NoReturn:
        """The owner has gone: nothing of ours may stay."""
        if self.group:
            self.group.kill()
        sweep()
        if self.group:
            self.group.remove()
        if self.site.work:
            empty(self.site.work)
            os.rmdir(self.site.work)
        os._exit(0)


def receive(owner: socket.socket) -> tuple[bytes, list[int]]:
    handles = array.array("i")
    message, extra, _, _ = owner.recvmsg(1 << 17, socket.CMSG_LEN(4 * handles.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            handles.frombytes(data[: len(data) - len(data) % handles.itemsize])
    return message, list(handles)


# -------------------------------------------------------------------------------------------------------------- starting


def settle(site: walls.Site, job: Job) -> None:
    """Below the limits, then behind the locks: the last things that a trusted line of code does here."""
    walls.limit(job["limits"], site.counted and site.tier == 2)
    walls.lock(site)


def staged(given: str) -> None:
    """Entry point inside bubblewrap's namespaces, before the program: limits, Landlock and seccomp, which it does not set."""
    try:
        settings = json.loads(given)
        site, job = read_site(settings["site"]), settings["job"]
        os.chdir(site.home)
        for handle in (4, 5):
            os.set_inheritable(handle, False)
        settle(site, job)
        os.read(5, 1)
        os.write(4, f"{READY}\n".encode())
        _start(site, job)
    except Exception as error:
        fail(error)


def read_site(given: Job) -> walls.Site:
    return walls.Site(**{**given, "view": tuple(given["view"])})


def fail(error: Exception) -> NoReturn:
    os.write(4, f"{wrong(error)}\n".encode())
    os._exit(125)


def wrong(error: Exception) -> str:
    """One line: the call, and what the kernel said to it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'fork'}: {error.strerror}"
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def _raise_oom_score() -> None:
    """If the machine runs out of memory, the kernel shall take the program first."""
    handle = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    os.write(handle, b"1000")
    os.close(handle)


def _place(handles: list[int]) -> None:
    """The program's four descriptors to 0..3, ours to 4 and 5, everything else closed."""
    above = max(FIRST_FREE, *handles) + 1
    high = [fcntl.fcntl(handle, fcntl.F_DUPFD, above) for handle in handles]
    for number, handle in enumerate(high):
        os.dup2(handle, number, inheritable=number < 4)
    k.close_from(FIRST_FREE)


def _wait_for_parent() -> None:
    """PR_SET_PDEATHSIG counts from the parent of the moment, so it must be the warden; a closed gate says that it is gone."""
    gone = select.poll()
    gone.register(4, 0)  # an error on what it listens to, once nobody listens
    opened = os.read(5, 1)
    k.prctl("PDEATHSIG", k.PDEATHSIG, signal.SIGKILL)
    if not opened or gone.poll(0):
        os._exit(125)


def _start(site: walls.Site, job: Job) -> None:
    variables = {name: value.replace(walls.WORK, site.home) for name, value in job["env"].items()}
    if job["argv"] is None:
        os.close(4)
        os.close(5)
        os.environ.clear()
        os.environ.update(variables)
        return
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and an exec would hand that on
        signal.signal(ignored, signal.SIG_DFL)
    argv = [word.replace("{program}", f"{site.home}/program") for word in job["argv"]]
    for word, template in zip(argv, job["argv"]):
        if "{program}" in template:
            _write(word)
    try:
        os.execve(argv[0], argv, variables)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"exec {argv[0]}") from None


def _write(path: str) -> None:
    """The program's text from descriptor 3 to a file in the working directory."""
    with open(3, "rb") as text, open(path, "wb") as file:
        while part := text.read(1 << 16):
            file.write(part)


# ------------------------------------------------------------------------------------------------------------ taking down


def sweep() -> None:
    """Kill and reap everything below us. Behind a PID namespace nothing is left by now; below tier 2 a daemon may be."""
    while True:
        for process in watch.tree(os.getpid())[1:]:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                continue  # it has ended
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.0005)


def size(folder: str, process: int) -> int:
    """Bytes that the program's files take up, those it has opened and unlinked too. Very many files are as bad as large ones."""
    files: dict[int, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # gone meanwhile
                found = entry.stat(follow_symlinks=False)
                files[found.st_ino] = max(found.st_blocks * 512, found.st_size) + ENTRY
            if len(files) > MOST_FILES:
                return sys.maxsize
    device = os.stat(folder).st_dev
    with contextlib.suppress(OSError):
        for handle in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                found = os.stat(f"/proc/{process}/fd/{handle}")
                if found.st_dev == device and found.st_nlink == 0:
                    files[found.st_ino] = max(found.st_blocks * 512, found.st_size)
    return sum(files.values())


def empty(folder: str) -> None:
    """What a program left in the host's working folder. At tier 1 it can only be files; at tier 0 it can be anything."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            os.spawnv(os.P_WAIT, "/bin/rm", ["rm", "-rf", "--", entry.path])
        else:
            os.unlink(entry.path)


def read_all(handle: int) -> str:
    parts = []
    while part := os.read(handle, 4096):
        parts.append(part)
    return b"".join(parts).decode(errors="replace")


def run() -> None:
    """Entry point (`jail.START`): control descriptor, settings and the package's folder are the arguments."""
    import _sitebuiltins  # noqa: F401  before the first fork: warm programs find it loaded

    from selfkd.sandbox import inside

    sys.path.remove(sys.argv[3])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whatever our owner had set
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    gc.freeze()  # what is here already is nothing for a program's collector to walk or to copy
    if program := Warden(int(sys.argv[1]), sys.argv[2]).serve():
        inside.main(*program)
