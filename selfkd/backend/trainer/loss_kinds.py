"""What a loss is: one row of a table, read by the recipe's checks, the plan, the options of TRL and the trainer alike.

A new loss on rows or pairs is a new row here, as long as one of the trainers can compute it; a user's function (`file.py:function`) is
a row made on the spot. Knows neither torch nor TRL: classes are given by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

# An adapter learns with ten times the rate of all weights, whatever the model and the method (Schulman et al. 2025, "LoRA Without Regret").
FASTER = 10
DISTILLED = 1e-5  # the learning rate of losses that have a teacher
OWN = "a function of a file"
Rows = Literal["sft", "pair", "label", "rank", "kd"]


@dataclass(frozen=True)
class LossKind:
    """One loss, and everything about it that more than one module has to know."""

    rows: Rows
    """The kind of rows it learns from: an answer, a chosen one and a rejected one, an answer with a label, answers in their order, or an answer with the prompt of a teacher."""
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
    loss_type: str = ""
    """TRL's name of the loss, where the step's name of it says which one."""

    @property
    def teacher(self) -> bool:
        """Whether it is measured from a teacher at each token."""
        return self.rows == "kd"

    def rate(self, lora: bool) -> float:
        """Return the default learning rate: for all weights, or for an adapter."""
        return self.learning_rate * (FASTER if lora else 1)


# Fields of the step `train` that losses of the form value-per-row have.
OF_FUNCTIONS = ("reference", "params", "average")
OF_TEACHERS = ("teacher", "divergence")  # and of those whose rows have a teacher, in the place of a reference
PER_ROW = {"pair": 2, "rank": 4}  # sequences of a row, where it is not one; of a ranking as many as `build` takes unasked
# Losses of TRL's DPOTrainer that a step may name instead of dpo with `trl: {loss_type: ...}`.
PREFERENCES = (
    *("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
    *("discopop", "sigmoid_norm"),
)


def _function(
    function: str, rows: Rows, learning_rate: float, text: str, fields: tuple[str, ...], reference: bool = False
) -> LossKind:
    """Return a loss that is a function of log-probabilities, or of how far the model is from a teacher."""
    return LossKind(
        rows=rows,
        reference=reference,
        config="SFTConfig",
        trainer="Distilled" if rows == "kd" else "RowWise",
        learning_rate=learning_rate,
        sequences=PER_ROW.get(rows, 1),
        fields=fields,
        text=text,
        function=function,
        ignores=("loss_type",),
    )


def _shipped(file: str, rows: Rows, learning_rate: float, text: str, reference: bool = True) -> LossKind:
    """Return a shipped loss that is a function; it is called like its file."""
    fields = (*OF_FUNCTIONS[1:], *OF_TEACHERS) if rows == "kd" else OF_FUNCTIONS if reference else OF_FUNCTIONS[1:]
    return _function(f"loss/{file}.py:{file}", rows, learning_rate, text, fields, reference)


def _preference(loss_type: str = "") -> LossKind:
    return LossKind(
        rows="pair",
        reference=True,
        config="DPOConfig",
        trainer="Preference",
        learning_rate=5e-7,
        sequences=2,
        fields=("reference", "beta", "nll"),
        text="a preference loss of TRL, by default that of Rafailov et al. 2023 (arXiv 2305.18290)",
        ignores=("loss_type", "loss_weights") if loss_type else (),
        loss_type=loss_type,
    )


# Learning rates: 1e-5 is usual for SFT of a whole model and for distillation, 5e-7 is SPIN's, DPO's and SPPO's, 1e-6 NFT's and TRL's for KTO, 5e-6 PRO's.
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
    "dpo": _preference(),
    "kto": _shipped("kto", "label", 1e-6, "label rows, desirable or not (Ethayarajh et al. 2024, arXiv 2402.01306)"),
    "nft": _shipped(
        "nft",
        "label",
        1e-6,
        "label rows, right or wrong, with a column 'rate', the share of the prompt's answers that are right (Chen et al. 2025, arXiv 2505.18116)",
    ),
    "sppo": _shipped(
        "sppo",
        "pair",
        5e-7,
        "pair rows with columns 'chosen_win' and 'rejected_win', their chances to win (Wu et al. 2024, arXiv 2405.00675)",
    ),
    "cream": _shipped(
        "cream",
        "pair",
        5e-7,
        "pair rows with a column 'agreement', 0 to 1, that mixes DPO with DPO of the flipped pair (Wang et al. 2024, arXiv 2410.12735)",
    ),
    "rrhf": _shipped("rrhf", "rank", 1e-5, "rank rows (Yuan et al. 2023, arXiv 2304.05302)", reference=False),
    "pro": _shipped("pro", "rank", 5e-6, "rank rows (Song et al. 2023, arXiv 2306.17492)", reference=False),
    "kd": _shipped(
        "kd",
        "kd",
        DISTILLED,
        "kd rows, distance from a teacher's next-token distribution (Agarwal et al. 2023, arXiv 2306.13649)",
        reference=False,
    ),
    **{name: _preference(name) for name in PREFERENCES},
}


def texts() -> str:
    """Return what each loss is, in one line."""
    said = [f"{name}: {kind.text}" for name, kind in LOSSES.items() if not kind.loss_type]
    return "; ".join([*said, f"{', '.join(PREFERENCES)}: dpo with this `loss_type` of TRL"])


# ---- losses that are functions ----

# What a function may name, per kind of rows, beside the rows' columns and the step's `params`; a name that begins with ref_ is the
# reference model's.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "sft": ("logps", "mask", "ref_logps"),
    "pair": (
        *("chosen_logps", "rejected_logps", "chosen_mask", "rejected_mask"),
        *("ref_chosen_logps", "ref_rejected_logps"),
    ),
    "label": ("logps", "mask", "ref_logps", "label", "kl"),
    "rank": ("logps", "mask", "ref_logps", "scores"),
    "kd": ("divergence", "logps", "teacher_logps", "mask"),
}
KL = "kl"  # one number per step: how far the model is from its reference on answers that were given to other prompts
LEARNED = {
    "sft": ("logps",),
    "pair": ("chosen_logps", "rejected_logps"),
    "label": ("logps",),
    "rank": ("logps",),
    "kd": ("divergence", "logps"),
}  # without one, nothing is learned
OF_TOKENS = ("divergence", "teacher_logps")  # what else rows of kind kd have of each token
WEIGHT = "weight"  # a row's weight multiplies its value in the trainer, and nowhere else


def is_function(loss: str) -> bool:
    """Whether a loss is named as a function of a file."""
    return ":" in loss


def kind_of(loss: str, rows: str | None = None, reference: bool = False) -> LossKind:
    """Return a loss of the table, or what a function of a file is: by its own words in the recipe, for nothing of it is read here."""
    if not is_function(loss):
        return LOSSES[loss]
    kind: Rows = next((one for one in get_args(Rows) if one == rows), "sft")
    if kind == "kd":
        return _function(loss, kind, DISTILLED, OWN, ("rows", *OF_FUNCTIONS[1:], *OF_TEACHERS))
    return _function(loss, kind, 1e-6, OWN, ("rows", *OF_FUNCTIONS), reference)
