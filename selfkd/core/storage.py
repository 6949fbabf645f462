"""Files that are either not there or whole: put-if-absent, adopt, Parquet parts, leases.

Every write of the package goes through `_do`, so that a test can crash it before and after each operation. Nothing
here knows what a file means. A commit is the hard link of a finished, synced temporary file: it fails where the name exists,
so being correct never rests on a lock; the lease only saves work that two drivers would do twice.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from selfkd.core import digest
from selfkd.errors import StorageError

Result = TypeVar("Result")


def hook(moment: str, action: str, path: Path) -> None:
    """Called `before` and `after` each file-system operation; tests replace it to kill, to fill the disk, to tear."""


def _do(action: str, path: Path, operation: Callable[[], Result]) -> Result:
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


def _sync(path: Path) -> None:
    """Bytes (a file) or names (a folder) to disk. A failed fsync is fatal: repeating it may report a false success."""

    def sync() -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    _do("sync", path, sync)


def make_folder(path: Path) -> Path:
    if not path.is_dir():
        _do("mkdir", path, lambda: path.mkdir(parents=True, exist_ok=True))
    return path


def temporary(folder: Path, name: str = "") -> Path:
    """A name in `folder` (a tmp/ on the same file system as the target) that nobody else uses."""
    return make_folder(folder) / f"{os.getpid()}-{secrets.token_hex(4)}{name}"


def put_if_absent(path: Path, content: bytes, tmp: Path) -> bool:
    """Commit `content` under `path`; False where that name exists already. Never replaces, never half-written."""
    draft = temporary(tmp, path.suffix)
    _do("write", draft, lambda: draft.write_bytes(content))
    _sync(draft)
    make_folder(path.parent)
    try:
        _do("link", path, lambda: os.link(draft, path))
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    _sync(path.parent)
    return True


def put(path: Path, content: bytes, tmp: Path, fix: str = "") -> None:
    """`put_if_absent` that refuses loudly where the name exists with other content."""
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


def write_parquet(frame: pl.DataFrame, folder: Path, tmp: Path, prefix: str = "") -> Path:
    """One immutable Parquet file in `folder`, named `prefix` + the hash of its bytes; a reader sees it whole or not."""
    draft = temporary(tmp, ".parquet")
    _do("write", draft, lambda: frame.write_parquet(draft, compression="zstd"))
    return adopt(draft, folder / f"{prefix}{digest.file(draft)[:32]}.parquet")


def remove(path: Path) -> None:
    """Take a file or folder away; a folder first gets a name that says it is being removed."""
    if path.is_dir():
        doomed = path.with_name(f"removed-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def file_hashes(paths: list[Path], root: Path) -> dict[str, dict[str, Any]]:
    """{path relative to `root`: {bytes, sha256}}, hashed in threads."""
    with ThreadPoolExecutor(4) as threads:
        hashes = threads.map(digest.file, paths)
        return {p.relative_to(root).as_posix(): {"bytes": p.stat().st_size, "sha256": h} for p, h in zip(paths, hashes)}


def damaged(files: dict[str, dict[str, Any]], root: Path, rehash: bool) -> list[str]:
    """Which of the recorded files are missing, of another size or (with `rehash`) of other bytes; one sentence each."""
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
