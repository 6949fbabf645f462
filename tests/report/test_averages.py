"""An average whose commit names other checkpoints, other shares or other bits is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from selfkd.chain.records import Commit, ModelEntry
from selfkd.core import averaging, digest
from selfkd.report import averages


def folder_of(root: Path, name: str, value: float) -> str:
    (root / name).mkdir()
    save_file({"w": np.array([value, 1.0], np.float32)}, root / name / "model.safetensors")
    return name


@pytest.fixture
def committed(tmp_path) -> tuple[Path, Commit, dict[str, ModelEntry]]:
    shares = {"start": 0.9, "now": 0.1}
    paths = {"start": folder_of(tmp_path, "a", 2.0), "now": folder_of(tmp_path, "b", 4.0)}
    averaging.average([(tmp_path / paths[one], share) for one, share in shares.items()], tmp_path / "out")
    known = {path: ModelEntry(path=path, digest=digest.weights(tmp_path / path)) for path in (*paths.values(), "out")}
    made_of = [
        {"model": one, "path": paths[one], "digest": known[paths[one]].digest, "share": share} for one, share in shares.items()
    ]
    commit = Commit(
        format=2, round=1, number=3, step="average", verb="average", outside=False, key="", parent="",
        identity={"of": shares}, code={}, tables={}, models={"policy": known["out"]}, metrics={}, files={}, digest="",
        notes={"average": made_of},
    )  # fmt: skip
    return tmp_path, commit, known


def found(committed, commit: Commit | None = None, gone: tuple[str, ...] = ()) -> list[str]:
    folder, own, known = committed
    return list(averages.problems(folder, commit or own, known, gone))


def test_a_right_average_holds(committed):
    assert found(committed) == []


def test_other_bits_are_found_unless_what_they_were_made_of_is_gone(committed):
    folder = committed[0]
    save_file({"w": np.array([2.2000003, 1.0], np.float32)}, folder / "out" / "model.safetensors")
    assert found(committed) == ["the tensor w of 'policy' is not the average of the checkpoints that it names"]
    assert found(committed, gone=("b",)) == []


def test_other_shares_or_another_checkpoint_are_found(committed):
    _, commit, _ = committed
    first, second = commit.notes["average"]
    said = replace(commit, notes={"average": [first, {**second, "share": 0.2}]})
    assert found(committed, said) == ["it does not say of which checkpoints it is the average"]
    said = replace(commit, notes={"average": [first, {**second, "path": "a"}]})
    assert "another model was committed at a" in found(committed, said)[0]
    said = replace(commit, notes={"average": [first, {**second, "path": "nowhere"}]})
    assert found(committed, said) == ["it says that 'now' lay at nowhere, where no model was committed"]


def test_a_checkpoint_that_was_changed_since_is_found(committed):
    save_file({"w": np.array([9.0, 1.0], np.float32)}, committed[0] / "b" / "model.safetensors")
    assert found(committed) == ["b, of which it is an average, does not hold what it says"]
