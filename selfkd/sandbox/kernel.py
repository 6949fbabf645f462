"""The system calls that build a wall, as plain functions that raise OSError with the call's name.

Standard library and ctypes only. Knows nothing of programs, limits or tiers. Numbers that differ between machines are given
for x86_64 and aarch64; the others (400 and above) are the same everywhere. Sources: man-pages 6 and include/uapi/linux.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable

MACHINE = os.uname().machine
MACHINE_IS_KNOWN = MACHINE in ("x86_64", "aarch64")
PIVOT_ROOT, CAPSET = (155, 126) if MACHINE == "x86_64" else (41, 91)
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT, CLOSE_RANGE, MOUNT_SETATTR = 444, 445, 446, 436, 442
NEWNS, NEWUTS, NEWIPC = 0x20000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID = 1, 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PDEATHSIG, DUMPABLE, CAPBSET_DROP, SECCOMP, SECUREBITS, SUBREAPER, NO_NEW_PRIVS, THP_DISABLE = 1, 4, 24, 22, 28, 36, 38, 41
LAST_CAPABILITY = 40  # CAP_CHECKPOINT_RESTORE; numbers that a kernel does not have are refused and skipped
ROOT_GAINS_NOTHING = 0b11101111  # NOROOT, NO_SETUID_FIXUP and NO_CAP_AMBIENT_RAISE with their locks; KEEP_CAPS off and locked

# Landlock (Documentation/userspace-api/landlock.rst): rights by bit, and how many of them each ABI knows.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, MAKE_REG, TRUNCATE = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 8, 1 << 14
MAKE_CHAR, MAKE_BLOCK, IOCTL_DEV = 1 << 6, 1 << 11, 1 << 15
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
READ_RIGHTS = EXECUTE | READ_FILE | READ_DIR
TCP_RIGHTS, SCOPES = 0b11, 0b11  # bind and connect; abstract sockets and signals

INSTRUCTION_BYTES = 8  # of a seccomp filter

_libc = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    """struct mount_attr"""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


class PathRule(ctypes.Structure):
    """struct landlock_path_beneath_attr"""

    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class FilterProgram(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def check(result: int, name: str) -> int:
    """Return the `result` of a C call, or raise its errno as an OSError that names the call."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def syscall(name: str, number: int, *arguments: object) -> int:
    return check(_libc.syscall(number, *arguments), name)


def unshare(flags: int) -> None:
    try:
        check(_libc.unshare(flags), "unshare")
    except OSError as error:
        if error.errno == errno.ENOSPC:  # "no space left on device" would mislead
            raise OSError(error.errno, "user namespaces are used up or switched off", "unshare") from None
        raise


def set_hostname(name: str) -> None:
    check(_libc.sethostname(name.encode(), len(name)), "sethostname")


def prctl(name: str, option: int, *values: object) -> None:
    check(_libc.prctl(option, *values, *([0] * (4 - len(values)))), f"prctl {name}")


# ---------------------------------------------------------------------------------------------------------------- mounts


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    text = [None if part is None else part.encode() for part in (source, target, kind)]
    check(_libc.mount(*text, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def read_only(path: str) -> None:
    """Forbid writing and set-user-ID programs in the mount at `path` and those below it (Linux 5.12)."""
    wanted = MountAttributes(ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    syscall(f"mount_setattr {path}", MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, ctypes.byref(wanted), size)


def pivot_root(new: str, old: str) -> None:
    syscall("pivot_root", PIVOT_ROOT, new.encode(), old.encode())


def unmount(path: str) -> None:
    check(_libc.umount2(path.encode(), MNT_DETACH), f"umount2 {path}")


# ------------------------------------------------------------------------------------------------------------ privileges


def close_from(first: int) -> None:
    """Close every descriptor from `first` on, whatever the limit says."""
    syscall("close_range", CLOSE_RANGE, ctypes.c_uint(first), ctypes.c_uint(0xFFFFFFFF), 0)


def drop_capabilities() -> None:
    """Give up every capability for good: not even user 0 gets one again through execve."""
    for number in range(LAST_CAPABILITY + 1):
        _libc.prctl(CAPBSET_DROP, number, 0, 0, 0)  # refused to those who have none: their sets are checked by what follows
    _libc.prctl(SECUREBITS, ROOT_GAINS_NOTHING, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    syscall("capset", CAPSET, header, (ctypes.c_uint32 * 6)())
    prctl("NO_NEW_PRIVS", NO_NEW_PRIVS, 1)


# -------------------------------------------------------------------------------------------------------------- landlock


def landlock_abi() -> int:
    """Return the version of Landlock in this kernel, 0 where there is none or it is switched off."""
    version: int = _libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, version)


def file_rights(abi: int) -> int:
    """Return every file right that this ABI can take away."""
    known = 13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16
    return (1 << known) - 1


def landlock(allowed: Iterable[tuple[str, int]], abi: int) -> None:
    """Take away all file rights but those `allowed` (path, rights), and with newer ABIs TCP, abstract sockets and signals.

    Needs no_new_privs. A path that does not exist is left out. ABI 4 closes TCP, ABI 6 the scopes.
    """
    handled = file_rights(abi)
    fields = [handled]
    if abi >= 4:
        fields.append(TCP_RIGHTS)
    if abi >= 6:
        fields.append(SCOPES)
    attributes = (ctypes.c_uint64 * len(fields))(*fields)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    ruleset = syscall("landlock_create_ruleset", LANDLOCK_CREATE, ctypes.byref(attributes), size, ctypes.c_uint32(0))
    for path, rights in allowed:
        if os.path.exists(path):
            _allow(ruleset, path, rights & handled & (handled if os.path.isdir(path) else FILE_RIGHTS))
    syscall("landlock_restrict_self", LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = PathRule(rights, handle)
    syscall(f"landlock_add_rule {path}", LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), ctypes.c_uint32(0))
    os.close(handle)


# --------------------------------------------------------------------------------------------------------------- seccomp


def install_filter(code: bytes) -> None:
    """Filter the system calls of this process and all it starts. Needs no_new_privs."""
    wanted = FilterProgram(len(code) // INSTRUCTION_BYTES, code)
    prctl("SECCOMP", SECCOMP, ctypes.c_ulong(2), ctypes.byref(wanted))
