"""Rows and updates of a tiny model, as the tests of the trainer make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfkd.backend.base import Trained, TrainSpec, nobody_listens
from selfkd.core.pool import Model, shape

FAST = {"learning_rate": 2e-3}
UNEVEN = {"learning_rate": 2e-3, "per_device_train_batch_size": 4, "num_train_epochs": 2}


class Enough(Exception):
    """Raised by `stopped_at`."""


def stopped_at(step: int) -> Callable[[Any], None]:
    """Ends an update from within, on the rank that is told; the others are ended with their group."""

    def at(progress: Any) -> None:
        if progress["step"] >= step:
            raise Enough

    return at


def write_rows(folder: Path, count: int = 12, **changes: Any) -> list[Path]:
    """Small sums of different lengths; `changes` replaces columns of every row."""
    rows = [
        {
            "id": f"row-{number:02}",
            "weight": 1.0,
            "messages": [{"role": "user", "content": f"{number} + 1 = ?"}],
            **{"chosen": f"Answer: {number + 1}", "chosen_ended": True},
            **{"rejected": "I do not know." * (1 + number % 3), "rejected_ended": True},
            **changes,
        }
        for number in range(count)
    ]
    shape("rows", rows).write_parquet(folder / "rows.parquet")
    return [folder / "rows.parquet"]


def update(start: Model, rows: list[Path], out: Path, /, loss: str = "sft", **more: Any) -> Trained:
    from selfkd.backend.trainer.update import train_rank

    reference = more.pop("reference", start if loss == "dpo" else None)
    on_progress, numerics = more.pop("on_progress", nobody_listens), more.pop("numerics", {})
    spec = TrainSpec(**{"loss": loss, "seed": 2**40 + 7, "trl": FAST, **more})
    return train_rank(start, reference, rows, spec, out, {"threads": 1, **numerics}, on_progress)
