"""Which system calls a program may not make, as a seccomp filter (Documentation/userspace-api/seccomp_filter.rst).

A deny-list: the file and process walls hold without it. It closes sockets of every family, the calls that read or steer
other processes, those that made kernel exploits in recent years, and shared memory that no limit counts. Denied calls fail
with EPERM, so an ordinary program gets an error it knows.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*

# name: (x86_64, aarch64), None where the machine does not have it; one number where all machines share it.
ALWAYS_DENIED: dict[str, tuple[int | None, int | None] | int] = {
    "socket": (41, 198), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": 440, "process_mrelease": 448, "pidfd_getfd": 438, "pidfd_send_signal": 424, "kcmp": (312, 272),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "mount_setattr": 442, "statmount": 457, "listmount": 458, "open_tree_attr": 467,
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "quotactl": (179, 60), "quotactl_fd": 443, "acct": (163, 89),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116),
    "sethostname": (170, 161), "setdomainname": (171, 162), "clock_settime": (227, 112), "settimeofday": (164, 170),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
    "memfd_create": (319, 279), "memfd_secret": 447, "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190),
    "shmctl": (31, 195), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    # A pair of sockets may be written to and read from; whatever else is done with one reaches or costs others.
    "bind": (49, 200), "listen": (50, 201), "connect": (42, 203), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "setsockopt": (54, 208), "getsockopt": (55, 209), "flock": (73, 32), "sync": (162, 81), "syncfs": (306, 267),
    "vmsplice": (278, 75), "io_setup": (206, 0),  # memory in pipes that is not counted; the host's share of requests
}  # fmt: skip
# Where no namespace hides the rest of the machine: what changes files that may not be opened, and what steers processes.
DENIED_WITHOUT_NAMESPACES: dict[str, tuple[int | None, int | None] | int] = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": 452, "chown": (92, None), "lchown": (94, None),
    "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": 463,
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": 466, "file_setattr": 469,
    "link": (86, None), "linkat": (265, 37), "openat2": 437, "truncate": (76, 45), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "pidfd_open": 434,
}  # fmt: skip
SIGNAL_CALLS = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
EXEC_CALLS = {"execve": (59, 221), "execveat": (322, 281)}
FORK_CALLS = {"fork": (57, None), "vfork": (58, None)}
CLONE, CLONE3, SOCKETPAIR, PRLIMIT = (56, 220), 435, (53, 199), (302, 261)
CLONE_NEW_NAMESPACES, CLONE_THREAD, AF_UNIX, SOCK_STREAM, SOCK_TYPE_MASK = 0x7E020000, 0x10000, 1, 1, 0xF
FCNTL, IOCTL, PRCTL, MMAP, OPEN, OPENAT = (72, 25), (16, 29), (157, 167), (9, 222), (2, None), (257, 56)
# F_SETOWN F_SETSIG F_SETOWN_EX, F_SETLEASE F_NOTIFY, F_SETPIPE_SZ, F_SETLK F_SETLKW F_OFD_SETLK F_OFD_SETLKW: a descriptor made
# to send signals to anybody; leases, notices and locks on others' files; pipes that use up the user's share.
DENIED_FCNTL = (8, 10, 15, 1024, 1026, 1031, 6, 7, 37, 38)
ALLOWED_IOCTL = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX, no other
# PR_SET_PDEATHSIG: it shall die with the warden; PR_SET_DUMPABLE: and stay visible to it; PR_SET_THP_DISABLE: and be counted.
DENIED_PRCTL = (1, 4, 41)
MAP_SHARED, MAP_SHARED_ANONYMOUS, MAP_HUGETLB = 1, 0x21, 0x40000
O_TRUNC, O_TMPFILE = 0x200, 0x400000
O_ACCMODE, WRITE_MODES = 3, (1, 2)  # O_WRONLY, O_RDWR

LOAD, AND, EQUAL, ABOVE, SET, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06  # BPF instructions on 32-bit words
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
CALL_OFFSET, ARCH_OFFSET, ARGUMENTS_OFFSET, ARGUMENT_BYTES = 0, 4, 16, 8  # of struct seccomp_data
X32_CALLS = 0x40000000  # the numbers from here on are those of the x32 architecture
Instruction = tuple[int, int, int, int]  # code, how many to skip where it is true, and where it is false, value


@dataclass(frozen=True)
class Rules:
    """What depends on the walls around the filter, and on the program.

    `namespaces`: they hide the host. `signals`, `forks`, `execs`: these calls are allowed. `truncating_reads`: files may be
    opened for reading so as to be emptied, which Landlock sees only from ABI 3 on.
    """

    namespaces: bool = True
    signals: bool = True
    forks: bool = True
    execs: bool = True
    truncating_reads: bool = True


def build(rules: Rules = Rules(), machine: str = os.uname().machine) -> bytes:
    """Return the filter for this machine. Raise ValueError on one whose numbers are not known here."""
    arch = arch_index(machine)
    code = deny(number if isinstance(number, int) else number[arch] for number in denied_calls(rules).values())
    code += if_call(FCNTL[arch], 1, deny(DENIED_FCNTL))
    code += if_call(IOCTL[arch], 1, deny_except(ALLOWED_IOCTL))
    code += if_call(PRCTL[arch], 0, deny(DENIED_PRCTL))
    # A datagram pair can be pointed at any socket file; a stream pair stays a pair.
    code += if_call(SOCKETPAIR[arch], 0, deny_except((AF_UNIX,)))
    code += if_call(SOCKETPAIR[arch], 1, [(AND, 0, 0, SOCK_TYPE_MASK), *deny_except((SOCK_STREAM,))])
    # Memory that nobody's resident size shows: huge pages, and pages shared without a file.
    shared_anonymous = [(AND, 0, 0, MAP_SHARED_ANONYMOUS), *deny((MAP_SHARED_ANONYMOUS,))]
    code += if_call(MMAP[arch], 3, [*deny_flag(MAP_HUGETLB), *shared_anonymous])
    code += if_call(PRLIMIT[arch], 0, deny_except((0,)))  # only one's own limits
    if not rules.namespaces:
        code += without_namespaces(arch, rules)
    return assemble(machine, code if rules.forks else code + no_forks(arch))


def arch_index(machine: str) -> int:
    """Return which of a call's numbers are those of this machine."""
    return list(ARCHES).index(machine)


def denied_calls(rules: Rules) -> dict[str, tuple[int | None, int | None] | int]:
    """Return the calls that are refused whatever their arguments are."""
    denied = dict(ALWAYS_DENIED)
    if not rules.namespaces:
        denied |= DENIED_WITHOUT_NAMESPACES
    if not rules.signals:
        denied |= SIGNAL_CALLS
    if not rules.execs:
        denied |= EXEC_CALLS
    return denied


def without_namespaces(arch: int, rules: Rules) -> list[Instruction]:
    """Return what is refused where files are the host's and have no cap: mapping them shared, and having one without a name."""
    code = if_call(MMAP[arch], 3, deny_flag(MAP_SHARED))
    code += if_open(arch, deny_flag(O_TMPFILE))
    if not rules.truncating_reads:
        # Opening for writing is left to Landlock. Only one that does not write, and empties the file, is refused.
        only_writers = [(AND, 0, 0, O_ACCMODE), *deny_except(WRITE_MODES)]
        code += if_open(arch, [(SET, 0, len(only_writers), O_TRUNC), *only_writers])
    return code


def threads_only(machine: str = os.uname().machine) -> bytes:
    """Return a filter that denies new processes and nothing else, for where they could be neither counted nor swept away."""
    return assemble(machine, no_forks(arch_index(machine)))


def assemble(machine: str, checks: list[Instruction]) -> bytes:
    """Return the bytes of a filter: other architectures' calls are refused, then `checks`, and what is left is allowed."""
    arch = arch_index(machine)
    code = [(LOAD, 0, 0, ARCH_OFFSET), (EQUAL, 1, 0, ARCHES[machine]), refuse(), (LOAD, 0, 0, CALL_OFFSET)]
    code += [(ABOVE, 0, 1, X32_CALLS), refuse()] if machine == "x86_64" else []
    code += [(EQUAL, 0, 1, CLONE3), refuse(errno.ENOSYS)]  # its flags cannot be seen; C libraries then use clone
    code += if_call(CLONE[arch], 0, deny_flag(CLONE_NEW_NAMESPACES))
    return b"".join(struct.pack("=HBBI", *one) for one in [*code, *checks, (RETURN, 0, 0, ALLOW)])


def no_forks(arch: int) -> list[Instruction]:
    """Return what refuses new processes; new threads are allowed."""
    code = deny(number[arch] for number in FORK_CALLS.values())
    return code + if_call(CLONE[arch], 0, [(SET, 1, 0, CLONE_THREAD), refuse()])


def deny(numbers: Iterable[int | None]) -> list[Instruction]:
    """Refuse where the loaded word is one of these."""
    return [step for number in numbers if number is not None for step in ((EQUAL, 0, 1, number), refuse())]


def deny_except(numbers: Sequence[int]) -> list[Instruction]:
    """Refuse where the loaded word is none of these."""
    return [*((EQUAL, len(numbers) - at, 0, number) for at, number in enumerate(numbers)), refuse()]


def deny_flag(flag: int) -> list[Instruction]:
    """Refuse where the loaded word has any of these bits."""
    return [(SET, 0, 1, flag), refuse()]


def refuse(number: int = errno.EPERM) -> Instruction:
    return (RETURN, 0, 0, ERRNO | number)


def if_call(number: int, argument: int, check: list[Instruction]) -> list[Instruction]:
    """Do `check` with the low word of an argument loaded, where the call is `number`; its number is loaded again afterwards."""
    load = (LOAD, 0, 0, ARGUMENTS_OFFSET + ARGUMENT_BYTES * argument)
    inner = [load, *check, (LOAD, 0, 0, CALL_OFFSET)]
    return [(EQUAL, 0, len(inner), number), *inner]


def if_open(arch: int, check: list[Instruction]) -> list[Instruction]:
    """Do `check` with the flags loaded with which a file is opened."""
    named = [(OPEN[arch], 1), (OPENAT[arch], 2)]
    return [step for number, flags in named if number is not None for step in if_call(number, flags, check)]
