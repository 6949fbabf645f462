"""Large files of equal content that lie once on disk: hard links into a store, found by the hash of their bytes.

Every folder stays whole by itself, whatever becomes of the store or of the other folders. A file of the store that no folder links any
more is removed, so the store takes no room of its own. Knows nothing of what the files mean.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from selfkd.core import digest

TRIES = 3  # another process may put a file there, or take one away, between two of our steps
READ_ONLY = 0o444  # what is written into one link would be in all of them


def share(files: Sequence[Path], store: Path) -> str:
    """Make each file a link of the one in `store` that has its bytes, or that one a link of it; return why not, or ''.

    Where there are no links between the two places, another file system for one, nothing is copied and every file stays as it is.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        _sweep(store)
        with ThreadPoolExecutor(4) as threads:
            hashes = list(threads.map(digest.file, files))
        for path, sha256 in zip(files, hashes, strict=True):
            path.chmod(READ_ONLY)
            _share(path, sha256, store / f"{sha256}{path.suffix}")
    except OSError as error:
        return f"{store}: {error.strerror or error}"
    return ""


def _share(path: Path, sha256: str, kept: Path) -> None:
    for _ in range(TRIES):
        try:
            os.link(path, kept)
            return
        except FileExistsError:
            pass
        with suppress(FileNotFoundError):  # taken away meanwhile
            if kept.samefile(path) or _taken(path, sha256, kept):
                return
            kept.unlink()  # it was damaged; whoever has it finds that by itself


def _taken(path: Path, sha256: str, kept: Path) -> bool:
    """Put a link of the kept file in the place of `path`, where it has the bytes that it is named by."""
    if kept.stat().st_size != path.stat().st_size or digest.file(kept) != sha256:
        return False
    beside = path.with_name(f"{path.name}.linked")
    os.link(kept, beside)
    beside.replace(path)
    return True


def _sweep(store: Path) -> None:
    """Remove what no folder has: it would save nothing, for a file is compared with it only once it is there."""
    for entry in store.iterdir():
        with suppress(FileNotFoundError):
            if entry.stat().st_nlink == 1:
                entry.unlink()
