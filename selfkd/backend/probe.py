"""Evidence for a weight swap: a handful of token sequences on which parent and child differ, and how to judge an engine by it.

Whoever makes a model writes `probe.json` beside it; whoever serves the model scores the same sequences and compares. Knows
neither vLLM nor TRL, and touches torch only through the model it is handed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfkd.backend.attention import TORCH
from selfkd.core import digest
from selfkd.errors import WeightsError

FILE = "probe.json"
SEQUENCE_TOKENS = 40  # tokens; a swap scores six such sequences twice, which is half of its time (SmolLM2-135M, one CPU thread)
FEWEST_TOKENS = 8
# How far an engine may lie from transformers in fp32, as root mean square over the probe's tokens. Set from measurement, see
# tests/backend/test_vllm.py: about ten times what was seen, and far below what any wrong tensor does.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25, "float16": 0.05}
CROSSED = 2  # times TOLERANCE: what may show where an update puts weights into the next number of 16 bits
MORE, MOST = 1.5, 4  # times what rounding did under the parent; and times TOLERANCE, whatever that was
STILL = 1 / 50  # of TOLERANCE: an engine whose scores moved by less in a swap answers exactly as before
MOST_ERROR = 0.25  # a standard error of `survived` above which half an update is under two of them
Scores = np.ndarray  # log-probabilities, one per scored token of a probe
INDISTINGUISHABLE = "parent and child cannot be told apart"


def candidate_sequences(tok: Any, rows_ids: Iterable[Sequence[int]], limit: int = 12) -> list[list[int]]:
    """Choose at most `limit` distinct sequences of at most SEQUENCE_TOKENS tokens, spread over the rows: the end of each, where the answer is.

    A BOS at the start of the row is kept, for models that lean on it. The default limit costs one forward pass of some 500 tokens.
    """
    windows: dict[tuple[int, ...], None] = {}
    for ids in rows_ids:
        head = list(ids[:1]) if len(ids) > SEQUENCE_TOKENS and ids[0] == tok.bos_token_id else []
        window = tuple(head + list(ids[-(SEQUENCE_TOKENS - len(head)) :]))
        if len(window) >= FEWEST_TOKENS:
            windows[window] = None
    found = list(windows)
    step = max(1, len(found) // limit)
    return [list(window) for window in found[::step][:limit]]


def token_logprobs(model: Any, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probability of each token but the first, given those before it, by a torch model in evaluation mode, in fp32.

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
    attention: str = TORCH,
) -> Path:
    """Write `probe.json`; `attention` names what computed the scores. Keeps the `keep` sequences on which parent and child differ most (the first ones for a root)."""
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
    path = folder / FILE
    by = {} if attention == TORCH else {"attention": attention}
    path.write_text(json.dumps({"parent": parent_digest, "sequences": entries, **by}, allow_nan=False))
    return path


@dataclass(frozen=True)
class Probe:
    """`probe.json` as arrays over all scored tokens. `before` is None for the root of a chain.

    `attention` is what computed them, and so must whoever compares in transformers; None is what transformers chooses by itself.
    """

    parent: str | None
    ids: list[list[int]]
    starts: list[int]
    child: Scores
    before: Scores | None
    attention: str | None = None

    @property
    def digest(self) -> str:
        return digest.of(self.ids, self.starts)


def read_probe(folder: Path) -> Probe:
    path = folder / FILE
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
        content.get("attention"),
    )


def earlier_scores(probe: Probe, known: Mapping[tuple[int, ...], Sequence[float]]) -> Scores | None:
    """Return what an engine scored on a probe's sequences before it slept, {ids: log-probabilities}; None where one is missing.

    A trainer keeps some of `batches.candidates`: an engine that scores all of them beforehand has these too.
    """
    found = [known.get(tuple(ids)) for ids in probe.ids]
    parts = [row[start - 1 :] for row, start in zip(found, probe.starts, strict=True) if row is not None]
    return np.concatenate(parts) if len(parts) == len(found) else None


@dataclass(frozen=True)
class Earlier:
    """What an engine scored before it slept, under the weights `weights`: {ids: log-probabilities of all tokens but the first}."""

    weights: str
    scores: Mapping[tuple[int, ...], Sequence[float]]


@dataclass(frozen=True)
class Apart:
    """|log p - log p'| of the same tokens, in nats: its mean, its 99th percentile, and how many tokens that is."""

    mean: float
    p99: float
    tokens: int

    @classmethod
    def of(cls, values: Scores) -> Apart:
        return cls(float(np.mean(values)), float(np.percentile(values, 99)), len(values))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """proved: True, or the reason why not. survived: the share of the update that the engine sees; None for a root.

    distance: root mean square from the child's log-probabilities. wrong: why the engine must not be used, or ''. apart: how far the engine's
    log-probabilities of these tokens lie from the checkpoint's in fp32, which is its own rounding.
    """

    proved: bool | str
    survived: float | None
    distance: float
    wrong: str = ""
    apart: Apart | None = None

    def notes(self) -> dict[str, Any]:
        apart = {"apart": self.apart.to_json()} if self.apart else {}
        return {"proved": self.proved, "survived": self.survived, "distance": self.distance, **apart}


@dataclass(frozen=True)
class Scored:
    """An engine's log-probabilities on a probe, before and after a swap. `before` is None where none are known."""

    after: Scores
    before: Scores | None
    held_parent: bool


def weighed(probe: Probe, after: Scores, before: Scores | None, held: str, earlier: Earlier | None) -> Scored:
    """Return an engine's scores after a swap with those before it: its own while it held `held`, or of before it slept under the parent."""
    known = earlier_scores(probe, earlier.scores) if earlier and earlier.weights == probe.parent else None
    if before is None and known is not None:
        return Scored(after, known, True)
    return Scored(after, before, bool(held) and held == probe.parent)


def judge(probe: Probe, scored: Scored, dtype: str) -> Verdict:
    """Say what an engine's scores prove, and how far they lie from the checkpoint's."""
    return replace(_judged(probe, scored, dtype), apart=Apart.of(np.abs(scored.after - probe.child)))


def _judged(probe: Probe, scored: Scored, dtype: str) -> Verdict:
    """Say what an engine's scores prove. There are five cases:

    1. Far from the child (in 16 bits: further than rounding on these tokens, and the whole update): wrong.
    2. A root, near enough: proved, for there is no parent to take it for.
    3. The child: nearer to it than half of what separates it from its parent, or in 16 bits moved along the update.
    4. Too little to tell parent and child apart by: neither proved nor wrong.
    5. None of these: not the child, or not much of it (`_not_the_child`).

    An engine in 16 bits rounds more than a small update moves. So there the update is also looked for along its own direction,
    where the rounding of hundreds of tokens averages out.
    """
    distance = _rms(scored.after - probe.child)
    update = None if probe.before is None else probe.child - probe.before
    size = 0.0 if update is None else _rms(update)
    limit = TOLERANCE[dtype] if update is None or dtype == "float32" else _rounding(probe, scored, dtype) + size
    if not distance <= limit:  # not (a > b): NaN fails too
        wrong = f"its log-probabilities lie {distance:.3g} from the checkpoint's, limit {limit:.3g}"
        return Verdict(False, None, distance, wrong)
    if update is None:
        return Verdict(True, None, distance)
    if size == 0.0:
        return Verdict(INDISTINGUISHABLE, None, distance)
    shift = _shift(probe, scored, update, dtype)
    if distance < size / 2 or shift.along_the_update(dtype):
        return Verdict(True, shift.survived, distance)
    if shift.error >= MOST_ERROR or (shift.still and size < STILL * TOLERANCE[dtype]):
        return Verdict(INDISTINGUISHABLE, shift.survived, distance)
    return _not_the_child(shift, distance, size, dtype)


def _rounding(probe: Probe, scored: Scored, dtype: str) -> float:
    """Return how far from the checkpoint rounding to 16 bits may put an engine on these tokens.

    It is more than for a root, whose 16 bits are those that were published: three steps at a rate of 1e-6 put 5 % of SmolLM2's weights
    into the next number of bf16, and that alone moved answers that it did not expect by 0.29, in transformers too. What an engine was
    off by under the parent may show that these tokens round by even more.
    """
    seen = 0.0 if scored.before is None or not scored.held_parent else MORE * _rms(scored.before - probe.before)
    return TOLERANCE[dtype] * min(max(CROSSED, seen / TOLERANCE[dtype]), MOST)


@dataclass(frozen=True)
class _Shift:
    """What a swap did to an engine's scores, seen along the update from parent to child."""

    survived: float
    """The share of the update that shows."""
    rest: float
    """What moved across the update's direction, as root mean square."""
    error: float
    """The standard error of `survived` that follows from `rest`."""
    still: bool
    """Whether the engine answers exactly as before the swap."""

    def along_the_update(self, dtype: str) -> bool:
        """Whether an engine in 16 bits moved at least half of the way to the child, and not much to anywhere else."""
        seen = self.survived >= 0.5 and self.error < MOST_ERROR and self.rest <= TOLERANCE[dtype]
        return dtype != "float32" and not self.still and seen


def _shift(probe: Probe, scored: Scored, update: Scores, dtype: str) -> _Shift:
    """Measure from the engine's own scores under the parent, where it held the parent; else from the trainer's."""
    start = scored.before if scored.before is not None and scored.held_parent else probe.before
    moved = scored.after - start
    survived = float(moved @ update / (update @ update))
    rest = _rms(moved - survived * update)
    error = float(rest / _rms(update) / np.sqrt(max(1, len(update) - 1)))
    still = scored.before is not None and _rms(scored.after - scored.before) < STILL * TOLERANCE[dtype]
    return _Shift(survived, rest, error, still)


def _not_the_child(shift: _Shift, distance: float, size: float, dtype: str) -> Verdict:
    """Tell apart what fp32 cannot excuse, weights that the cast rounded (the bf16 dead zone), and the old weights.

    Rounded weights are not wrong: `survived` says how much of the update is left of them.
    """
    if dtype == "float32":
        wrong = f"it lies {distance:.3g} from the child, which lies {size:.3g} from its parent"
        return Verdict(False, shift.survived, distance, wrong)
    if not shift.still:
        why = f"only {max(shift.survived, 0):.0%} of the update is visible in {dtype}"
        return Verdict(why, shift.survived, distance)
    why = "the old weights are still there, or all of the update was lost in the cast (dither the root, or use dtype float32)"
    return Verdict(False, shift.survived, distance, f"it answers exactly like before the swap: {why}")


def _rms(values: Scores) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
