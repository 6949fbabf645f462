"""Where a program may run on this host: what an interpreter needs to see, its working folder, and the user that it runs as."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from selfkd.errors import UsageError
from selfkd.sandbox import kernel
from selfkd.sandbox.walls import Site as Site

# The C library, its loader, shared libraries.
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
WORK_PREFIX = "selfkd-box-"
LIBRARIES_CODE = (
    "import json, sys, sysconfig as s; print(json.dumps([sys.base_prefix, s.get_path('stdlib'), s.get_path('platstdlib')]))"
)


@cache
def python_view(python: str | None) -> tuple[str, ...]:
    """Return what a Python needs to see: itself, its library, the system's shared libraries.

    Raise UsageError where `python` is not one, or does not run.
    """
    named = python or sys.executable
    path = os.path.realpath(named)
    try:
        answer = subprocess.run(
            [path, "-S", "-s", "-c", LIBRARIES_CODE], capture_output=True, timeout=60, check=True, env={}
        ).stdout
        prefix, *libraries = json.loads(answer)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UsageError(f"is not a Python that can be run: {error}", named) from None
    own = [] if prefix == "/usr" else [f"{prefix}/lib", f"{prefix}/lib64"]
    return _existing(path, *own, *libraries, *SYSTEM_LIBRARIES)


@cache
def interpreter_view(program: str) -> tuple[str, ...]:
    """Return what another interpreter needs to see at least: itself and the system's shared libraries."""
    if not os.path.isabs(program) or not os.access(program, os.X_OK):
        fix = f"It is {found}" if (found := shutil.which(program)) else ""
        raise UsageError("an interpreter is named by the absolute path of a program that can be run", program, fix)
    return _existing(program, *SYSTEM_LIBRARIES)


def _existing(*paths: str) -> tuple[str, ...]:
    """Return those that exist, without what lies below another one. A link and what it leads to both count."""
    found = [path for path in dict.fromkeys((*paths, *map(os.path.realpath, paths))) if os.path.exists(path)]
    return tuple(one for one in found if not any(one != other and _inside(one, other) for other in found))


def _inside(path: str, folder: str) -> bool:
    return os.path.isdir(folder) and not os.path.islink(folder) and Path(path).is_relative_to(folder)


@cache
def site(tier: int, view: tuple[str, ...], bubble: str = "", abi: int | None = None) -> Site:
    """Return a site of this tier. As root, programs get a user of their own where the view can be read by everybody."""
    root = os.geteuid() == 0
    own_user = tier == 2 and root and not bubble and all(os.stat(path).st_mode & 0o004 for path in view if os.path.exists(path))
    counted = tier == 2 and (own_user or not root)  # the kernel does not count the processes of user 0
    abi = kernel.landlock_abi() if abi is None else abi
    return Site(tier, _existing(*view), "", abi, 0 if own_user else None, counted, bubble)


# ------------------------------------------------------------------------------- the working folder where mounts are closed


def new_work_folder() -> str:
    """Make a new folder on the host, in memory where there is such a place."""
    return tempfile.mkdtemp(prefix=f"{WORK_PREFIX}{os.getpid()}-", dir=_work_parent())


@cache
def remove_leftovers() -> None:
    """Remove the folders of processes that were killed before they could do it, once in the life of this one."""
    for path in Path(_work_parent()).glob(f"{WORK_PREFIX}*-*"):
        owner = path.name.removeprefix(WORK_PREFIX).split("-")[0]
        with contextlib.suppress(OSError):  # somebody else's, or gone by now
            if owner.isdigit() and not os.path.exists(f"/proc/{owner}") and path.lstat().st_uid == os.geteuid():
                shutil.rmtree(path, ignore_errors=True)


def _work_parent() -> str:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
