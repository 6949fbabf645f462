"""What walls this host has, found out by attacking them: never by version numbers alone.

Tier 2: own namespaces, Landlock, system calls filtered. Tier 1: Landlock and the filter. Tier 0: resource limits only, and then
the sandbox refuses. A tier counts only if every attack of `selfkd.sandbox.attacks` was denied in a throw-away program on this host.
The result is kept until the next boot, for this kernel, user, interpreter and version of the sandbox, in a file that only counts
if nobody else can have written it. A stale note makes nothing unsafe: a wall that cannot be built stops the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfkd.errors import SandboxError
from selfkd.sandbox import kernel, sites
from selfkd.sandbox.jail import Limits
from selfkd.sandbox.walls import Site

if TYPE_CHECKING:
    from selfkd.sandbox.box import Sandbox

NAMES = {2: "namespaces, Landlock, seccomp", 1: "Landlock, seccomp", 0: "resource limits only"}
VICTIMS = ("truncated", "removed", "renamed", "changed")  # one file for each attack that would take it from the next
SWITCHES = {  # file: (value that closes user namespaces, how to open them)
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": ("1", "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or install bubblewrap with its AppArmor profile"),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
    "/proc/sys/user/max_user_namespaces": ("0", "sudo sysctl user.max_user_namespaces=10000"),
}  # fmt: skip


@dataclass(frozen=True)
class Host:
    """The best tier of this host. `bubble` is the bwrap that makes its namespaces, '' for our own.

    `lacks` says for each better tier what stood in the way; `attacks` is how many were tried.
    """

    tier: int
    bubble: str
    abi: int
    attacks: int
    lacks: tuple[str, ...]
    fix: str

    @property
    def walls(self) -> str:
        by = f" (by {self.bubble})" if self.bubble else ""
        return f"{NAMES[self.tier]}{by}, Landlock ABI {self.abi}" if self.tier else NAMES[0]

    @property
    def refusal(self) -> str:
        """One line: what is refused, what this host lacks, how to get it."""
        fix = f". {self.fix}" if self.fix else ""
        return f"this host cannot close the network to model-written code, so none is run: {'; '.join(self.lacks)}{fix}"


@cache
def host() -> Host:
    """The host's tier: as noted since the last boot, else by trying."""
    if sys.platform != "linux":
        return Host(0, "", 0, 0, (f"{sys.platform} has neither namespaces nor Landlock",), "Run it on Linux")
    path = _note()
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = json.loads(_own_text(path))
        known = Host(**{**found, "lacks": tuple(found["lacks"])})
        if known.bubble in ("", shutil.which("bwrap")):
            return known
    found = probe()
    with contextlib.suppress(OSError):  # a home that cannot be written to costs a second per process, no more
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(asdict(found)), "utf-8")
        beside.chmod(0o600)
        os.replace(beside, path)
    return found


def _own_text(path: Path) -> str:
    """A file's text, if nobody else can have written it: it names a program that is started. PermissionError otherwise."""
    with path.open(encoding="utf-8") as file:
        state = os.fstat(file.fileno())
        if state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise PermissionError(str(path))
        return file.read()


def _note() -> Path:
    here = Path(__file__).parent
    code = [path.read_bytes() for path in sorted(here.glob("*.py"))]
    words = [Path("/proc/sys/kernel/random/boot_id").read_text(), os.uname().release, str(os.geteuid()), sys.executable]
    words += [_switch(path) or "" for path in SWITCHES] + [shutil.which("bwrap") or ""]
    name = hashlib.sha256(b"\0".join([*map(str.encode, words), *code])).hexdigest()[:24]
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = folder if os.path.isabs(folder) else "/nonexistent"  # no home: no note
    return Path(folder) / "selfkd" / f"sandbox-{name}.json"


def probe() -> Host:
    """Attack each tier, best first, and stay at the first one that holds."""
    lacks: list[str] = []
    view, abi = sites.python_view(None), kernel.landlock_abi()
    bubble = shutil.which("bwrap")
    if missing := _missing(abi):
        return Host(0, "", abi, len(names()), (missing,), _fix([missing], abi))
    for tier, by in ((2, ""), *(((2, bubble),) if bubble else ()), (1, "")):
        through = attacked(sites.site(tier, view, by))
        if not through:
            return Host(tier, by, abi, len(names()), tuple(lacks), _fix(lacks, abi))
        lacks.append(f"tier {tier}{' by bubblewrap' if by else ''}: {through}")
    return Host(0, "", abi, len(names()), tuple(lacks), _fix(lacks, abi))


def _missing(abi: int) -> str:
    """What is known to be needed, without trying."""
    if abi == 0:
        return f"no Landlock in kernel {os.uname().release}"
    return "" if kernel.KNOWN else f"no system call numbers for {kernel.MACHINE}"


def _switch(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return None


def _fix(lacks: list[str], abi: int) -> str:
    """What an administrator can do to raise the tier."""
    fixes = [fix for path, (closed, fix) in SWITCHES.items() if _switch(path) == closed]
    if abi == 0:
        fixes.append("Landlock needs Linux 5.13 or newer with `landlock` among its security modules (boot parameter lsm=)")
    return "; ".join(fixes) if lacks else ""


# --------------------------------------------------------------------------------------------------------------- attacking


@cache
def names() -> tuple[str, ...]:
    from selfkd.sandbox import attacks

    return attacks.ALL


def attacked(site: Site) -> str:
    """What got through at this site, in a line; '' where nothing did."""
    try:
        through = results(site)
    except SandboxError as error:
        return error.what
    found = [f"{name} ({evidence})" for name, evidence in through.items() if evidence]
    return f"not denied: {', '.join(found)}" if found else ""


def at(site: Site, limits: Limits) -> Sandbox:
    """A sandbox for Python at this very site, whatever the host's own tier."""
    from selfkd.sandbox.box import Sandbox

    class At(Sandbox):
        def site(self) -> Site:
            return site

        @property
        def forked(self) -> bool:
            return not site.bubble

    return At(limits)


def results(site: Site, only: tuple[str, ...] = ()) -> dict[str, str]:
    """Evidence by attack, '' for those denied; what the targets saw counts, whatever the program says.

    SandboxError where the walls cannot be built or an honest program does not run behind them.
    """
    source = Path(__file__).with_name("attacks.py").read_bytes()
    found: dict[str, str] = {}
    with ExitStack() as stack:
        told, seen = stack.enter_context(targets())
        box = at(replace(site, view=(*site.view, told["shown"])), Limits(seconds=20.0))
        program = stack.enter_context(box.calls(source))
        honest = program.call("attack", "none", told)
        if not honest.ok:
            raise SandboxError(f"an honest program does not run: {honest.reason}")
        for name in only or names():
            said = program.call("attack", name, told)
            program.end("stopped")  # the next attack begins in a fresh process: what one breaks must not hide another
            outside = seen()
            found[name] = str(said.value or "") if said.ok and said.value else outside
    return found


@contextmanager
def targets() -> Iterator[tuple[dict[str, Any], Any]]:
    """Things to aim at, all ours, and a function that says what has happened to them since it was last asked."""
    marker = secrets.token_hex(16)
    libc = ctypes.CDLL(None)
    kept = ctypes.create_string_buffer(b"in the owner's memory")
    with ExitStack() as stack:
        folder, shown = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"selfkd-{name}-"))) for name in ("targets", "shown")
        )
        shown.chmod(0o755)
        (shown / "kept").write_text(marker[::-1])
        (shown / "kept").chmod(0o644)
        for name in ("secret", *VICTIMS):
            (folder / name).write_text(marker)
            (folder / name).chmod(0o600)
        tcp, udp = (socket.socket(type=kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM))
        unix, datagram, abstract = (
            socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_STREAM)
        )
        addresses: list[Any] = [
            ("127.0.0.1", 0),
            ("127.0.0.1", 0),
            f"{folder}/unix",
            f"{folder}/datagram",
            f"\0selfkd-{marker[:8]}",
        ]
        sockets = [tcp, udp, unix, datagram, abstract]
        for one, address in zip(sockets, addresses):
            stack.enter_context(one).bind(address)
            one.setblocking(False)
            if one.type == socket.SOCK_STREAM:
                one.listen()
        told = {
            "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1], "unix": addresses[2], "datagram": addresses[3],
            "abstract": f"selfkd-{marker[:8]}", "folder": str(folder), "shown": str(shown), "secret": f"{folder}/secret",
            **{name: f"{folder}/{name}" for name in VICTIMS}, "owner": os.getpid(), "address": ctypes.addressof(kept), "marker": marker,
            "root": os.geteuid() == 0,
        }  # fmt: skip
        queue = libc.msgget(0, 0o1600)
        libc.msgsnd(queue, b"\1" + bytes(15), ctypes.c_size_t(8), 0o4000)
        stack.callback(libc.msgctl, queue, 0, None)
        told["queue"] = queue
        states = [_state(folder, shown)]

        def seen() -> str:
            states[:] = [*states[-1:], _state(folder, shown)]
            return _heard(sockets) or ("files outside changed" if states[0] != states[1] else "")

        os.environ["SELFKD_PROBE"] = marker
        stack.callback(os.environ.pop, "SELFKD_PROBE", None)
        yield told, seen


def _state(*folders: Path) -> list[tuple[str, int, int, bytes]]:
    """Names, modes, times and contents of the targets."""
    return [
        (path.name, path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for folder in folders
        for path in sorted(folder.iterdir())
    ]


def _heard(sockets: list[socket.socket]) -> str:
    """Whether anything arrived; all of it is taken."""
    heard = ""
    for one in sockets:
        with contextlib.suppress(BlockingIOError):
            while True:
                if one.type == socket.SOCK_STREAM:
                    one.accept()[0].close()
                else:
                    one.recv(64)
                heard = "a socket outside was reached"
    return heard
