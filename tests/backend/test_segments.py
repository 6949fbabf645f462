"""An update made in segments, each of which hands out its model, is bit for bit the update made in one piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from tiny import as_model, tiny_model
from updates import update, write_rows

from selfkd.backend.base import LoraSpec, Saves, Trained
from selfkd.backend.trainer import resume, sealed
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import StorageError

# 9 rows in steps of 2, 2 epochs: 10 steps, on a schedule that knows its end.
CURVED = {
    **{"learning_rate": 2e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_train_epochs": 2},
    **{"lr_scheduler_type": "cosine", "warmup_steps": 2},
}
WAYS: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"loss": "dpo"},
    "lora": {"lora": LoraSpec(r=2, alpha=4.0)},
    "state": {"keeps_state": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segments")
    tiny_model(folder / "tiny")
    write_rows(folder, 9)
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> Model:
    return as_model(folder / "tiny")


def never(folder: Path) -> Saves:
    """No checkpoints but those that a segment ends with."""
    return Saves(folder, "this update", 0)


def segment(start: Model, folder: Path, place: Path, until: int, **more: Any) -> Trained:
    options = {"trl": CURVED, "saves": never(place / "update"), "until": until, **more}
    return update(start, [folder / "rows.parquet"], place / f"until-{until}", **options)


@pytest.mark.parametrize("way", WAYS)
def test_segments_hand_out_the_model_on_the_way_and_end_on_the_bits_of_one_piece(start, folder, tmp_path, way):
    more = WAYS[way]
    whole = update(start, [folder / "rows.parquet"], tmp_path / "whole", trl=CURVED, **more)
    made = [segment(start, folder, tmp_path, until, **more) for until in (4, 8, 12)]
    assert [(one.metrics["steps"], one.whole) for one in made] == [(4, False), (8, False), (10, True)]
    digests = [digest.weights(one.folder) for one in made]
    assert len(set(digests)) == 3 and digests[-1] == digest.weights(whole.folder)
    assert "continued_at" not in made[-1].metrics  # nothing was interrupted
    for name in ("steps", "epochs", "tokens", "loss_first", "loss_last", "loss_mean", "grad_norm_max", "update_norm"):
        assert made[-1].metrics[name] == whole.metrics[name], name
    assert [step for step, _ in sealed.steps(tmp_path / "update")] == [8, 4]
    if more.get("keeps_state"):
        assert made[-1].state and whole.state
        assert {path.name: path.read_bytes() for path in made[-1].state.iterdir()} == {
            path.name: path.read_bytes() for path in whole.state.iterdir()
        }


@pytest.mark.parametrize("way", WAYS)
def test_a_segment_that_was_sealed_and_killed_before_its_model_was_there_is_put_back_without_a_step(
    start, folder, tmp_path, way
):
    first = segment(start, folder, tmp_path, 4, **WAYS[way])
    told: list[Any] = []
    saves = never(tmp_path / "update")
    second = segment(start, folder, tmp_path / "again", 4, **WAYS[way], saves=saves, on_progress=told.append)
    assert digest.weights(second.folder) == digest.weights(first.folder)
    assert [one["step"] for one in told if "computers" not in one] == []  # it says who made them, and makes none
    assert second.metrics["steps"] == 4 and not second.whole and (first.of, second.of) == (10, 10)
    assert second.metrics["loss_last"] == first.metrics["loss_last"]
    if first.state and second.state:
        names = sorted(path.name for path in first.state.iterdir())
        assert all((first.state / name).read_bytes() == (second.state / name).read_bytes() for name in names)


def test_the_model_on_the_way_is_that_of_an_update_of_so_many_steps(start, folder, tmp_path):
    flat = {**CURVED, "lr_scheduler_type": "constant", "warmup_steps": 0}
    four = update(start, [folder / "rows.parquet"], tmp_path / "four", trl={**flat, "max_steps": 4})
    assert digest.weights(segment(start, folder, tmp_path, 4, trl=flat).folder) == digest.weights(four.folder)


def test_an_interruption_inside_a_segment_is_said_and_the_end_of_one_is_not(start, folder, tmp_path):
    segment(start, folder, tmp_path, 4)
    often = replace(never(tmp_path / "update"), minutes=1e-9)

    def enough(progress: Any) -> None:
        if progress["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(start, folder, tmp_path, 8, saves=often, on_progress=enough)
    told: list[Any] = []
    done = segment(start, folder, tmp_path, 8, on_progress=told.append)
    assert [one["said"] for one in told if "said" in one] == ["train continues at step 6 of 10, from its checkpoint"]
    assert done.metrics["continued_at"] == [6]
    last = segment(start, folder, tmp_path, 12)
    assert digest.weights(last.folder) == digest.weights(
        update(start, [folder / "rows.parquet"], tmp_path / "whole", trl=CURVED).folder
    )


def test_a_checkpoint_that_a_check_needs_and_that_cannot_be_written_ends_the_update_in_words(
    start, folder, tmp_path, monkeypatch
):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "write", full)
    with pytest.raises(StorageError, match="the checkpoint at step 4, from which the update goes on behind its check"):
        segment(start, folder, tmp_path, 4)


def together(rank: int, join: Callable[[], None], start: Model, folder: Path, place: Path) -> None:
    """One of two ranks: an update whole, and in three segments; plain and divided."""
    join()
    for shard in (False, True):
        own, rows = place / str(shard), [folder / "rows.parquet"]
        more: dict[str, Any] = {"trl": CURVED, "numerics": {"shard": shard}}
        update(start, rows, own / "whole", **more)
        for until in (4, 8, 12):
            segment(start, folder, own, until, **more)


def test_two_ranks_end_on_the_bits_of_one_piece_plain_and_divided(start, folder, tmp_path):
    on_ranks(2, together, start, folder, tmp_path)
    for shard in ("False", "True"):
        assert digest.weights(tmp_path / shard / "until-12") == digest.weights(tmp_path / shard / "whole")
        assert len({digest.weights(tmp_path / shard / f"until-{until}") for until in (4, 8, 12)}) == 3
