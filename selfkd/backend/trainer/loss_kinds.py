"""What a loss is: the rows it learns from, whether it has a reference model, and which of TRL's configs and trainers it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LossKind:
    """`rows`: kind of rows it learns from. `reference`: held against a reference model. `config`: TRL's config class, whose options
    pass through. `trainer`: class of trainer/losses.py. `sequences` per row. `fields` of the train step that only such losses have."""

    rows: Literal["sft", "pair"]
    reference: bool
    config: str
    trainer: str
    learning_rate: float
    sequences: int
    fields: tuple[str, ...]
    text: str


LOSSES: dict[str, LossKind] = {
    "sft": LossKind("sft", False, "SFTConfig", "Supervised", 1e-5, 1, (), "negative log-likelihood of completions"),
    "dpo": LossKind("pair", True, "DPOConfig", "Preference", 5e-7, 2, ("reference", "beta", "nll"), "a preference loss of TRL"),
}
