"""Checkpoints that `keep: {as: bf16}` left rounded: making such a copy, and finding which of the two lies on disk.

The copy is made first, then the record of it, then the checkpoint is taken away: a kill in between leaves what the next time begins with
or ends with. A step's commit goes on naming the checkpoint as it was committed; what an engine in bfloat16 loads of both is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from selfkd.chain import records
from selfkd.chain.paths import Paths, RoundPaths
from selfkd.chain.records import Rounded, RoundedEntry
from selfkd.core import digest, storage
from selfkd.core.pool import Model
from selfkd.core.rounding import round_folder
from selfkd.errors import ChainError

SUFFIX = "-bf16"  # of the folder of a copy


def copies(names: RoundPaths) -> dict[str, RoundedEntry]:
    """Return {committed checkpoint: its copy} of a round, whether or not either is still there."""
    return {path: entry for one in names.rounded() for path, entry in records.read(one, Rounded).models.items()}


def copy_of(folder: Path, path: str) -> RoundedEntry | None:
    """Return the copy in whose favour a checkpoint of the run in `folder` was taken away; None where it is whole, or all of it is gone."""
    names = Paths(folder).round_of(path)
    entry = copies(names).get(path) if names else None
    return entry if entry and (folder / entry.path).is_dir() and not (folder / path).exists() else None


def located(folder: Path, model: Model) -> Model:
    """Return a model of the run in `folder` with the path at which it lies, still relative; its digest is the one that was committed."""
    copy = copy_of(folder, model.path)
    return replace(model, path=copy.path) if copy else model


def refuse_rounded(folder: Path, model: Model) -> None:
    """Raise ChainError where an update would begin from weights that are only there in bf16, or be held against them."""
    if copy_of(folder, model.path):
        what = f"of {model.path} only a copy in bf16 is left (`keep: {{as: bf16}}`), and an update needs the fp32 weights"
        fix = "Train from the newest weights or from base: `from: now`, `from: base`; `reference: start`.   Or restore the folder from a copy."
        raise ChainError(what, folder.name, fix)


def make(paths: Paths, committed: list[str]) -> None:
    """Replace checkpoints of one round by copies in bf16; what an earlier attempt has done of it is taken as it is.

    Call it under the lease, with checkpoints that were found to be as they were committed.
    """
    names = paths.round_of(committed[0])
    assert names
    known = copies(names)
    fresh = {path: _copied(paths, path) for path in committed if not _is_whole(paths, known.get(path))}
    if fresh:
        records.write(names.next_rounded(), Rounded(models=fresh), paths.tmp)
    for path in committed:
        storage.remove(paths.folder / path)


def _is_whole(paths: Paths, entry: RoundedEntry | None) -> bool:
    return entry is not None and not storage.damaged(entry.files, paths.folder, rehash=True)


def _copied(paths: Paths, path: str) -> RoundedEntry:
    """Write the copy of a checkpoint beside it; one that lies there without a record may be torn, and is written anew."""
    draft, target = storage.temporary(paths.tmp, SUFFIX), paths.folder / f"{path}{SUFFIX}"
    storage.written(draft, lambda: round_folder(paths.folder / path, draft))
    if target.exists():
        storage.remove(target)
    storage.adopt(draft, target)
    found, hashes = digest.weights_and_files(target)
    files = storage.file_hashes(storage.files_in(target), paths.folder, hashes)
    return RoundedEntry(path=paths.relative(target), digest=found, files=files)


def gone(folder: Path, entries: Mapping[str, RoundedEntry]) -> set[str]:
    """Return the checkpoints among these that were taken away in favour of their copies."""
    return {path for path in entries if not (folder / path).exists()}
