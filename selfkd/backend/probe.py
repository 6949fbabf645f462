"""Evidence for a weight swap: a handful of token sequences on which parent and child differ, and how to judge an engine by it.

Whoever makes a model writes `probe.json` beside it; whoever serves the model scores the same sequences and compares. Knows
neither vLLM nor TRL, and touches torch only through the model it is handed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from selfkd.core import digest
from selfkd.errors import WeightsError

NAME = "probe.json"
LENGTH = 40  # tokens; a swap scores six such sequences twice, which is half of its time (SmolLM2-135M, one CPU thread)
SHORTEST = 8
# How far an engine may lie from transformers in fp32, as root mean square over the probe's tokens. Set from measurement, see
# the table in tests/test_engine.py: about ten times what was seen, and far below what any wrong tensor does.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}
UNSURE = 0.25  # a standard error of `survived` above which half an update is under two of them
INDISTINGUISHABLE = "parent and child cannot be told apart"


def candidate_sequences(tok: Any, rows_ids: Iterable[Sequence[int]], limit: int = 12) -> list[list[int]]:
    """At most `limit` distinct sequences of at most LENGTH tokens, spread over the rows: the end of each, where the answer is.

    A BOS at the start of the row is kept, for models that lean on it. The default limit costs one forward pass of some 500 tokens.
    """
    windows: dict[tuple[int, ...], None] = {}
    for ids in rows_ids:
        head = list(ids[:1]) if len(ids) > LENGTH and ids[0] == tok.bos_token_id else []
        window = tuple(head + list(ids[-(LENGTH - len(head)) :]))
        if len(window) >= SHORTEST:
            windows[window] = None
    found = list(windows)
    step = max(1, len(found) // limit)
    return [list(window) for window in found[::step][:limit]]


def token_logprobs(model: Any, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of each token but the first, given those before it, by a torch model in evaluation mode, in fp32.

    One padded batch: under causal attention what follows a token cannot change it.
    """
    import torch

    if not sequences:
        return []
    width = max(map(len, sequences))
    device = next(model.parameters()).device
    ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences], device=device)
    mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences], device=device)
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        picked = torch.log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0].cpu()
    model.train(training)
    return [row[: len(sequence) - 1].tolist() for row, sequence in zip(picked, sequences, strict=True)]


def write_probe(
    folder: Path,
    sequences: Sequence[Sequence[int]],
    child: Sequence[Sequence[float]],
    parent: Sequence[Sequence[float]] | None,
    parent_digest: str | None,
    keep: int = 6,
) -> Path:
    """Write `probe.json`, keeping the `keep` sequences on which parent and child differ most (the first ones for a root)."""
    order = list(range(len(sequences)))
    if parent is not None:
        order.sort(key=lambda i: -float(np.square(np.subtract(child[i], parent[i])).sum()))
    entries = [
        {
            "ids": [int(token) for token in sequences[i]],
            "start": len(sequences[i]) - len(child[i]),
            "parent": None if parent is None else [round(float(value), 7) for value in parent[i]],
            "child": [round(float(value), 7) for value in child[i]],
        }
        for i in sorted(order[:keep])
    ]
    path = folder / NAME
    path.write_text(json.dumps({"parent": parent_digest, "sequences": entries}, allow_nan=False))
    return path


@dataclass(frozen=True)
class Probe:
    """`probe.json` as arrays over all scored tokens. `before` is None for the root of a chain."""

    parent: str | None
    ids: list[list[int]]
    starts: list[int]
    child: np.ndarray
    before: np.ndarray | None

    @property
    def digest(self) -> str:
        return digest.of(self.ids, self.starts)


def read_probe(folder: Path) -> Probe:
    path = folder / NAME
    if not path.is_file():
        fix = "A model made by selfkd has this file: make the model again with the step that made it."
        raise WeightsError("the folder has no probe.json, so no swap to it can be proved", str(path), fix)
    content = json.loads(path.read_text("utf-8"))
    entries = content["sequences"]
    before = None if content["parent"] is None else np.concatenate([entry["parent"] for entry in entries])
    return Probe(
        content["parent"],
        [entry["ids"] for entry in entries],
        [entry["start"] for entry in entries],
        np.concatenate([entry["child"] for entry in entries]),
        before,
    )


@dataclass(frozen=True)
class Verdict:
    """proved: True, or the reason why not. survived: the share of the update that the engine sees; None for a root."""

    proved: bool | str
    survived: float | None
    distance: float
    wrong: str = ""

    def notes(self) -> dict[str, Any]:
        return {"proved": self.proved, "survived": self.survived, "distance": self.distance}


@dataclass(frozen=True)
class Scored:
    """An engine's log-probabilities on a probe, before and after a swap. `before` is None where it held no weights."""

    after: np.ndarray
    before: np.ndarray | None
    held_parent: bool


def judge(probe: Probe, scored: Scored, dtype: str) -> Verdict:
    """What an engine's scores prove.

    Proved: nearer to the child than half of what separates child and parent, and in fp32 within TOLERANCE as well. An engine
    in 16 bits rounds more than a small update moves, so there the update is also looked for along its own direction, where
    the rounding of hundreds of tokens averages out (`survived`). An engine that moved, but that way by less than half, holds
    the child's rounded weights (the bf16 dead zone): not wrong, not proved, and `survived` says how much is left.
    """
    distance = _rms(scored.after - probe.child)
    update = None if probe.before is None else probe.child - probe.before
    size = 0.0 if update is None else _rms(update)
    limit = TOLERANCE[dtype] + (0.0 if dtype == "float32" else size)
    if not distance <= limit:  # not (a > b): NaN fails too
        return Verdict(
            False, None, distance, f"its log-probabilities lie {distance:.3g} from the checkpoint's, limit {limit:.3g}"
        )
    if update is None:
        return Verdict(True, None, distance)
    if size == 0.0:
        return Verdict(INDISTINGUISHABLE, None, distance)
    start = scored.before if scored.before is not None and scored.held_parent else probe.before
    moved = scored.after - start
    survived = float(moved @ update / (update @ update))
    rest = _rms(moved - survived * update)
    error = rest / size / np.sqrt(max(1, len(update) - 1))  # of `survived`, from what moved across the update's direction
    still = scored.before is not None and _rms(scored.after - scored.before) < TOLERANCE[dtype] / 50
    along = dtype != "float32" and not still and survived >= 0.5 and error < UNSURE and rest <= TOLERANCE[dtype]
    if distance < size / 2 or along:
        return Verdict(True, survived, distance)
    if error >= UNSURE or (still and size < TOLERANCE[dtype] / 50):
        return Verdict(INDISTINGUISHABLE, survived, distance)
    return _unproved(still, distance, size, survived, dtype)


def _unproved(still: bool, distance: float, size: float, survived: float, dtype: str) -> Verdict:
    """Lost in the cast, or wrong: old weights answer exactly as before, rounded new ones do not."""
    if dtype == "float32":
        return Verdict(
            False, survived, distance, f"it lies {distance:.3g} from the child, which lies {size:.3g} from its parent"
        )
    if not still:
        return Verdict(f"only {max(survived, 0):.0%} of the update is visible in {dtype}", survived, distance)
    why = "the old weights are still there, or all of the update was lost in the cast (dither the root, or use dtype float32)"
    return Verdict(False, survived, distance, f"it answers exactly like before the swap: {why}")


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
