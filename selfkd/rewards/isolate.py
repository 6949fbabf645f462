"""A user's file and the local files it needs, copied into an empty folder: what a worker runs, wherever the file lies.

So a helper or a data file that a run would not freeze is missing at once, in `lint` and `try` as in a run; a reward that writes
beside itself changes no run; and editing a file while workers run it changes nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import IO

from selfkd.core.local_code import LocalCode, local_code

PREFIX, LOCK = "selfkd-rewards-", "lock"

_folders: dict[int, tuple[Path, IO[str]]] = {}  # of each process: a forked copy of this one must not share it, nor remove it
_making = threading.Lock()


def isolated(path: Path) -> Path:
    """Return the copy of a file, made once for each content of it and of what it needs; data files are links."""
    code = local_code(path)
    home = _own_folder() / _content_hash(code)
    for name, source in code.files.items():
        copy = home / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            _copy(source, copy)
    return home / code.main_name


def _copy(source: Path, copy: Path) -> None:
    """Copy a module; link data, which may be large. Whole or not at all, for another thread may do the same."""
    draft = copy.with_name(f"{copy.name}.{os.getpid()}.{id(copy)}")
    if source.suffix == ".py":
        shutil.copyfile(source, draft)
    else:
        draft.symlink_to(source)
    draft.replace(copy)


def _content_hash(code: LocalCode) -> str:
    """Return a name for what the files hold: modules by their bytes, data by their place, size and time."""
    found = hashlib.sha256()
    for name, path in sorted(code.files.items()):
        stat = path.stat()
        said = path.read_bytes() if path.suffix == ".py" else f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()
        found.update(f"{name} {len(said)} ".encode() + said)
    return found.hexdigest()[:16]


def _own_folder() -> Path:
    """Return the folder of this process, locked while it lives; folders of processes that were killed go first."""
    with _making:
        if os.getpid() not in _folders:
            sweep(Path(tempfile.gettempdir()))
            _folders[os.getpid()] = _locked_folder()
        return _folders[os.getpid()][0]


def _locked_folder() -> tuple[Path, IO[str]]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        lock = (folder / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LOCK).exists():  # else another process swept it away before it was locked
            return folder, lock


def sweep(place: Path) -> None:
    """Remove the copies that killed processes left: those whose lock nobody holds."""
    for path in place.glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), path.open("r+") as lock:  # held, gone, or another person's
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


@atexit.register
def _remove() -> None:
    """Remove the copies of this process; close_idle_workers of the pool may run after it, and needs none of them."""
    if own := _folders.pop(os.getpid(), None):
        shutil.rmtree(own[0], ignore_errors=True)
