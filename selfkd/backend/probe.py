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

from selfkd import digest
from selfkd.errors import WeightsError

NAME = "probe.json"
LENGTH = 48  # tokens: 8 sequences are one prefill of under 400 tokens, half a second for SmolLM2-135M on one CPU thread
SHORTEST = 8
# How far an engine may lie from transformers in fp32, as root mean square over the probe's tokens. Set from measurement, see
# the table in tests/test_engine.py: about ten times what was seen, and far below what any wrong tensor does.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}
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
    keep: int = 8,
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


def judge(probe: Probe, after: np.ndarray, before: np.ndarray | None, dtype: str) -> Verdict:
    """What an engine's scores `after` a swap prove; `before` are its scores just before, if it then held the parent.

    Proved: nearer to the child than half of what separates child and parent. In 16 bits an engine's rounding may exceed a
    small update, so there the update is also looked for along its own direction, where the rounding of hundreds of tokens
    averages out. An engine that moved, but by less than half, holds the child's rounded weights (the dead zone): not wrong,
    not proved, and `survived` says how much is left.
    """
    distance = _rms(after - probe.child)
    limit = TOLERANCE[dtype]
    if not np.isfinite(distance) or distance > limit:
        return Verdict(False, None, distance, f"its log-probabilities are {distance:.3g} from the checkpoint's, limit {limit:g}")
    if probe.before is None:
        return Verdict(True, None, distance)
    update = probe.child - probe.before
    size = _rms(update)
    if size < limit / 1000:  # 2e-6 in fp32: the last bits of a log-probability
        return Verdict(INDISTINGUISHABLE, None, distance)
    moved = after - (probe.before if before is None else before)
    survived = float(moved @ update / (update @ update))
    error = _rms(moved - survived * update) / (size * np.sqrt(max(1, len(update) - 1)))
    return _verdict(distance, size, survived, error, dtype)


def _verdict(distance: float, size: float, survived: float, error: float, dtype: str) -> Verdict:
    if distance < size / 2:
        return Verdict(True, survived, distance)
    if dtype == "float32":
        if size < 4 * FLOOR:
            return Verdict(INDISTINGUISHABLE, survived, distance)
        return Verdict(False, survived, distance, f"it lies {distance:.3g} from the child, parent and child only {size:.3g} apart")
    if error > 1 / 6:  # half an update would be less than three standard errors
        return Verdict(INDISTINGUISHABLE, survived, distance)
    if survived >= 0.5:
        return Verdict(True, survived, distance)
    if survived > 3 * error:
        return Verdict(f"only {survived:.0%} of the update is visible in {dtype}", survived, distance)
    return Verdict(False, survived, distance, f"it still answers like the parent: {survived:.1%} of the update is visible")


FLOOR = 2e-5  # engine against transformers in fp32, root mean square over tokens: 4e-6 measured


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
