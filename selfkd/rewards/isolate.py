"""A user's file and the local files it needs, copied into an empty folder: what a worker runs, wherever the file lies.

So a helper or a data file that a run would not freeze is missing at once, in `lint` and `try` as in a run; a reward that writes
beside itself changes no run; and editing a file while workers run it changes nothing.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from selfkd.core.local_code import LocalCode, local_code

_folders: dict[int, Path] = {}  # process -> its folder: a forked copy of this process must not share it, nor remove it


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
    if os.getpid() not in _folders:
        _folders[os.getpid()] = Path(tempfile.mkdtemp(prefix="selfkd-rewards-"))
    return _folders[os.getpid()]


@atexit.register
def _remove() -> None:
    """Remove the copies of this process; close_idle_workers of the pool may run after it, and needs none of them."""
    if folder := _folders.pop(os.getpid(), None):
        shutil.rmtree(folder, ignore_errors=True)
