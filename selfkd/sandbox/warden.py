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
SAYING, GATE, TELLING = 4, 5, 6  # above the program's four descriptors: what went wrong, leave to begin, how it ended
OWN_UIDS = 0x70000000  # as root, programs run as a user of their own in a range that no system assigns
ENTRY, MOST_FILES = 4096, 1024  # what a file costs however small, and how many there may be below tier 2
OF_BUBBLE = 2  # processes of bubblewrap itself in the tree
Job = dict[str, Any]


class Warden:
    """The warden's own state: where programs run, who asks, and the cgroup that counts for it, if the host has one."""

    def __init__(self, control: int, given: str) -> None:
        site = read_site(json.loads(given)["site"])
        k.prctl("SUBREAPER", k.SUBREAPER, 1)
        self.owner = socket.socket(fileno=control)
        self.group = cgroup.find()
        self.asked = replace(site, uid=None if site.uid is None else OWN_UIDS | os.getpid())
        # At tier 2 a cgroup can count processes where the user limit cannot.
        self.site = replace(self.asked, counted=site.counted or (self.group is not None and site.tier == 2))

    @property
    def exact(self) -> bool:
        """Whether the kernel itself holds the memory limit of the tree; our own sum may count shared pages twice."""
        return self.group is not None and not self.group.lost

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
            try:
                self.group.limit(job["limits"]["memory"], job["limits"]["processes"] + walls.SLACK // 2)
            except OSError:  # somebody took its controllers, or the group itself: from now on we count by looking
                self.group.remove()
                self.group, self.site = None, self.asked
        said, saying = os.pipe()
        gate, opening = os.pipe()
        self.told, telling = os.pipe()
        moved = [*handles, saying, gate, telling]
        first = os.fork()
        if first == 0:
            self.become(job, moved)
            return None
        try:
            for handle in moved:
                os.close(handle)
            if self.site.kept:
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
        if self.site.kept and not lines:
            failed.append("fork: the namespaces ended before the program began")
        if failed:
            sweep()
            os.close(self.told)
            return {"failed": failed[0]}
        return int(lines[0]) if lines and lines[0] != READY else first

    def become(self, job: Job, handles: list[int]) -> None:
        """The child's way to the program. Returns only in a warm program, with the walls up; what fails is said and ends it."""
        site, saying = self.site, handles[SAYING]
        try:
            if self.group:
                self.group.enter()
            _raise_oom_score()
            _place(handles)
            saying = SAYING
            os.setsid()
            if site.bubble:
                bubble.enter(site, json.dumps({"site": asdict(site), "job": job}), job["limits"]["disk"])
            if site.tier == 2:
                walls.enter(site, job["limits"]["disk"])
                if process := os.fork():
                    os.write(SAYING, f"{process}\n".encode())
                    os._exit(0)
            else:
                os.chdir(site.work)
            _wait_for_parent()
            if site.tier == 2 and (process := os.fork()):
                keep(process)
            settle(site, job)
            _start(site, job)
        except BaseException as error:  # whatever it is, the program must not run behind half of its walls
            fail(error, saying)

    def guarded(self, process: int, job: Job) -> Job:
        """`guard`; if that fails, nothing of the program goes on unwatched."""
        try:
            return self.guard(process, job)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            sweep()
            raise

    def guard(self, process: int, job: Job) -> Job:
        """Wait for the end, or bring it about; {"status": wait status, "limit": name or null, "cpu": s, "memory": peak bytes}."""
        ending = os.pidfd_open(process)
        poll = select.poll()
        poll.register(ending, select.POLLIN)
        poll.register(self.owner, select.POLLIN)
        watcher = watch.Watcher(process, self.site.kept)
        limit: str | None = None
        peak = look = 0
        while ending not in (ready := [handle for handle, _ in poll.poll(TICKS_MS[min(look, len(TICKS_MS) - 1)])]):
            look += 1
            limit = limit or (self.group.passed() if self.group else None)  # the kernel's word first: looking may be slow
            if limit is None:
                used = watcher.look(sys.maxsize if self.exact else job["limits"]["memory"])
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
        told = os.read(self.told, 16)
        os.close(self.told)
        limit = limit or (self.group.passed() if self.group else None)
        cpu = self.spent(max(spent.ru_utime + spent.ru_stime, watcher.cpu))
        limit = limit or ("cpu" if cpu > job["limits"]["cpu"] else None)
        return {"status": int(told or status), "limit": limit, "cpu": cpu, "memory": max(peak, spent.ru_maxrss * 1024)}

    def over(self, used: watch.Use, limits: Job) -> str | None:
        """Which limit the tree as a whole has passed."""
        if used.memory > limits["memory"] and not self.exact:
            return "memory"
        if self.spent(used.cpu) > limits["cpu"]:
            return "cpu"
        if used.tasks > limits["processes"] + (OF_BUBBLE if self.site.bubble else 0):
            return "processes"
        return "disk" if self.site.work and size(self.site.work) > limits["disk"] else None

    def spent(self, seen: float) -> float:
        """Seconds of processor time: what was seen, or what the kernel counted."""
        return max(seen, self.group.cpu()) if self.group else seen

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


def keep(program: int) -> NoReturn:
    """The life of process 1: tied to the warden, it waits for the program, says how it ended, and takes all with it.

    No signal from inside can end it, and it runs nothing but this.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler of Python's would let it through
    for handle in range(TELLING):
        os.close(handle)
    k.drop_capabilities()
    while True:
        process, status = os.wait()  # orphans of the program fall to us
        if process == program:
            os.write(TELLING, b"%d" % status)
            os._exit(0)


def settle(site: walls.Site, job: Job) -> None:
    """Below the limits, then behind the locks: the last things that a trusted line of code does here."""
    walls.limit(job["limits"], site.counted)
    walls.lock(site, job["argv"] is not None)


def staged(given: str) -> None:
    """Entry point inside bubblewrap's namespaces, before the program: limits, Landlock and seccomp, which it does not set."""
    try:
        settings = json.loads(given)
        site, job = read_site(settings["site"]), settings["job"]
        os.chdir(site.home)
        for handle in (SAYING, GATE):
            os.set_inheritable(handle, False)
        settle(site, job)
        os.read(GATE, 1)
        os.write(SAYING, f"{READY}\n".encode())
        _start(site, job)
    except Exception as error:
        fail(error, SAYING)


def read_site(given: Job) -> walls.Site:
    return walls.Site(**{**given, "view": tuple(given["view"])})


def fail(error: BaseException, saying: int) -> NoReturn:
    """Say what went wrong, and end: never go on as a second warden."""
    try:
        os.write(saying, f"{wrong(error)}\n".encode())
    finally:
        os._exit(125)


def wrong(error: BaseException) -> str:
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
    """The program's four descriptors to 0..3, ours above, everything else closed."""
    above = max(TELLING, *handles) + 1
    high = [fcntl.fcntl(handle, fcntl.F_DUPFD, above) for handle in handles]
    for number, handle in enumerate(high):
        os.dup2(handle, number, inheritable=number < 4)
    k.close_from(TELLING + 1)


def _wait_for_parent() -> None:
    """PR_SET_PDEATHSIG counts from the parent of the moment, so it must be the warden; a closed gate says that it is gone."""
    gone = select.poll()
    gone.register(SAYING, 0)  # an error on what it listens to, once nobody listens
    opened = os.read(GATE, 1)
    k.prctl("PDEATHSIG", k.PDEATHSIG, signal.SIGKILL)
    if not opened or gone.poll(0):
        os._exit(125)


def _start(site: walls.Site, job: Job) -> None:
    variables = {name: value.replace(walls.WORK, site.home) for name, value in job["env"].items()}
    if job["argv"] is None:
        k.close_from(SAYING)
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


def size(folder: str) -> int:
    """Bytes that the files of a program take up. Very many are as bad as large ones, and counting them would take our time."""
    total = 0
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number == MOST_FILES:
                return sys.maxsize
            with contextlib.suppress(OSError):  # gone meanwhile, at tier 0
                found = entry.stat(follow_symlinks=False)
                total += max(found.st_blocks * 512, found.st_size) + ENTRY
    return total


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
