"""What walls this host has, found out by attacking them: never by version numbers alone.

Tier 2: own namespaces, Landlock, system calls filtered. Tier 1: Landlock and the filter. Tier 0: resource limits only, and then
the sandbox refuses. A tier counts only if every attack of `selfkd.sandbox.attacks` was denied in a throw-away program on this
host. The result is kept until the next boot, for this kernel, user, interpreter and version of the sandbox, in a file that only
counts if nobody else can have written it. A stale note makes nothing unsafe: a wall that cannot be built stops the program.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from selfkd.errors import SandboxError
from selfkd.sandbox import attacks, kernel, sites
from selfkd.sandbox.calls import Calls
from selfkd.sandbox.limits import Limits
from selfkd.sandbox.runner import Runner
from selfkd.sandbox.targets import targets
from selfkd.sandbox.walls import Site

WALLS_OF_TIER = {2: "namespaces, Landlock, seccomp", 1: "Landlock, seccomp", 0: "resource limits only"}
PROBE_LIMITS = Limits(seconds=20.0)
NAMESPACE_SWITCHES = {  # file: (value that closes user namespaces, how to open them)
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or install bubblewrap with its AppArmor profile",
    ),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sudo sysctl kernel.unprivileged_userns_clone=1"),
    "/proc/sys/user/max_user_namespaces": ("0", "sudo sysctl user.max_user_namespaces=10000"),
}


@dataclass(frozen=True)
class Host:
    """The best tier of this host. `bubble` is the bwrap that makes its namespaces, '' for our own.

    `lacks` says for each better tier what prevents it; `attacks` is how many were tried.
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
        return f"{WALLS_OF_TIER[self.tier]}{by}, Landlock ABI {self.abi}" if self.tier else WALLS_OF_TIER[0]

    @property
    def refusal(self) -> str:
        """The error's one line: what is refused, what this host lacks, how to get it."""
        fix = f". {self.fix}" if self.fix else ""
        return f"this host cannot close the network to model-written code, so none is run: {'; '.join(self.lacks)}{fix}"


@cache
def host() -> Host:
    """Return what this host has: as noted since the last boot, else found by trying."""
    if sys.platform != "linux":
        return Host(0, "", 0, 0, (f"{sys.platform} has neither namespaces nor Landlock",), "Run it on Linux")
    path = _note_path()
    known = _read_note(path)
    if known and known.bubble in ("", shutil.which("bwrap")):
        return known
    found = probe()
    with contextlib.suppress(OSError):  # a home that cannot be written to costs a second per process, no more
        _write_note(path, found)
    return found


def probe() -> Host:
    """Attack each tier, best first, and stay at the first one that holds."""
    lacks: list[str] = []
    view, abi, count = sites.python_view(None), kernel.landlock_abi(), len(attacks.ALL)
    bubble = shutil.which("bwrap")
    if missing := _missing(abi):
        return Host(0, "", abi, count, (missing,), _fix([missing], abi))
    for tier, by in ((2, ""), *(((2, bubble),) if bubble else ()), (1, "")):
        through = attacked(sites.site(tier, view, by))
        if not through:
            return Host(tier, by, abi, count, tuple(lacks), _fix(lacks, abi))
        lacks.append(f"tier {tier}{' by bubblewrap' if by else ''}: {through}")
    return Host(0, "", abi, count, tuple(lacks), _fix(lacks, abi))


def _missing(abi: int) -> str:
    """Return what is known to be needed and missing, without trying; '' where nothing is."""
    if abi == 0:
        return f"no Landlock in kernel {os.uname().release}"
    return "" if kernel.MACHINE_IS_KNOWN else f"no system call numbers for {kernel.MACHINE}"


def _fix(lacks: list[str], abi: int) -> str:
    """Return what an administrator can do to raise the tier."""
    fixes = [fix for path, (closed, fix) in NAMESPACE_SWITCHES.items() if _switch(path) == closed]
    if abi == 0:
        fixes.append("Landlock needs Linux 5.13 or newer with `landlock` among its security modules (boot parameter lsm=)")
    return "; ".join(fixes) if lacks else ""


def _switch(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return None


# ---------------------------------------------------------------------------------------------------------------- the note


def _note_path() -> Path:
    """Return where the note is kept; its name changes with everything that the result depends on."""
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    facts = [Path("/proc/sys/kernel/random/boot_id").read_text(), os.uname().release, str(os.geteuid()), sys.executable]
    facts += [_switch(path) or "" for path in NAMESPACE_SWITCHES] + [shutil.which("bwrap") or ""]
    name = hashlib.sha256(b"\0".join([*map(str.encode, facts), *code])).hexdigest()[:24]
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = folder if os.path.isabs(folder) else "/nonexistent"  # no home: no note
    return Path(folder) / "selfkd" / f"sandbox-{name}.json"


def _read_note(path: Path) -> Host | None:
    """Return what is noted; None where nothing is, where it is damaged, or where somebody else can have written it."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = json.loads(_own_text(path))
        return Host(**{**found, "lacks": tuple(found["lacks"])})
    return None


def _own_text(path: Path) -> str:
    """Return a file's text. Raise PermissionError where others can have written it: it names a program that is started."""
    with path.open(encoding="utf-8") as file:
        state = os.fstat(file.fileno())
        if state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise PermissionError(str(path))
        return file.read()


def _write_note(path: Path, found: Host) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(asdict(found)), "utf-8")
    beside.chmod(0o600)
    os.replace(beside, path)


# --------------------------------------------------------------------------------------------------------------- attacking


def attacked(site: Site) -> str:
    """Return what got through at this site, in one line; '' where nothing did."""
    try:
        through = results(site)
    except SandboxError as error:
        return error.what
    found = [f"{name} ({evidence})" for name, evidence in through.items() if evidence]
    return f"not denied: {', '.join(found)}" if found else ""


def runner_at(site: Site, limits: Limits) -> Runner:
    """Return what runs Python programs at this very site, whatever the host's own tier. Bubblewrap can only start them."""
    return Runner(site, limits, python=os.path.realpath(sys.executable) if site.bubble else None)


def results(site: Site, only: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the evidence by attack, '' for those denied; what the targets saw counts, whatever the program says.

    Raise SandboxError where the walls cannot be built or an honest program does not run behind them.
    """
    source = Path(attacks.__file__).read_bytes()
    found: dict[str, str] = {}
    with ExitStack() as stack:
        aims, seen_outside = stack.enter_context(targets())
        runner = runner_at(replace(site, view=(*site.view, str(aims["shown"]))), PROBE_LIMITS)
        program = stack.enter_context(Calls(runner, source))
        honest = program.call("attack", "none", aims)
        if not honest.ok:
            raise SandboxError(f"an honest program does not run: {honest.reason}")
        for name in only or attacks.ALL:
            claimed = program.call("attack", name, aims)
            program.end()  # the next attack begins in a fresh process: what one breaks must not hide another
            outside = seen_outside()
            found[name] = str(claimed.value or "") if claimed.ok and claimed.value else outside
    return found
