"""Ends what a killed driver leaves behind. A script of its own that needs nothing but Python and /proc.

    python -I guardian.py DRIVER_PID FOLDER

Ray's own processes notice that their driver was killed, except two agents that try for 60 s to report it to a server that is
gone too (measured with 2.60), and whatever an engine started itself. The guardian holds a pipe of the driver: a byte says that
all is well; an end of file, or another parent (a fork of the driver may hold the pipe too), that the driver died. Then every
process of that cluster is killed and FOLDER is taken away. It only touches processes that have an option --name=FOLDER/... (Ray
gives all of its own one, and FOLDER is a name made up for this cluster) and what descends from them.
"""

import os
import select
import shutil
import signal
import sys
import time

PERIOD_SECONDS = 1.0
GRACE_SECONDS = 2.0  # most processes go by themselves, and write a last line to their log


def processes() -> dict[int, tuple[int, str]]:
    """Return {pid: (parent, start time)} of everything that runs."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as handle:
                    fields = handle.read().rsplit(")", 1)[1].split()
            except OSError:
                continue
            found[int(name)] = (int(fields[1]), fields[19])
    return found


def belongs(pid: int, folder: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as handle:
            return f"={folder}".encode() in handle.read()
    except OSError:
        return False


def cluster(driver: int, folder: str, running: dict[int, tuple[int, str]]) -> set[int]:
    """Return the pids of the cluster: children of the driver that name the folder, and all that descends from them."""
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in running.items():
        children.setdefault(parent, []).append(pid)
    todo = [pid for pid in children.get(driver, []) if pid != os.getpid() and belongs(pid, folder)]
    members: set[int] = set()
    while todo:
        pid = todo.pop()
        members.add(pid)
        todo += children.get(pid, [])
    return members


def end(members: dict[int, str]) -> None:
    """Kill those that are still the processes they were: a pid alone may have been given to another one."""
    running = processes()
    for pid, started in members.items():
        if pid in running and running[pid][1] == started:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def main(driver: int, folder: str) -> None:
    members: dict[int, str] = {}
    while True:
        ready, _, _ = select.select([0], [], [], PERIOD_SECONDS)
        if ready or os.getppid() != driver:
            break
        running = processes()
        members = {pid: start for pid, start in members.items() if running.get(pid, (0, ""))[1] == start}
        members |= {pid: running[pid][1] for pid in cluster(driver, folder, running)}
    if not ready or not os.read(0, 1):
        time.sleep(GRACE_SECONDS)
        late = {pid: start for pid, (_, start) in processes().items() if belongs(pid, folder)}  # born while their driver died
        end(members | late)
        for _ in range(50):  # what is just being killed may still write to it
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(PERIOD_SECONDS / 50)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
