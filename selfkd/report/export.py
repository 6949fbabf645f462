"""A model out of a run: a folder that transformers, vLLM or PEFT open, with a card that says where it comes from.

What is written was hashed against its commit first. The folder gets its name when all of it is there: a kill leaves none.
"""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfkd.backend import adapters
from selfkd.backend.merged import merge
from selfkd.chain import rounded
from selfkd.chain.run import Run
from selfkd.core import digest, storage
from selfkd.core.pool import Model
from selfkd.core.rounding import round_folder
from selfkd.errors import UsageError
from selfkd.report import model_card

Dtype = Literal["bf16", "fp32"]
OWN = "probe.json"  # what only a run reads of a checkpoint: the answers by which a swap of weights is proved
BENEATH = "base"  # the folder, in that of an adapter, of the weights that it changes


@dataclass(frozen=True)
class Exported:
    """A written folder: which model it holds, of which round, in which format, and how many bytes."""

    folder: Path
    reference: str
    model: Model
    dtype: Dtype
    merged: bool
    bytes: int


def default_reference(run: Run) -> str:
    """Return the model that a run is about: the best round's where its recipe says which is best, else the newest."""
    role = next(iter(run.head()), "policy")
    return f"{role}@best" if run.recipe.best else role


def measured_format(run: Run) -> Dtype:
    """Return the format in which engines served the run's models: the figures of its table are of that."""
    return "bf16" if run.numerics.get("dtype") == "bfloat16" else "fp32"


def export(run: Run, out: Path, reference: str = "", dtype: Dtype | None = None, merged: bool = False) -> Exported:
    """Write the model that `role@when` names into the folder `out`, with its card.

    `merged` makes full weights of an adapter. UsageError where `out` holds something, or where only a copy in bf16 is left and fp32 is
    asked for; ChainError where the run has no such model, or its weights are not what was committed.
    """
    reference, dtype = reference or default_reference(run), dtype or measured_format(run)
    _refuse_taken(out)
    run.model(reference)  # says what to do where retention took it away
    named = run.named(reference)
    if dtype == "fp32" and rounded.copy_of(run.folder, named.path):
        what = f"of {reference} only a copy in bf16 is left (`keep: {{as: bf16}}`)"
        raise UsageError(what, "--dtype fp32", "Export it in bf16: --dtype bf16")
    model = run.trust.weights(named)
    adapter = model.kind == "adapter" and not merged
    draft = out.absolute().parent / f".{out.name}-{secrets.token_hex(4)}"
    try:
        (_write_adapter if adapter else _write_full)(model, draft, dtype)
        for path in draft.rglob(OWN):
            path.unlink()
        card = model_card.text(run, reference, named, dtype, BENEATH if adapter else "")
        (draft / "README.md").write_text(card, "utf-8")
        _refuse_taken(out)
        if out.is_dir():
            out.rmdir()
        storage.adopt(draft, out.absolute())
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    size = sum(path.stat().st_size for path in storage.files_in(out))
    return Exported(out, reference, named, dtype, merged and model.kind == "adapter", size)


def _refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("is there already, and is not empty", str(out), "Name a new folder, or take that one away.")


def _write_full(model: Model, out: Path, dtype: Dtype) -> None:
    """Write full weights: a copy of the checkpoint, or an adapter with what lies beneath it."""
    if model.kind == "full":
        _cast(Path(model.path), out, dtype)
        return
    assert model.base
    whole = out.with_name(f"{out.name}-fp32")
    try:
        merge(Path(model.path), Path(model.base), whole)
        _cast(whole, out, dtype, move=True)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def _write_adapter(model: Model, out: Path, dtype: Dtype) -> None:
    """Write an adapter as PEFT reads it, and beneath it the very weights that it was trained over: a hub's may lie elsewhere."""
    assert model.base
    shutil.copytree(model.path, out, ignore=shutil.ignore_patterns(digest.ADAPTER))
    words = json.loads((out / adapters.WORDS).read_text("utf-8"))
    (out / adapters.WORDS).write_text(json.dumps({**words, "base_model_name_or_path": BENEATH}, indent=2) + "\n", "utf-8")
    _cast(Path(model.base), out / BENEATH, dtype)


def _cast(folder: Path, out: Path, dtype: Dtype, move: bool = False) -> None:
    if dtype == "bf16":
        round_folder(folder, out)
    elif move:
        folder.rename(out)
    else:
        shutil.copytree(folder, out)
