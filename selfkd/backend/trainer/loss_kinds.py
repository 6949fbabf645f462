"""What a loss is: one row of a table, read by the recipe's checks, the plan, the options of TRL and the trainer alike.

A new loss on rows or pairs is a new row here, as long as one of the trainers can compute it; a user's function (`file.py:function`) is
a row made on the spot. Knows neither torch nor TRL: classes are given by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# An adapter learns with ten times the rate of all weights, whatever the model and the method (Schulman et al. 2025, "LoRA Without Regret").
FASTER = 10
Rows = Literal["sft", "pair", "label"]


@dataclass(frozen=True)
class LossKind:
    """One loss, and everything about it that more than one module has to know."""

    rows: Rows
    """The kind of rows it learns from: an answer, a chosen one and a rejected one, or an answer with a label."""
    reference: bool
    """Whether it is held against the log-probabilities of a reference model."""
    config: str
    """TRL's config class, whose options it takes; they are listed in trl_options.PASSED."""
    trainer: str
    """The class in trainer.losses or trainer.rowwise that computes it."""
    learning_rate: float
    """The default, where neither the machine nor the step gives one."""
    sequences: int
    """Sequences that go through the model per row."""
    fields: tuple[str, ...]
    """Fields of the step `train` that only such losses have."""
    text: str
    """One line for the documents."""
    function: str = ""
    """What gives a row its value, as file.py:function; empty where TRL computes the loss."""
    ignores: tuple[str, ...] = ()
    """Options of that config which change nothing here."""

    def rate(self, lora: bool) -> float:
        """Return the default learning rate: for all weights, or for an adapter."""
        return self.learning_rate * (FASTER if lora else 1)


# Fields of the step `train` that losses of the form value-per-row have.
OF_FUNCTIONS = ("reference", "params", "average")

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

# ---- losses that are functions ----

# What a function may name, per kind of rows, beside the rows' columns and the step's `params`; a name that begins with ref_ is the
# reference model's.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "sft": ("logps", "mask", "ref_logps"),
    "pair": (
        *("chosen_logps", "rejected_logps", "chosen_mask", "rejected_mask"),
        *("ref_chosen_logps", "ref_rejected_logps"),
    ),
    "label": ("logps", "mask", "ref_logps", "label"),
}
LEARNED = {
    "sft": ("logps",),
    "pair": ("chosen_logps", "rejected_logps"),
    "label": ("logps",),
}  # without one, nothing is learned
WEIGHT = "weight"  # a row's weight multiplies its value in the trainer, and nowhere else


def is_function(loss: str) -> bool:
    """Whether a loss is named as a function of a file."""
    return ":" in loss


def kind_of(loss: str, rows: str | None = None, reference: bool = False) -> LossKind:
    """Return a loss of the table, or what a function of a file is: by its own words in the recipe, for nothing of it is read here."""
    if not is_function(loss):
        return LOSSES[loss]
    kind: Rows = "pair" if rows == "pair" else "label" if rows == "label" else "sft"
    return LossKind(
        rows=kind,
        reference=reference,
        config="SFTConfig",
        trainer="RowWise",
        learning_rate=1e-6,
        sequences=2 if kind == "pair" else 1,
        fields=("rows", *OF_FUNCTIONS),
        text="a function of a file",
        function=loss,
        ignores=("loss_type",),
    )
