"""What a loss is: one row of a table, read by the recipe's checks, the plan, the options of TRL and the trainer alike.

A new loss on rows or pairs is a new row here, as long as one of the two trainers can compute it. Knows neither torch nor TRL:
classes are given by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# An adapter learns with ten times the rate of all weights, whatever the model and the method (Schulman et al. 2025, "LoRA Without Regret").
FASTER = 10


@dataclass(frozen=True)
class LossKind:
    """One loss, and everything about it that more than one module has to know."""

    rows: Literal["sft", "pair"]
    """The kind of rows it learns from: an answer, or a chosen one and a rejected one."""
    reference: bool
    """Whether it is held against the log-probabilities of a reference model."""
    config: str
    """TRL's config class, whose options it takes; they are listed in trl_options.PASSED."""
    trainer: str
    """The class in trainer.losses that computes it."""
    learning_rate: float
    """The default, where neither the machine nor the step gives one."""
    sequences: int
    """Sequences that go through the model per row."""
    fields: tuple[str, ...]
    """Fields of the step `train` that only such losses have."""
    text: str
    """One line for the documents."""

    def rate(self, lora: bool) -> float:
        """Return the default learning rate: for all weights, or for an adapter."""
        return self.learning_rate * (FASTER if lora else 1)


# Learning rates: 1e-5 is usual for SFT of a whole model, 5e-7 is SPIN's and DPO's.
LOSSES: dict[str, LossKind] = {
    "sft": LossKind(
        rows="sft",
        reference=False,
        config="SFTConfig",
        trainer="Supervised",
        learning_rate=1e-5,
        sequences=1,
        fields=(),
        text="negative log-likelihood of completions, averaged over their tokens",
    ),
    "dpo": LossKind(
        rows="pair",
        reference=True,
        config="DPOConfig",
        trainer="Preference",
        learning_rate=5e-7,
        sequences=2,
        fields=("reference", "beta", "nll"),
        text="a preference loss of TRL, by default that of Rafailov et al. 2023 (arXiv 2305.18290)",
    ),
}
