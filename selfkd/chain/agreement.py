"""Engine against trainer, on the tokens that are learned: what the engine said of them, how much may be rounding, and when it is too much.

Only answers count that were drawn by the weights where training starts, and are learned behind the words that they were drawn behind: of
others the two sides speak of different things. Every figure is a note, outside every digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from selfkd.backend.probe import TOLERANCE
from selfkd.backend.trainer import batches
from selfkd.chain.records import Commit
from selfkd.core.pool import Model, Pool

MOST_ROWS = 2048  # of an update that are looked at
# How far the two may lie apart, in times of the rounding of both sides together, which is measured on other tokens than those that are
# learned: it was 0.4 to 1.1 times that, in fp32 and bf16, by vLLM and transformers, of a tiny model and SmolLM2-135M. Never less than what
# the proof of a swap lets pass in fp32.
MOST, LEAST = 2, TOLERANCE["float32"]
OTHER_WEIGHTS = "no row was sampled by the weights where training starts (`from`)"
OTHER_WORDS = "no row is learned behind the words that its answer was sampled behind"
ALARM = "{where}: engine and trainer give what was sampled log-probabilities that lie {mean:.2g} nats apart in the mean (99th percentile {p99:.2g}, {tokens} tokens), and their own rounding explains {floor:.2g}"
WAYS = (
    "One of them may have other weights, write prompts by another chat template, or compute attention otherwise. See `selfkd doctor`, compare "
    "the tokens (selfkd show --training-rows --tokens), and try another machine.trainer.attn_implementation or generator; do not trust this round until it is found"
)


def said_of(rows: pl.DataFrame, pool: Pool, start: Model, seed: int) -> tuple[pl.DataFrame | None, str]:
    """Return what the engine said of the answers of rows (columns SAMPLED), or why that says nothing; (None, '') where it was not asked.

    Of many rows only those that an update of this seed takes first are looked at: the figure is of its first step.
    """
    rows = rows.select("id", "samples", "messages")
    rows = rows[batches.ordered(rows["id"].to_list(), seed, 0)[:MOST_ROWS]]
    kept = pool.scan("samples").select("id", "model", "teacher_messages", "token_ids", "token_logprobs")
    wanted = rows.select(row="id", messages="messages", id="samples").explode("id").drop_nulls("id")
    found = kept.filter(pl.col("token_logprobs").is_not_null() & pl.col("id").is_in(wanted["id"].unique().implode())).collect()
    if not found.height:
        return None, ""
    ours = found.filter(pl.col("model") == str(start))
    if not ours.height:
        return None, OTHER_WEIGHTS
    both = wanted.join(ours, on="id")
    same = [mine == asked for mine, asked in both.select("messages", "teacher_messages").iter_rows()]
    alike = both.filter(pl.Series(same, dtype=pl.Boolean))
    if not alike.height:
        return None, OTHER_WORDS
    return alike.select("row", ids="token_ids", logprobs="token_logprobs"), ""


def of_engine(made: Iterable[Commit], model: Model) -> Mapping[str, Any] | None:
    """Return how far the engine lay from the checkpoint's own log-probabilities when it took these weights, as steps say it; the newest counts."""
    swaps = [swap for commit in made if (swap := commit.notes.get("swap")) and swap.get("weights") == model.digest]
    return next((swap["apart"] for swap in reversed(swaps) if swap.get("apart")), None)


def judged(found: Mapping[str, Any], engine: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the figure with its floor: what the engine's rounding and the trainer's come to, each measured against fp32 with these weights."""
    trainer = found.get("trainer")
    if "mean" not in found or not trainer or not engine:
        return dict(found)
    return {**found, "engine": dict(engine), "floor": engine["mean"] + trainer["mean"]}


def recorded(made: Iterable[Commit]) -> dict[str, Mapping[str, Any]]:
    """Return {step: the figure, or why there is none} of the updates of a round that have one."""
    return {one.step: found for one in made if (found := one.notes.get("train", {}).get("engine_apart"))}


def figures(of_steps: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of a round by name, as a table of rounds has them."""
    return {
        f"{step}_engine_apart_{name}": found[name]
        for step, found in of_steps.items()
        for name in ("mean", "p99", "floor")
        if name in found
    }


def told(found: Mapping[str, Any]) -> str:
    """Return a figure in words.

    >>> told({"mean": 0.0061, "p99": 0.02, "tokens": 340, "floor": 0.011})
    'engine and trainer 0.0061 nats apart in the mean (p99 0.02, 340 tokens); their rounding explains 0.011'
    """
    if "mean" not in found:
        return f"engine and trainer cannot be compared: {found['why']}"
    rounding = (
        f"; their rounding explains {found['floor']:.2g}" if "floor" in found else "; how much is rounding was not measured"
    )
    return f"engine and trainer {found['mean']:.2g} nats apart in the mean (p99 {found['p99']:.2g}, {found['tokens']} tokens){rounding}"


def alarm(found: Mapping[str, Any], where: str) -> str:
    """Return the warning of a figure that rounding does not explain, or ''."""
    if "floor" not in found or found["mean"] <= max(MOST * found["floor"], LEAST):
        return ""
    return f"{ALARM.format(where=where, **found)}. {WAYS}"
