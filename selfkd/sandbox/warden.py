"""The process that puts up the walls, watches from outside and takes everything down again: one program at a time.

Its owner (`selfkd.sandbox.jail`) sends a job and four descriptors (input, output, errors, channel). The warden forks, hands
them to the program, and answers once nothing of the program is left. Programs, inputs and outputs never pass through here, so
a program that is forked from this process finds no trace of another one's in its memory. The warden is single-threaded and is
started with a clean environment: it is the zygote of warm programs.

It dies with its owner: the control socket then reads empty, and every program dies with the warden (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import _sitebuiltins  # noqa: F401  before the first fork: warm programs find it loaded
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
from typing import Any, NamedTuple, NoReturn, TypedDict

from selfkd.sandbox import bubble, cgroup, inside, walls, watch
from selfkd.sandbox import kernel as k

KILL, READY = b"K", "ready"
LOOKS_MS = (2, 4, 8, 10)  # between looks at a running program: often at first, when a bomb would go off
FAILURE_FD, GATE_FD, STATUS_FD = 4, 5, 6  # above the program's four descriptors: what went wrong, leave to begin, how it ended
OWN_UIDS = 0x70000000  # as root, programs run as a user of their own in a range that no system assigns
BUBBLE_PROCESSES = 2  # those of bubblewrap itself in the tree


class Job(TypedDict):
    """What the owner asks for. Without `argv` the program is forked: `kind` and `import_path` are for `inside.main`."""

    argv: list[str] | None
    kind: str
    import_path: list[str]
    env: dict[str, str]
    limits: walls.KernelLimits


class Reply(TypedDict, total=False):
    """What the owner is answered: only why the walls `failed`, or how the program ended; its wait status, its peak in bytes."""

    failed: str
    status: int
    limit: str | None
    cpu: float
    memory: int


class Started(NamedTuple):
    """A program that runs: the process to wait for, and what process 1 of its namespace writes the program's status to."""

    process: int
    status_pipe: int


class Warden:
    """The warden's own state: where programs run, who asks, and the cgroup that counts for it, if the host has one."""

    def __init__(self, control: int, settings: str) -> None:
        site = read_site(json.loads(settings)["site"])
        k.prctl("SUBREAPER", k.SUBREAPER, 1)
        self.owner = socket.socket(fileno=control)
        self.group = cgroup.find()
        self.uncounted = replace(site, uid=None if site.uid is None else OWN_UIDS | os.getpid())
        # At tier 2 a cgroup can count processes where the user limit cannot.
        self.site = replace(self.uncounted, counted=site.counted or (self.group is not None and site.tier == 2))

    @property
    def kernel_holds_memory(self) -> bool:
        """Whether the kernel itself holds the memory limit of the tree; our own sum may count shared pages twice."""
        return self.group is not None and not self.group.lost

    def serve(self) -> tuple[str, list[str]] | None:
        """Serve until the owner leaves. Return (kind, import path) in a forked child, which is to become a warm program."""
        while True:
            message, handles = receive(self.owner)
            if not message:
                self.leave()
            if message == KILL:
                continue  # meant for a program that had ended by itself meanwhile
            job: Job = json.loads(message)
            reply = self.run_program(job, handles)
            if reply is None:
                return job["kind"], job["import_path"]
            if self.site.work:
                empty(self.site.work)
            self.owner.send(json.dumps(reply).encode())

    def run_program(self, job: Job, handles: list[int]) -> Reply | None:
        """Run one program and return how it ended. None in the child that is to become a warm program."""
        try:
            started = self.start(job, handles)
        except OSError as error:
            return {"failed": error_line(error)}
        return self.guarded(started, job) if isinstance(started, Started) else started

    def start(self, job: Job, handles: list[int]) -> Started | Reply | None:
        """Fork a program behind its walls; {"failed": why} where they cannot be built. None in the child: a warm program."""
        if self.group:
            try:
                self.group.limit(job["limits"]["memory"], job["limits"]["processes"] + walls.EXCESS_PROCESSES // 2)
            except OSError:  # somebody took its controllers, or the group itself: from now on we count by looking
                self.group.remove()
                self.group, self.site = None, self.uncounted
        failures, failures_end = os.pipe()
        gate_end, gate = os.pipe()
        status_pipe, status_end = os.pipe()
        moved = [*handles, failures_end, gate_end, status_end]
        first = os.fork()
        if first == 0:
            self.become(job, moved)
            return None
        try:
            for handle in moved:
                os.close(handle)
            if self.site.own_init:
                os.waitpid(first, 0)  # it only made the namespaces; its child, process 1 in there, has fallen to us
            with contextlib.suppress(BrokenPipeError):  # it has ended, and has written why
                os.write(gate, b"!")
            lines = read_all(failures).splitlines()
        finally:
            os.close(gate)
            os.close(failures)
        if failure := self.failure_in(lines):
            sweep()
            os.close(status_pipe)
            return {"failed": failure}
        return Started(int(lines[0]) if lines and lines[0] != READY else first, status_pipe)

    def failure_in(self, lines: list[str]) -> str:
        """Return what went wrong, by what the child wrote until its program began; '' where nothing did."""
        failures = [line for line in lines if line != READY and not line.isdigit()]
        if failures:
            return failures[0]
        if self.site.bubble and READY not in lines:
            return "bubblewrap: it ended before the program began"
        if self.site.own_init and not lines:
            return "fork: the namespaces ended before the program began"
        return ""

    def become(self, job: Job, handles: list[int]) -> None:
        """Turn the child into the program. Return in a warm one, with the walls up; a failure is reported and ends it."""
        site, failures = self.site, handles[FAILURE_FD]
        try:
            if self.group:
                self.group.enter()
            _raise_oom_score()
            _place(handles)
            failures = FAILURE_FD
            os.setsid()
            if site.bubble:
                bubble.enter(site, json.dumps({"site": asdict(site), "job": job}), job["limits"]["disk"])
            if site.tier == 2:
                walls.enter(site, job["limits"]["disk"])
                if process := os.fork():
                    os.write(FAILURE_FD, f"{process}\n".encode())
                    os._exit(0)
            else:
                os.chdir(site.work)
            _wait_for_parent()
            if site.tier == 2 and (process := os.fork()):
                be_init(process)
            lock_down(site, job)
            _start(site, job)
        except BaseException as error:  # whatever it is, the program must not run behind half of its walls
            fail(error, failures)

    def guarded(self, started: Started, job: Job) -> Reply:
        """Do `guard`; if that fails, nothing of the program goes on unwatched."""
        try:
            return self.guard(started, job)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(started.process, signal.SIGKILL)
            sweep()
            raise

    def guard(self, started: Started, job: Job) -> Reply:
        """Wait for the program's end, or bring it about, and return how it ended."""
        process, limits = started.process, job["limits"]
        ending = os.pidfd_open(process)
        poll = select.poll()
        poll.register(ending, select.POLLIN)
        poll.register(self.owner, select.POLLIN)
        watcher = watch.Watcher(process, self.site.own_init)
        limit: str | None = None
        peak = look = 0
        while ending not in (ready := [handle for handle, _ in poll.poll(LOOKS_MS[min(look, len(LOOKS_MS) - 1)])]):
            look += 1
            limit = limit or self.limit_hit()  # the kernel's word first: looking may be slow
            if limit is None:
                used = watcher.look(sys.maxsize if self.kernel_holds_memory else limits["memory"])
                peak, limit = max(peak, used.memory), self.limit_passed(used, limits)
            if ready and self.owner.recv(16) == b"":
                self.leave()
            if ready or limit:
                self.kill(process)
        os.close(ending)
        _, wait_status, spent = os.wait4(process, 0)
        if self.group:
            self.group.kill()
        sweep()
        status = os.read(started.status_pipe, 16)
        os.close(started.status_pipe)
        limit = limit or self.limit_hit()
        cpu = self.cpu_spent(max(spent.ru_utime + spent.ru_stime, watcher.cpu))
        limit = limit or ("cpu" if cpu > limits["cpu"] else None)
        return {"status": int(status or wait_status), "limit": limit, "cpu": cpu, "memory": max(peak, spent.ru_maxrss * 1024)}

    def limit_hit(self) -> str | None:
        """Return the limit that the kernel says was hit."""
        return self.group.limit_hit() if self.group else None

    def limit_passed(self, used: watch.Usage, limits: walls.KernelLimits) -> str | None:
        """Return the limit that the tree as a whole has passed."""
        if used.memory > limits["memory"] and not self.kernel_holds_memory:
            return "memory"
        if self.cpu_spent(used.cpu) > limits["cpu"]:
            return "cpu"
        if used.tasks > limits["processes"] + (BUBBLE_PROCESSES if self.site.bubble else 0):
            return "processes"
        return "disk" if self.site.work and watch.size_of_files(self.site.work) > limits["disk"] else None

    def cpu_spent(self, seen: float) -> float:
        """Return the seconds of processor time: those that were seen, or those that the kernel counted."""
        return max(seen, self.group.cpu()) if self.group else seen

    def kill(self, process: int) -> None:
        if self.group:
            self.group.kill()
        os.kill(process, signal.SIGKILL)

    def leave(self) -> NoReturn:
        """End: the owner has gone, and nothing of ours may stay."""
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


def be_init(program: int) -> NoReturn:
    """Live as process 1: tied to the warden, wait for the program, write how it ended, and take all with it.

    No signal from inside can end it, and it runs nothing but this.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler of Python's would let it through
    for handle in range(STATUS_FD):
        os.close(handle)
    k.drop_capabilities()
    while True:
        process, status = os.wait()  # orphans of the program fall to us
        if process == program:
            os.write(STATUS_FD, b"%d" % status)
            os._exit(0)


def lock_down(site: walls.Site, job: Job) -> None:
    """Set the limits, then put up the locks: the last things that a trusted line of code does here."""
    walls.limit(job["limits"], site.counted)
    walls.lock(site, job["argv"] is not None)


def staged(settings: str) -> None:
    """Set what bubblewrap does not (limits, Landlock, seccomp): the entry point inside its namespaces, before the program."""
    try:
        given = json.loads(settings)
        site: walls.Site = read_site(given["site"])
        job: Job = given["job"]
        os.chdir(site.home)
        for handle in (FAILURE_FD, GATE_FD):
            os.set_inheritable(handle, False)
        lock_down(site, job)
        os.read(GATE_FD, 1)
        os.write(FAILURE_FD, f"{READY}\n".encode())
        _start(site, job)
    except Exception as error:
        fail(error, FAILURE_FD)


def read_site(given: dict[str, Any]) -> walls.Site:
    return walls.Site(**{**given, "view": tuple(given["view"])})


def fail(error: BaseException, failures: int) -> NoReturn:
    """Write what went wrong, and end: never go on as a second warden."""
    try:
        os.write(failures, f"{error_line(error)}\n".encode())
    finally:
        os._exit(125)


def error_line(error: BaseException) -> str:
    """Return one line: the call, and the kernel's answer."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'fork'}: {error.strerror}"
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def _raise_oom_score() -> None:
    """Let the kernel take the program first if the machine runs out of memory."""
    handle = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    os.write(handle, b"1000")
    os.close(handle)


def _place(handles: list[int]) -> None:
    """Move the program's four descriptors to 0..3 and ours to those above; close everything else."""
    above = max(STATUS_FD, *handles) + 1
    high = [fcntl.fcntl(handle, fcntl.F_DUPFD, above) for handle in handles]
    for number, handle in enumerate(high):
        os.dup2(handle, number, inheritable=number < 4)
    k.close_from(STATUS_FD + 1)


def _wait_for_parent() -> None:
    """Wait until the parent is the warden, then tie our life to it: PR_SET_PDEATHSIG counts from the parent of the moment.

    A gate that is closed instead of opened says that the warden is gone.
    """
    gone = select.poll()
    gone.register(FAILURE_FD, 0)  # an error on what it listens to, once nobody listens
    opened = os.read(GATE_FD, 1)
    k.prctl("PDEATHSIG", k.PDEATHSIG, signal.SIGKILL)
    if not opened or gone.poll(0):
        os._exit(125)


def _start(site: walls.Site, job: Job) -> None:
    """Become the program by exec; return where it is a warm one, with the environment set and our own descriptors closed."""
    variables = {name: value.replace(walls.WORK_FOLDER, site.home) for name, value in job["env"].items()}
    if job["argv"] is None:
        k.close_from(FAILURE_FD)
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
    """Copy the program's text from descriptor 3 to a file in the working directory."""
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


def empty(folder: str) -> None:
    """Remove what a program left in the host's working folder. At tier 1 it can only be files; at tier 0 it can be anything."""
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
    """Serve as a warden (`warden_pool.WARDEN_CODE`). Its arguments: the control descriptor, settings, the package's folder."""
    sys.path.remove(sys.argv[3])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whatever our owner had set
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    gc.freeze()  # what is here already is nothing for a program's collector to walk or to copy
    if program := Warden(int(sys.argv[1]), sys.argv[2]).serve():
        inside.main(*program)
