"""What a program may try, each as a function: it returns evidence where it got through, and raises or returns '' where not.

Run inside, as a program: by the probe, to learn what this host's walls hold, and by the tests. `targets` says what to aim at
(`selfkd.sandbox.targets`). Standard library only, and nothing here does harm: the targets are the prober's own.
"""

import ctypes
import fcntl
import gc
import mmap
import os
import platform
import resource
import signal
import socket
import struct
import sys

libc = ctypes.CDLL(None, use_errno=True)
IS_X86 = platform.machine() == "x86_64"
CONNECT_SECONDS = 1.0


def attack(name, targets):
    """Return evidence that attack `name` got through, or ''."""
    try:
        return globals()[name](targets) or ""
    except Exception:
        return ""


def syscall(x86, arm, *arguments):
    return libc.syscall(x86 if IS_X86 else arm, *arguments)


def connected(family, kind, address):
    with socket.socket(family, kind) as one:
        one.settimeout(CONNECT_SECONDS)
        one.connect(address)
        one.send(b"out")
        return f"sent to {address}"


def owner(targets):
    """Return the prober's process number. Where that is our own number in a namespace, there is nothing to aim at."""
    if targets["owner"] == os.getpid():
        raise ProcessLookupError
    return targets["owner"]


# --------------------------------------------------------------------------------------------------------------- network


def tcp(targets):
    return connected(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", targets["tcp"]))


def tcp_listen(targets):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        return "listens"


def udp(targets):
    return connected(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", targets["udp"]))


def unix_stream(targets):
    return connected(socket.AF_UNIX, socket.SOCK_STREAM, targets["unix"])


def unix_datagram(targets):
    return connected(socket.AF_UNIX, socket.SOCK_DGRAM, targets["datagram"])


def unix_datagram_pair(targets):
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, other:
        one.sendto(b"out", targets["datagram"])
        return "sent"


def abstract_socket(targets):
    return connected(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + targets["abstract"])


def abstract_name(targets):
    one, other = socket.socketpair()
    with one, other:
        one.bind("\0" + targets["abstract"] + "-taken")
        return "holds a name outside"


def pass_descriptor(targets):
    """Descriptors on their way in a socket outlive who sent them."""
    one, other = socket.socketpair()
    with one, other:
        one.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 1))])
        return "sent"


def netlink(targets):
    with socket.socket(16, socket.SOCK_RAW, 0):
        return "netlink socket"


# ----------------------------------------------------------------------------------------------------------------- files


def opened(path, flags=os.O_RDONLY):
    handle = os.open(path, flags, 0o600)
    try:
        return f"read {os.read(handle, 40)!r}" if flags == os.O_RDONLY else "opened"
    finally:
        os.close(handle)


def read_passwd(targets):
    return opened("/etc/passwd")


def read_others_file(targets):
    return opened(targets["secret"])


def read_environment_of_init(targets):
    return opened("/proc/1/environ")


def read_environment_of_owner(targets):
    return opened(f"/proc/{owner(targets)}/environ")


def read_memory_of_owner(targets):
    return opened(f"/proc/{owner(targets)}/mem", os.O_RDWR)


def read_descriptors_of_owner(targets):
    return repr(os.listdir(f"/proc/{owner(targets)}/fd")[:3])


def write_outside(targets):
    return opened(os.path.join(targets["folder"], "new"), os.O_WRONLY | os.O_CREAT)


def overwrite(targets):
    return opened(targets["secret"], os.O_WRONLY | os.O_APPEND)


def truncate(targets):
    os.truncate(targets["truncated"], 0)
    return "truncated"


def truncate_what_is_shown(targets):
    for access in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_ACCMODE):
        try:
            os.close(os.open(targets["shown"] + "/kept", access | os.O_TRUNC))
            return "truncated"
        except OSError:
            continue


def rename_away(targets):
    os.rename(targets["renamed"], targets["renamed"] + "-gone")
    return "renamed"


def remove(targets):
    os.unlink(targets["removed"])
    return "removed"


def change_mode(targets):
    os.chmod(targets["changed"], 0o666)
    return "mode changed"


def change_time(targets):
    os.utime(targets["secret"])
    return "time changed"


def set_attribute(targets):
    os.setxattr(targets["secret"], "user.mark", b"1")
    return "attribute set"


def symlink_escape(targets):
    os.symlink(targets["secret"], "link")
    return opened("link")


def hard_link_escape(targets):
    os.link(targets["secret"], "hard")
    return opened("hard")


def open_by_handle(targets):
    return "opened" if syscall(303, 264, -100, targets["secret"].encode(), None, None, 0) == 0 else ""


# ------------------------------------------------------------------------------------------------------- other processes


def signal_owner(targets):
    os.kill(owner(targets), 0)
    return "may signal"


def signal_by_descriptor(targets):
    """Have a socket signal its owner, who may be anybody, when something arrives."""
    one, other = socket.socketpair()
    with one, other:
        fcntl.fcntl(one, fcntl.F_SETOWN, owner(targets))
        fcntl.fcntl(one, 10, int(signal.SIGURG))  # F_SETSIG; a signal that nobody minds
        fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC)
        other.send(b"x")
        return "may signal"


def outlive_owner(targets):
    return "no longer dies with its warden" if libc.prctl(1, 0, 0, 0, 0) == 0 else ""


def lock_outside(targets):
    with open(os.__file__) as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return "locked"


def lease_outside(targets):
    with open(os.__file__) as file:
        fcntl.fcntl(file, 1024, fcntl.F_RDLCK)
        return "leased"


def mark_outside(targets):
    with open(os.__file__) as file:
        flags = struct.unpack("i", fcntl.ioctl(file, 0x80086601, b"0000"))[0]  # FS_IOC_GETFLAGS
        fcntl.ioctl(file, 0x40086602, struct.pack("i", flags))  # the same flags again
        return "flags set"


def trace_owner(targets):
    return "attached" if syscall(101, 117, 0x4206, owner(targets), 0, 0) == 0 else ""  # PTRACE_SEIZE


def read_vm_of_owner(targets):
    room = ctypes.create_string_buffer(8)
    piece = struct.pack("PN", ctypes.addressof(room), 8)
    there = struct.pack("PN", targets["address"], 8)
    done = syscall(310, 270, owner(targets), piece, ctypes.c_ulong(1), there, ctypes.c_ulong(1), ctypes.c_ulong(0))
    return f"read {room.raw!r}" if done > 0 else ""


def steal_descriptor(targets):
    handle = os.pidfd_open(owner(targets))
    try:
        return "stolen" if libc.syscall(438, handle, 0, 0) >= 0 else ""
    finally:
        os.close(handle)


def change_limits_of_owner(targets):
    resource.prlimit(owner(targets), resource.RLIMIT_CORE)
    return "limits of another process"


def shared_memory(targets):
    segment = syscall(29, 194, 0, ctypes.c_size_t(4096), 0o1600)  # shmget IPC_PRIVATE IPC_CREAT
    if segment >= 0:
        syscall(31, 195, segment, 0, None)  # shmctl IPC_RMID
        return "segment"


def queue_by_number(targets):
    room = ctypes.create_string_buffer(64)
    return "read" if libc.msgrcv(targets["queue"], room, ctypes.c_size_t(32), ctypes.c_long(0), 0o4000) > 0 else ""


def remove_queue(targets):
    return "removed" if libc.msgctl(targets["queue"], 0, None) == 0 else ""


def message_queue(targets):
    name = b"/selfkd-%d" % targets["owner"]
    if libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, None) >= 0:
        libc.mq_unlink(name)
        return "queue"


# ------------------------------------------------------------------------------------------------------------ privileges


def become_root(targets):
    """User 0 without a capability is a user like others; where the owner is root, only capabilities would be a gain."""
    os.setuid(0)
    return capabilities(targets) or ("" if targets["root"] else "became user 0")


def set_user_id_program(targets):
    return "" if libc.prctl(39, 0, 0, 0, 0) == 1 else "a set-user-ID program would gain its owner's rights"


def capabilities(targets):
    data = (ctypes.c_uint32 * 6)()
    syscall(125, 90, (ctypes.c_uint32 * 2)(0x20080522, 0), data)
    return f"capabilities {data[0]:x}" if any(data) else ""


def mount_over(targets):
    old, new = libc.mount(b"x", b".", b"tmpfs", ctypes.c_ulong(0), None), libc.syscall(430, b"tmpfs", 0)  # fsopen
    return "mounted" if old == 0 or new >= 0 else ""


def unshare_again(targets):
    return "new user namespace" if libc.unshare(0x10000000) == 0 else ""


def clone_namespace(targets):
    child = syscall(56, 220, ctypes.c_ulong(0x10000000 | signal.SIGCHLD), None, None, None, None)
    if child == 0:
        os._exit(0)
    return "new user namespace" if child > 0 else ""


def change_root(targets):
    return os.chroot(".") or "new root"


def keyring(targets):
    return "key" if syscall(248, 217, b"user", b"selfkd", b"x", ctypes.c_size_t(1), -2) > 0 else ""


def io_uring(targets):
    return "ring" if libc.syscall(425, 1, (ctypes.c_uint32 * 30)()) >= 0 else ""


def bpf(targets):
    attributes = struct.pack("IIII", 2, 4, 4, 1).ljust(128, b"\0")  # an array map
    return "map" if syscall(321, 280, 0, attributes, 128) >= 0 else ""


def performance_events(targets):
    attributes = struct.pack("IIQ", 1, 128, 0).ljust(128, b"\0")
    return "counter" if syscall(298, 241, attributes, 0, -1, -1, 0) >= 0 else ""


def userfault(targets):
    return "descriptor" if syscall(323, 282, 1) >= 0 else ""


def other_architecture(targets):
    """getpid by the x32 numbers, which a filter that only knows the usual ones lets pass."""
    return "x32 call" if IS_X86 and libc.syscall(0x40000000 + 39) > 0 else ""


def i386_call(targets):
    """getpid by `int 0x80`: mov eax, 20; int 0x80; ret."""
    if IS_X86:
        code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")
        return "called" if ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() > 0 else ""


# ------------------------------------------------------------------------------------------------------ what nobody counts


def shared_memory_of_nobody(targets):
    """Pages that stay although no process holds them in its resident size."""
    mmap.mmap(-1, 4096, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    return "mapped"


def deep_socket(targets):
    one, other = socket.socketpair()
    with one, other:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)
        return "a buffer of megabytes"


def splice_into_pipe(targets):
    reading, writing = os.pipe()
    room = ctypes.create_string_buffer(8192)
    piece = struct.pack("PN", ctypes.addressof(room), 8192)
    try:
        return "pages in a pipe" if syscall(278, 75, writing, piece, ctypes.c_ulong(1), 0) > 0 else ""
    finally:
        os.close(reading)
        os.close(writing)


def requests_of_the_host(targets):
    context = ctypes.c_ulong(0)
    if syscall(206, 0, 1, ctypes.byref(context)) == 0:
        syscall(207, 1, context)
        return "io_setup"


def deep_pipe(targets):
    reading, writing = os.pipe()
    try:
        fcntl.fcntl(writing, 1031, 1 << 20)  # F_SETPIPE_SZ
        return "a pipe of a megabyte"
    finally:
        os.close(reading)
        os.close(writing)


# --------------------------------------------------------------------------------------------------------------- secrets


def secret_in_environment(targets):
    """Look for the marker in variables and arguments; a line of this text never holds it whole."""
    words = [*os.environ.values(), *sys.argv, *sys.orig_argv]
    return "found" if any(targets["marker"][1:] in word and targets["marker"][0] in word[:1] for word in words) else ""


def inherited_descriptors(targets):
    found = []
    for handle in range(4, 256):
        try:
            os.fstat(handle)
            found.append(handle)
        except OSError:
            pass
    return f"descriptors {found!r}" if found else ""


def answers_in_memory(targets):
    """Look for objects that hold the marker, other than `targets`; it is split here so that this text does not hold it."""
    tail, head = targets["marker"][1:], targets["marker"][0]
    others = [one for one in gc.get_objects() if type(one) is dict and one is not targets]
    hits = sum(head + tail in map(str, one.values()) for one in others)
    frame, frames = sys._getframe(), 0
    while frame:
        frames += sum(type(one) is str and one == head + tail for one in frame.f_locals.values())
        frame = frame.f_back
    return "found" if hits or frames else ""


ALL = tuple(
    name
    for name, one in list(globals().items())
    if callable(one)
    and getattr(one, "__globals__", None) is globals()
    and name not in ("attack", "syscall", "connected", "opened", "owner")
)
