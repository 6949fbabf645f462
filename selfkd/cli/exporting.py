"""What `selfkd export` does, from its arguments to an exit code. A docstring here is the text of `selfkd help export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from selfkd.chain.paths import find_run
from selfkd.cli.commands import RUNS
from selfkd.core.wording import counted
from selfkd.errors import UsageError

if TYPE_CHECKING:
    from selfkd.report.export import Dtype


def export(
    run: Path,
    folder: Path | None,
    model: str | None,
    index: int | None,
    dtype: Dtype | None,
    merge: bool,
    samples: Path | None,
    rows: Path | None,
    where: str | None,
) -> int:
    """Write a model of a run as a folder with a model card, or its samples or training rows as a table that TRL reads.

    The model is that of the best round where the recipe has `best`, else the newest one. It is written in the format in which it was measured.
    """
    from selfkd.chain.run import Run

    _refuse(folder, model, index, dtype, merge, samples, rows, where)
    opened = Run.at(find_run(run, RUNS))
    if folder is not None:
        _model(opened, folder, _reference(model, index), dtype, merge)
    from selfkd.report import trl_shape

    for path, read in ((samples, trl_shape.samples), (rows, trl_shape.rows)):
        if path is not None:
            trl_shape.refuse(path)
            found = read(opened, index, where)
            trl_shape.write(found, path)
            print(f"{path}   {counted(found.height, 'row')}: {', '.join(found.columns)}")
    return 0


def _refuse(
    folder: Path | None,
    model: str | None,
    index: int | None,
    dtype: str | None,
    merge: bool,
    samples: Path | None,
    rows: Path | None,
    where: str | None,
) -> None:
    """Raise UsageError where nothing is asked for, or where what is said of it belongs to something else."""
    tables = samples is not None or rows is not None
    if folder is None and not tables:
        raise UsageError("nothing to write", "selfkd export", "Name a folder for the model, or --samples FILE, or --rows FILE.")
    if folder is None and (model or dtype or merge):
        raise UsageError(
            "is of a model, and no folder for one is named", "--model, --dtype, --merge", "selfkd export RUN FOLDER"
        )
    if where and not tables:
        raise UsageError("chooses rows of a table", "--where", "Write --samples FILE or --rows FILE too.")
    if model and index is not None:
        raise UsageError(
            "names a model that --model names already", "--round", f"Write one of them: --model policy@round-{index}"
        )


def _reference(model: str | None, index: int | None) -> str:
    if index is None:
        return model or ""
    return "policy@base" if index == 0 else f"policy@round-{index}"


def _model(opened: object, folder: Path, reference: str, dtype: Dtype | None, merge: bool) -> None:
    from selfkd.chain.run import Run
    from selfkd.report.export import export as write

    assert isinstance(opened, Run)
    found = write(opened, folder, reference, dtype, merge)
    kind = "adapter" if found.model.kind == "adapter" and not found.merged else "weights"
    print(f"{folder}   {found.reference}, {kind} in {found.dtype}, {found.bytes / 1e9:.2f} GB, with README.md as its card")
    print(f"as committed: {found.model.digest[:16]}")
