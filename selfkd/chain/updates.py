"""An update in progress: what names it, and where its checkpoints lie until its step is committed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import polars as pl

from selfkd.backend.base import Saves, TrainSpec
from selfkd.backend.trainer.sealed import STOP
from selfkd.chain.paths import Paths
from selfkd.core import digest, number_format, storage
from selfkd.core.pool import KEYS, Model

APART = (
    "keeps_state",
    "until",
    "sampled",
)  # what an update leaves beside the model, in which pieces it is made, and what is told of it
OF_FUNCTIONS = ("function", "rows", "average", "divergence")  # fields of a TrainSpec that only such losses have


def key(
    start: Model, reference: Model | None, rows: pl.DataFrame, spec: TrainSpec, numerics: Mapping[str, Any], check: Any = None
) -> str:
    """Return the name of an update: all that decides its numbers but for rounding, so that other ranks may go on with it.

    `check` is how it is measured on its way, which decides where it ends, and whether what it leaves on its way has states.
    """
    words = {
        name: value
        for name, value in asdict(replace(spec, saves=None, state=None, function=None)).items()
        if name not in (*APART, *OF_FUNCTIONS)
    }
    if spec.lora and not spec.lora.quantise:
        del words["lora"]["quantise"]  # updates that leave weights as they are keep their names
    words["state"] = spec.state and spec.state.digest
    words |= _of_function(spec)
    words["precision"] = number_format.of_training(spec.precision, numerics)
    asked = digest.as_json([words, dict(numerics.get("trainer", {}))])
    models = (start.digest, reference.digest if reference else None)
    return digest.of("update", models, digest.table(rows, KEYS["rows"]), asked, *([check] if check else []))


def _of_function(spec: TrainSpec) -> dict[str, Any]:
    """Return what a loss that is a function is; nothing of one that TRL computes, whose updates keep their names."""
    if spec.function is None:
        return {}
    code = [spec.function.digest, spec.function.name, dict(spec.function.params)]
    taught = {"divergence": asdict(spec.divergence)} if spec.divergence else {}
    return {"function": code, "rows": spec.rows, "average": spec.average, **taught}


def saves(paths: Paths, name: str, minutes: float) -> Saves:
    """Return where the update of this name keeps its checkpoints. A stop that an earlier attempt was asked for is over."""
    folder = storage.make_folder(paths.update(name)).absolute()
    (folder / STOP).unlink(missing_ok=True)
    return Saves(folder, name, minutes)


def clear(paths: Paths) -> None:
    """Take away what updates went on from: their steps are committed. What a kill leaves goes the next time; it has lost a file, or its seal."""
    shutil.rmtree(paths.updates, ignore_errors=True)
