"""Files that are either not there or whole: put-if-absent, adopt, Parquet parts.

A commit is the hard link of a finished, synced temporary file: it fails where the name exists, so being correct never rests
on a lock. Nothing here knows what a file means.

Whatever gives a file its final name goes through `_do`, so that a test can crash it before and after each operation. What a
crash may tear does not: drafts in tmp/ that others write, events and logs, the heartbeat and the end of a lease, removals.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import polars as pl

from selfkd.core import digest
from selfkd.errors import StorageError

Result = TypeVar("Result")

# What file systems without hard links, or without links from one folder into another, answer to link().
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EIO)
REMOVED = "removed-"  # first part of the name of a folder that is being taken away
ELSEWHERE = "Put the folder of runs on another file system: --runs DIR"


class FileEntry(TypedDict):
    """What a commit records of a file, to find damage."""

    bytes: int
    sha256: str


def hook(moment: str, action: str, path: Path) -> None:
    """Do nothing, `before` and `after` each operation of `_do`; tests replace it to kill, to fill the disk, to tear."""


def _do(action: str, path: Path, operation: Callable[[], Result]) -> Result:
    """Perform a file-system operation between two calls of `hook`; StorageError where the disk is full."""
    hook("before", action, path)
    try:
        result = operation()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                "the disk is full", str(path), "Free some space and repeat the command: nothing is lost."
            ) from error
        raise
    hook("after", action, path)
    return result


def written(path: Path, operation: Callable[[], Result]) -> Result:
    """Have `operation` write the draft `path`, as whatever is written here; StorageError where the disk is full."""
    return _do("write", path, operation)


def _sync(path: Path) -> None:
    """Bring bytes (a file) or names (a folder) to disk. A failed fsync is fatal: repeating it may report a false success."""

    def sync() -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    _do("sync", path, sync)


def make_folder(path: Path) -> Path:
    """Make the folder and those above it, where they are not there; return `path`."""
    if not path.is_dir():
        _do("mkdir", path, lambda: path.mkdir(parents=True, exist_ok=True))
    return path


def temporary(folder: Path, name: str = "") -> Path:
    """Return a name in `folder` (a tmp/ on the same file system as the target) that nobody else uses."""
    return make_folder(folder) / f"{os.getpid()}-{secrets.token_hex(4)}{name}"


def put_if_absent(path: Path, content: bytes, tmp: Path) -> bool:
    """Commit `content` under `path`; False where that name exists already. Never replaces, never half-written.

    StorageError where the file system cannot link a file of `tmp` into another folder.
    """
    draft = temporary(tmp, path.suffix)
    _do("write", draft, lambda: draft.write_bytes(content))
    _sync(draft)
    make_folder(path.parent)
    try:
        _do("link", path, lambda: os.link(draft, path))
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        what = f"this file system cannot link files ({error.strerror or error})"
        raise StorageError(what, str(path), ELSEWHERE) from error
    finally:
        draft.unlink(missing_ok=True)
    _sync(path.parent)
    return True


def put(path: Path, content: bytes, tmp: Path, fix: str = "") -> None:
    """Commit like `put_if_absent`; StorageError where the name exists with other content."""
    if not put_if_absent(path, content, tmp) and path.read_bytes() != content:
        raise StorageError("exists already with other content", str(path), fix)


def put_json(path: Path, value: Any, tmp: Path) -> bool:
    return put_if_absent(path, json_text(value), tmp)


def json_text(value: Any) -> bytes:
    """Return the one text under which a JSON record is written."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def adopt(draft: Path, target: Path) -> Path:
    """Sync a finished file or folder and move it to its final, content-hashed name; an equal one already there stays."""
    for path in sorted(draft.rglob("*")) if draft.is_dir() else []:
        _sync(path)
    _sync(draft)
    make_folder(target.parent)
    if target.exists():
        _do("remove", draft, lambda: remove(draft))
    else:
        _do("rename", target, lambda: draft.rename(target))
        _sync(target.parent)
    return target


def write_parquet(
    frame: pl.DataFrame, folder: Path, tmp: Path, prefix: str = "", about: Mapping[str, str] | None = None
) -> Path:
    """Write one immutable Parquet file into `folder`, named `prefix` + the hash of its bytes; a reader sees it whole or not.

    `about` stands in the file beside its columns.
    """
    draft = temporary(tmp, ".parquet")
    _do("write", draft, lambda: frame.write_parquet(draft, compression="zstd", metadata=dict(about) if about else None))
    return adopt(draft, folder / f"{prefix}{digest.file(draft)[:32]}.parquet")


def remove(path: Path) -> None:
    """Take a file or folder away; a folder first gets a name that says it is being removed."""
    if path.is_dir():
        doomed = path.with_name(f"{REMOVED}{path.name}")
        sweep(path.parent)
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def retract(path: Path) -> None:
    """Take a record away for good before anything that it speaks of is touched."""
    _do("remove", path, path.unlink)
    _sync(path.parent)


def sweep(folder: Path) -> None:
    """Finish the removals in `folder` that a kill cut short."""
    for leftover in sorted(folder.glob(f"{REMOVED}*")):
        shutil.rmtree(leftover)


def files_in(folder: Path) -> list[Path]:
    """Return the files under a folder, at any depth, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def file_hashes(paths: list[Path], root: Path, known: Mapping[Path, str] | None = None) -> dict[str, FileEntry]:
    """Return {path relative to `root`: {bytes, sha256}}, hashed in threads. `known` are hashes that this process made of them just now."""
    made = known or {}
    with ThreadPoolExecutor(4) as threads:
        hashes = list(threads.map(lambda path: made.get(path) or digest.file(path), paths))
    return {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(paths, hashes, strict=True)
    }


def damaged(files: Mapping[str, Mapping[str, Any]], root: Path, rehash: bool) -> list[str]:
    """Return one sentence for each recorded file that is missing, of another size or (with `rehash`) of other bytes."""
    found = []
    for name, recorded in files.items():
        path = root / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != recorded["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes, {recorded['bytes']} were committed")
        elif rehash and digest.file(path) != recorded["sha256"]:
            found.append(f"{name} was changed after it was committed")
    return found
