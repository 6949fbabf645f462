"""How far the trainer's log-probabilities lie from those of the engine that sampled: of trained tokens, before anything is learned.

They are those of the first optimiser step's own forward passes, so they cost nothing; engine and trainer have the same weights there, and
both sides are log-probabilities at temperature 1, before any cut of the distribution. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from selfkd.backend.base import TrainSpec
from selfkd.backend.probe import Apart
from selfkd.backend.trainer.batches import Ids, Row
from selfkd.backend.trainer.together import gathered

DROPOUT = "the model learns with dropout, so its log-probabilities are not those of its weights"
FOUR_BITS = "the model learns over weights in 4 bits, and the engine serves them whole"
NONE_MET = "no row of the first optimiser step was sampled by the engine"
LOGGED = "engine_apart_"  # how the entry of the first step in the trainer's log begins

Known = dict[
    bytes, tuple[int, np.ndarray]
]  # {ids of prompt and answer: (where the answer begins, log-probabilities of its first tokens)}


class Agreement:
    """What the engine said of the rows of an update, and what the trainer says of the same tokens in the first step."""

    def __init__(self, known: Known, why: str = "") -> None:
        self.known, self.why, self.found = known, why, dict[bytes, np.ndarray]()

    @classmethod
    def of(cls, rows: Sequence[Row], spec: TrainSpec, model: Any) -> Agreement | None:
        """Return what is known of these rows; None where nobody asks."""
        if spec.sampled is None:
            return None
        if spec.lora and spec.lora.quantise:
            return cls({}, FOUR_BITS)
        return cls({}, DROPOUT) if drops_out(model) else cls(known_of(rows, spec.sampled))

    def hear(self, batch: Mapping[str, torch.Tensor], logps: torch.Tensor) -> None:
        """Compare a micro-batch, padded on either side; `logps` has that of each token at the place before it."""
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        places, lengths = mask.long().argmax(1).tolist(), mask.sum(1).tolist()
        for line, (first, length) in enumerate(zip(places, lengths, strict=True)):
            name = ids[line, first : first + length].cpu().numpy().astype(np.int32).tobytes()
            if name in self.known and name not in self.found:
                start, engine = self.known[name]
                there = slice(first + start, first + start + len(engine))
                learned = (labels[line, there] != -100).cpu().numpy()
                trainer = logps[line, there.start - 1 : there.stop - 1].detach().float().cpu().numpy()
                self.found[name] = np.abs(engine - trainer)[learned]

    def logged(self, ranks: int) -> dict[str, float]:
        """Return what all ranks found as entries of the log; all call it, behind the first step."""
        told: dict[bytes, np.ndarray] = {}
        for part in gathered(self.found, ranks):
            told |= part
        values = np.concatenate([told[name] for name in sorted(told)]) if told else np.zeros(0)
        self.known = {}
        return {f"{LOGGED}{name}": value for name, value in Apart.of(values).to_json().items()} if len(values) else {}


def known_of(rows: Sequence[Row], path: Path) -> Known:
    """Return what the engine said of answers that are learned as they were drawn, token by token; a row may teach a part of one."""
    said: dict[str, list[tuple[Ids, np.ndarray]]] = {}
    for row, ids, values in pl.read_parquet(path).iter_rows():
        said.setdefault(row, []).append((np.array(ids, np.int32), np.array(values, np.float32)))
    found: Known = {}
    for row in rows:
        for answer in row.answers:
            for ids, values in said.get(row.id, ()):
                count = min(len(ids), len(answer))
                whole = count == len(ids) or row.first
                if whole and np.array_equal(ids[:count], answer[:count]):
                    name = np.concatenate([row.prompt, answer]).astype(np.int32).tobytes()
                    found.setdefault(name, (len(row.prompt), values[:count]))
    return found


def drops_out(model: Any) -> bool:
    """Whether parts of the model are left out by chance while it learns."""
    parts = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in model.modules())
    return parts or any(getattr(part, "attention_dropout", 0.0) for part in model.modules())


def figures(entry: Mapping[str, Any], own: Apart | None, agreement: Agreement | None) -> dict[str, Any]:
    """Return {engine_apart: what was found, with the trainer's own rounding}, or why there is no figure; nothing where nobody asks."""
    if agreement is None:
        return {}
    found = {name.removeprefix(LOGGED): value for name, value in entry.items() if name.startswith(LOGGED)}
    if not found:
        return {"engine_apart": {"why": agreement.why or NONE_MET}}
    return {"engine_apart": {**found, "tokens": int(found["tokens"]), **({"trainer": own.to_json()} if own else {})}}
