"""The checkpoints of an update in progress, as folders: which of them are whole, and which one is the newest.

One counts if its seal is there, names this very update, and every file has the bytes that the seal says. Any other is passed over, with
the reason. Knows no tensor.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selfkd.core import digest, storage

SEAL = "seal.json"
DRAFT = "draft"
STOP = "stop"  # a file of this name asks the ranks to end behind the step that they are at
WORTH_SECONDS = 30.0  # of work that is sooner made again than a checkpoint written at a stop
STOP_SECONDS = 60.0  # for the step at hand and its checkpoint, where a stop was asked for; a second one waits for nothing
KEPT = 2  # the newest, and the one before it, where the disk has damaged that one


class Found(NamedTuple):
    """The newest checkpoint that is whole, None where there is none, and why newer ones are not."""

    folder: Path | None
    ignored: tuple[str, ...] = ()


def steps(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints of an update, the newest first, whole or not."""
    named = ((re.fullmatch(r"step-([0-9]{6,})", path.name), path) for path in folder.glob("step-*"))
    return sorted(((int(found[1]), path) for found, path in named if found), reverse=True)


def newest(folder: Path, key: str) -> Found:
    """Return the newest checkpoint of the update `key` whose seal and every hash hold."""
    ignored: list[str] = []
    for step, path in steps(folder):
        if not (wrong := problem(path, key)):
            return Found(path, tuple(ignored))
        ignored.append(f"the checkpoint at step {step} was ignored: {wrong}")
    return Found(None, tuple(ignored))


def problem(folder: Path, key: str) -> str:
    """Return why a checkpoint does not count, or ''."""
    try:
        seal = json.loads((folder / SEAL).read_text("utf-8"))
    except (OSError, ValueError):
        return "its seal is missing, or damaged"
    if not isinstance(seal, dict) or not digest.intact(seal):
        return "its seal was changed after it was written"
    if seal["key"] != key:
        return "it is of another update"
    return "; ".join(storage.damaged(seal["files"], folder, rehash=True)[:1])


def seal(draft: Path, folder: Path, key: str, step: int, files: Mapping[str, Mapping[str, Any]]) -> Path:
    """Give a finished draft its seal and then its name; older ones than KEPT go."""
    record = digest.with_self_digest({"key": key, "step": step, "files": files})
    (draft / SEAL).write_bytes(storage.json_text(record))
    target = folder / f"step-{step:06d}"
    if target.exists():  # it was ignored, or this very step would not have been made again
        storage.remove(target)
    storage.adopt(draft, target)
    found = steps(folder)
    ignored = [path for at, path in found if at > step]  # else the update would have gone on from there
    for path in [*ignored, *[path for at, path in found if at <= step][KEPT:]]:
        storage.remove(path)
    return target


def fresh_draft(folder: Path) -> Path:
    """Return an empty draft; what a kill left of another one goes."""
    forget_draft(folder)
    (folder / DRAFT).mkdir(parents=True)
    return folder / DRAFT


def forget_draft(folder: Path) -> None:
    shutil.rmtree(folder / DRAFT, ignore_errors=True)


def entries(paths: Sequence[Path]) -> dict[str, Any]:
    """Return {name: bytes and hash} of files that this process wrote into one folder."""
    return {name: dict(entry) for path in paths for name, entry in storage.file_hashes([path], path.parent).items()}
