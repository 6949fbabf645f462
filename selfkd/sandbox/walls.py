"""What a child of the warden does to itself before a program may run in it: namespaces, a root of its own, limits, locks.

Called between fork and exec, in this order: `enter` (namespaces; its own child is then process 1 of a new world), `limit`,
`lock`. Each wall is built or raises OSError with the name of the call: a program never runs behind fewer walls than its
tier says. Knows nothing of pipes, deadlines or verdicts.
"""

from __future__ import annotations

import math
import os
import resource
from dataclasses import dataclass
from typing import TypedDict

from selfkd.sandbox import kernel as k
from selfkd.sandbox import seccomp

WORK_FOLDER = "/box"  # no folder that an interpreter or a checkout is likely to lie in
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")  # not zero: memory mapped from it is not counted
NEW_ROOT = "/tmp"  # any folder that exists everywhere: the new root is mounted over it, in our own mount namespace only
INSIDE_UID = 1000
RLIMIT_SIGPENDING = 11  # which the resource module does not name
EXCESS_PROCESSES = 8  # above the limit, that the kernel still allows: so the watcher sees the excess and can name it
PYTHON_FLAGS = ("-S", "-s", "-B")  # no site packages, and no file is written


class KernelLimits(TypedDict):
    """The part of `Limits` that is kept behind the walls and by the warden. Sizes in bytes, `cpu` in seconds."""

    cpu: float
    memory: int
    address_space: int | None
    processes: int
    files: int
    file_size: int
    disk: int


@dataclass(frozen=True)
class Site:
    """Where programs run. `view` are paths to be seen read-only; `uid` is the user taken on where the warden is root.

    `tier` 2: namespaces, Landlock, seccomp; 1: Landlock and seccomp; 0: resource limits only. `work` is the host's folder
    for the working directory below tier 2. `abi` is the newest Landlock ABI to use. `counted`: the kernel can count the
    program's processes and end them all; where it cannot, there are threads but no further processes. `bubble`: the bwrap that
    makes the namespaces, '' for our own.
    """

    tier: int
    view: tuple[str, ...]
    work: str
    abi: int
    uid: int | None = None
    counted: bool = False
    bubble: str = ""

    @property
    def own_init(self) -> bool:
        """Whether process 1 of the namespace is ours, with the program below it."""
        return self.tier == 2 and not self.bubble

    @property
    def home(self) -> str:
        return WORK_FOLDER if self.tier == 2 else self.work


def enter(site: Site, disk: int) -> None:
    """Into new user, PID, network, IPC, UTS and mount namespaces, with nothing to see but the view and an empty /box.

    As root the world is built first and root is given up afterwards, because the paths of the view may lie in folders that
    only root may walk through. The PID namespace begins with the next fork.
    """
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if site.uid is None:
        user, group = os.getuid(), os.getgid()
        k.unshare(k.NEWUSER | k.NEWNS | k.NEWPID | k.NEWNET | k.NEWIPC | k.NEWUTS)
        _map_user(proc, user, group)
        _build_root(site.view, disk)
    else:
        k.unshare(k.NEWNS)
        _build_root(site.view, disk)
        give_up_root(site.uid)
        k.prctl("DUMPABLE", k.DUMPABLE, 1)  # giving up root made /proc/self root's
        k.unshare(k.NEWUSER | k.NEWNS | k.NEWPID | k.NEWNET | k.NEWIPC | k.NEWUTS)
        _map_user(proc, site.uid, site.uid)
    os.close(proc)
    k.set_hostname("sandbox")


def give_up_root(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _map_user(proc: int, user: int, group: int) -> None:
    """Map one user and one group, which is what an ordinary user may do."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE_UID} {user} 1"), ("gid_map", f"{INSIDE_UID} {group} 1")):
        handle = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(handle, text.encode())
        os.close(handle)


def _build_root(view: tuple[str, ...], disk: int) -> None:
    """Build a root of our own: an empty tmpfs with the view bound into it, read-only, and a writable /box with a cap."""
    k.mount("none", "/", None, k.MS_REC | k.MS_PRIVATE)
    k.mount("root", NEW_ROOT, "tmpfs", k.MS_NOSUID | k.MS_NODEV, "size=1m,mode=755")
    os.chdir(NEW_ROOT)
    os.mkdir("old")
    k.pivot_root(".", "old")
    os.chdir("/")
    for path in view:
        _bind_view(path)
    os.makedirs("/dev", exist_ok=True)
    for path in DEVICES:
        _bind("/old" + path, path)
    os.mkdir(WORK_FOLDER)
    os.symlink(WORK_FOLDER, "/dev/shm")
    if not os.path.lexists("/tmp"):
        os.symlink(WORK_FOLDER, "/tmp")
    k.unmount("/old")
    os.rmdir("/old")
    k.read_only("/")
    k.mount("work", WORK_FOLDER, "tmpfs", k.MS_NOSUID | k.MS_NODEV | k.MS_NOEXEC, f"size={disk},nr_inodes=4096,mode=777")
    os.chdir(WORK_FOLDER)


def _bind_view(path: str) -> None:
    """`path` of the old root at the same place of the new one; links stay links, and what they lead to is shown too."""
    if not os.path.lexists("/old" + path) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink("/old" + path):
        target = os.readlink("/old" + path)
        os.symlink(target, path)
        _bind_view(os.path.normpath(os.path.join(os.path.dirname(path), target)))
    else:
        _bind("/old" + path, path)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    k.mount(source, target, None, k.MS_BIND | k.MS_REC)


# ---------------------------------------------------------------------------------------------------------------- limits


def limit(limits: KernelLimits, counted: bool) -> None:
    """Resource limits of the process and of each one it starts. RLIMIT_NPROC counts by user: only right in a namespace."""
    seconds = math.ceil(limits["cpu"]) + 1  # of one process; the watcher adds up, and is finer
    wanted = {
        resource.RLIMIT_AS: limits["address_space"],
        resource.RLIMIT_FSIZE: limits["file_size"],
        resource.RLIMIT_NOFILE: limits["files"],
        resource.RLIMIT_NPROC: limits["processes"] + EXCESS_PROCESSES if counted else None,
        resource.RLIMIT_CORE: 1,  # 0 does not stop a core handler that is a program; 1 does (core(5))
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_RTPRIO: 0,
        RLIMIT_SIGPENDING: 64,  # timers too: they count against the user's other processes
    }
    for which, most in wanted.items():
        if most is not None:
            _set(which, most, most)
    _set(resource.RLIMIT_CPU, seconds, seconds + 1)  # SIGXCPU, which has a name, before SIGKILL


def _set(which: int, soft: int, hard: int) -> None:
    """Set a limit, but no higher than it already is."""
    now = resource.getrlimit(which)[1]
    most = hard if now == resource.RLIM_INFINITY else min(hard, now)
    resource.setrlimit(which, (min(soft, most), most))


# ----------------------------------------------------------------------------------------------------------------- locks


def lock(site: Site, execs: bool) -> None:
    """Give up capabilities, restrict files by Landlock (the second wall around them, or the only one), filter system calls.

    `execs`: other programs may be started. Below tier 2 a warm program does not need to, and one that did would lose its
    tie to the warden's life.
    """
    k.drop_capabilities()
    k.prctl("THP_DISABLE", k.THP_DISABLE, 1)  # a huge page of which little is kept shows as little, and holds all of it
    if site.tier == 2:
        k.landlock(rights(site), site.abi)
        k.install_filter(seccomp.build(seccomp.Rules(forks=site.counted)))
    elif site.tier == 1:
        k.landlock(rights(site), site.abi)
        scoped = site.abi >= 6  # else no signal at all: no wall tells one's own processes from others
        rules = seccomp.Rules(namespaces=False, signals=scoped, forks=False, execs=execs, truncating_reads=site.abi >= 3)
        k.install_filter(seccomp.build(rules))
    elif k.MACHINE_IS_KNOWN:
        k.install_filter(seccomp.threads_only())  # no wall, but a fork bomb that nothing counts would take the host


def rights(site: Site) -> list[tuple[str, int]]:
    """Return Landlock's rights by path.

    Below tier 2 the working directory is a flat folder of the host: it holds files only, and none is removed while it can be
    held open. So what a program stores is what the folder shows, and there are no folders, links or devices to clean up.
    """
    flat = k.WRITE_FILE | k.READ_FILE | k.READ_DIR | k.MAKE_REG | k.TRUNCATE
    own = k.file_rights(site.abi) & ~(k.EXECUTE | k.MAKE_CHAR | k.MAKE_BLOCK | k.IOCTL_DEV)
    return [
        *((path, k.READ_RIGHTS) for path in site.view),
        *((path, k.READ_FILE | k.WRITE_FILE | k.TRUNCATE) for path in DEVICES),
        (site.home, own if site.tier == 2 else flat),
    ]
