"""How a model reads texts and writes none: what is asked of a classifier, a process reward model, or a model's own distribution.

Plain data, for steps and backends alike; what does the reading is engine/reader.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import polars as pl

from selfkd.core.pool import IDS, MESSAGES

READ_TOKENS = 4096  # of one forward pass, padding included; of a language model, whose logits are large, half as many
Kind = Literal["label", "pair", "steps", "entropy", "certainty"]
# What a reader is given of a text. `messages` and the answer `text` behind them; or, where they are null, `text` as it is, with `second`.
TEXTS: dict[str, Any] = {
    "id": pl.String,
    "messages": MESSAGES,
    "text": pl.String,
    "second": pl.String,
    "token_ids": IDS,
    "finish_reason": pl.String,
}
PART = 256  # texts of one call: the unit of progress, of redoing, and of what a batch is cut from
HEADS = {"ForSequenceClassification": "sequence", "ForTokenClassification": "tokens", "ForCausalLM": "words"}
NEEDED = {"label": ("sequence",), "pair": ("sequence",), "steps": ("tokens", "words")}

NO_STEPS = "the answer has no steps: it is empty"


class Read(NamedTuple):
    """What was read of the text `id`: one value, or one for each step; none where `why` says what kept it from being read."""

    id: str
    values: tuple[float, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Reading:
    """What is read. label: a class of the whole text; pair: whether the first of two texts is the better one; steps: a class behind each
    step; entropy, certainty: of the distributions from which an answer's tokens were drawn.

    `label` names a class, or counts it from 0; None is the only one there is. Steps end at `separator`, and behind each the model is shown
    `mark`, at whose last token its class is read; a language model says there which of the tokens `good` and `bad` it expects.
    `context`: most tokens, 0 as many as the model takes.
    """

    kind: Kind
    label: str | int | None = None
    separator: str = "\n"
    mark: str = "\n"
    good: str = ""
    bad: str = ""
    context: int = 0


def head_of(config: dict[str, Any]) -> str:
    """Return what a model's configuration says it gives: a class of a sequence, one of each token, or words; '' for anything else."""
    names = config.get("architectures") or [""]
    return next((kind for end, kind in HEADS.items() if str(names[0]).endswith(end)), "")


def classes_of(config: dict[str, Any]) -> list[str]:
    """Return the names of a model's classes, in their order."""
    named = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    count = int(config.get("num_labels") or len(named) or 2)
    return (
        [named.get(number, f"LABEL_{number}") for number in range(count)] if not named else [named[at] for at in sorted(named)]
    )


def class_of(label: str | int | None, classes: list[str]) -> int:
    """Return the number of a class; ValueError where no class is called so, or where there are several and none is named."""
    if label is None:
        if len(classes) == 1:
            return 0
        raise ValueError(
            f"the model has {len(classes)} classes, and none is named: write label. There are: {', '.join(classes)}"
        )
    if isinstance(label, int):
        if 0 <= label < len(classes):
            return label
        raise ValueError(f"no class {label}: the model has {len(classes)}, counted from 0: {', '.join(classes)}")
    found = [number for number, name in enumerate(classes) if name.casefold() == label.casefold()]
    if not found:
        raise ValueError(f"no class '{label}'. The model has: {', '.join(classes)}")
    return found[0]


def problem_of(reading: Reading, config: dict[str, Any]) -> tuple[str, str]:
    """Return (field, why) a model with this configuration cannot be read so; ('', '') where it can."""
    head, needed = head_of(config), NEEDED[reading.kind]
    if head not in needed:
        wanted = " or ".join(end for end, kind in HEADS.items() if kind in needed)
        return (
            "",
            f"it is a {(config.get('architectures') or ['model of no named kind'])[0]}, and this needs one that ends in {wanted}",
        )
    if head == "words":
        missing = [name for name in ("good", "bad") if not getattr(reading, name)]
        said = "a language model says by two tokens what it thinks of a step: write good and bad, such as good: '+', bad: '-'"
        return (missing[0], said) if missing else ("", "")
    if reading.good or reading.bad:
        return "good", "good and bad are words of a language model, and this one has classes: write label"
    try:
        class_of(reading.label, classes_of(config))
    except ValueError as error:
        return "label", str(error)
    return "", ""


def config_in(folder: Path) -> dict[str, Any]:
    """Return what the config.json of a folder says; {} where there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def parts_of(rows: pl.DataFrame) -> list[pl.DataFrame]:
    """Cut texts into parts, the same ones however many readers there are."""
    return list(rows.iter_slices(PART)) if rows.height else []
