"""A run whose model cannot fit ends before an engine starts, with the numbers; one that was begun goes by the model it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chains import RECIPE, write_prompts

from selfkd.backend.machine import Machine
from selfkd.chain import drive
from selfkd.chain.run import Run
from selfkd.core.accelerator import Accelerator, Card
from selfkd.errors import UsageError
from selfkd.recipe import fit
from selfkd.recipe.load import load
from selfkd.report import notebook

SIZES = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 128,
    "intermediate_size": 14337, "vocab_size": 32000,
}  # fmt: skip
GIB = 2**30


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Open a run on a machine with one card of 24 GiB; whatever would start there fails the test."""
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)
    Path("big").mkdir()
    Path("big/config.json").write_text(json.dumps(SIZES))
    Path("sums.yaml").write_text(RECIPE)
    card = Card("0", "RTX 4090", (8, 9), 24 * GIB, 24 * GIB)
    monkeypatch.setattr(fit, "accelerator", lambda: Accelerator("cuda", (card,)))
    monkeypatch.setattr(drive, "open_backend", lambda *_: pytest.fail("something was started"))

    def open_one(**machine) -> Run:
        words = {"dtype": "float32", "threads": 1, **machine}
        return Run.open(load("sums.yaml", ["model=big"]), tmp_path / "run", Machine(**words))

    return open_one


def test_a_model_that_is_too_large_is_refused_before_anything_starts(opened) -> None:
    with pytest.raises(UsageError, match=r"card 1, training: 6\.3 billion parameters need at least") as caught:
        notebook.run(opened().recipe, opened().folder, Machine(dtype="float32", threads=1))
    assert "and there are 24.0. What would fit: " in caught.value.what


def test_heads_that_do_not_divide_are_refused_before_anything_starts(opened) -> None:
    run = opened(tensor_parallel=2)
    with pytest.raises(
        UsageError, match=r"tensor_parallel: 2 does not divide this model \(9 attention heads, 3 for keys.*possible: 1, 3"
    ):
        drive.refuse_too_large(run)


def test_nothing_is_asked_of_a_backend_that_takes_no_memory_nor_of_a_model_that_is_not_known(opened) -> None:
    drive.refuse_too_large(opened(backend="fake"))
    Path("big/config.json").unlink()
    drive.refuse_too_large(opened(backend="fake"))
