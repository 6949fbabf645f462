"""A fake backend whose models hold tensors: what retention rounds, links and removes is there, and torch is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from selfkd.backend.base import Questions, Trained
from selfkd.backend.fake import Fake
from selfkd.core import digest

ROWS, COLUMNS = 64, 128


class Weighty(Fake):
    """Beside the fake's own file it writes one fp32 matrix, whose numbers follow from that file."""

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        notes = super().load(source, out, dither, asked)
        add_tensors(out)
        return notes

    def train(self, *arguments: Any, **more: Any) -> Trained:
        trained = super().train(*arguments, **more)
        add_tensors(trained.folder)
        return trained


def add_tensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    made = np.random.default_rng(digest.seed((folder / "weights.json").read_text()))
    save_file({"layer.weight": made.standard_normal((ROWS, COLUMNS), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "float32"}))
