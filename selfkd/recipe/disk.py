"""The most that a run takes on disk at once, from words alone: its weights, round by round as `keep` says, and its answers.

Mirrors what retention takes away, in the worst case: where it depends on how rounds turn out, the larger case counts. Starts nothing.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfkd.backend.trainer.sealed import KEPT
from selfkd.core.number_format import BYTES
from selfkd.recipe.schema import Recipe
from selfkd.steps.train import TrainStep

FP32 = BYTES["float32"]
BYTES_PER_TOKEN = 10  # of a stored answer: text and ids, compressed, with their share of the other columns
STATE = 2  # times the weights: AdamW's two moments; other optimisers keep no more
TWICE = 2  # an answer is stored as a sample and as a row to train on
GB = 1e9


@dataclass(frozen=True)
class Kept:
    """Checkpoints that lie on disk together: root and others in fp32, copies in bf16, those being written, optimisers' states, and what an update goes on from."""

    whole: int
    narrow: int = 0
    written: int = 0
    states: int = 0
    sealed: int = 0

    def bytes(self, parameters: int) -> int:
        full = self.whole + self.written + STATE * self.states + (1 + STATE) * self.sealed
        return FP32 * parameters * full + FP32 // 2 * parameters * self.narrow

    def __str__(self) -> str:
        parts = {
            "in fp32": self.whole,
            "in bf16": self.narrow,
            "being written": self.written,
            "optimisers' states": self.states,
            "inside the update with its optimiser": self.sealed,
        }
        first, *others = [f"{count} {name}" for name, count in parts.items() if count]
        return ", ".join([first.replace(" ", " checkpoint " if self.whole == 1 else " checkpoints ", 1), *others])


@dataclass(frozen=True)
class Disk:
    """The peak of a run: what of its weights lies there then and in which round, and bytes of weights and of answers."""

    kept: Kept
    round: int
    weights: int
    answers: int
    least: int

    @property
    def peak(self) -> int:
        return self.weights + self.answers

    def text(self, more: str, free: int | None) -> str:
        """Return the peak in words, beside the bytes that are `free` where that is known; `more` is what is not counted."""
        parts = (
            f"{_gb(self.weights)} of weights in round {self.round} ({self.kept}), {_gb(self.answers)} of answers and rows{more}"
        )
        return f"up to {_gb(self.peak)} at once: {parts}{self._beside(free)}"

    def _beside(self, free: int | None) -> str:
        if free is None:
            return ""
        return (
            f". {_gb(free)} are free"
            if self.peak <= free
            else f". ONLY {_gb(free)} ARE FREE: it may stop, and go on once there is room"
        )

    def problem(self, free: int | None, folder: Path | None) -> str:
        """Return why the run cannot be made where so much is free, whatever its answers are; or ''."""
        if free is None or free >= self.least:
            return ""
        return f"disk: at least {_gb(self.least)} are written at once, and {_gb(free)} are free at {folder}. Make room, or name another place: --runs DIR"


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 1e6:.1f} MB"


def of(recipe: Recipe, parameters: int, made: int, dtype: str) -> Disk:
    """Return the most that a run of a model with so many numbers takes, which generates `made` tokens for an engine in `dtype`."""
    narrow = recipe.keep.as_ == "bf16" and dtype == "bfloat16"
    moments = [(kept, index) for index in range(recipe.rounds + 1) for kept in _moments(recipe, index, narrow)]
    kept, index = max(moments, key=lambda moment: moment[0].bytes(parameters))
    trains = any(_trained(recipe, index) for index in range(recipe.rounds + 1))
    answers = BYTES_PER_TOKEN * made * (TWICE if trains else 1)
    # The root at least is written; whether it is there already, as that of another run, is not known here.
    return Disk(kept, index, kept.bytes(parameters), answers, FP32 * parameters)


def _trained(recipe: Recipe, index: int) -> int:
    """Return how many checkpoints a round makes."""
    return sum(step.trained_role() is not None for step in recipe.steps_of(index))


def _moments(recipe: Recipe, index: int, narrow: bool) -> list[Kept]:
    """Return what lies on disk at the end of a round before anything is taken away, and while what is left is rounded."""
    before = _after(recipe, index - 1, narrow) if index else Kept(1)
    after = _after(recipe, index, narrow)
    # The last one to be rounded is still whole while its copy is written.
    rounding = [Kept(after.whole + 1, after.narrow)] if after.narrow else []
    states = _states(recipe, index - 1) + _leaving(recipe, index)
    checked = [step.check for step in recipe.steps_of(index) if isinstance(step, TrainStep) and step.check]
    # Beside the newest model that is measured lies the best so far; the checkpoints that are kept, and one being written.
    more = {"written": _trained(recipe, index) + bool(checked), "sealed": (KEPT + 1) * bool(checked)}
    return [replace(before, states=states, **more), *rounding]


def _leaving(recipe: Recipe, index: int) -> int:
    """Return how many optimisers' states a round leaves beside its models."""
    steps = recipe.steps_of(index) if index >= 0 else []
    return sum(isinstance(step, TrainStep) and step.optimiser == "continue" for step in steps)


def _states(recipe: Recipe, index: int) -> int:
    """Return how many of them stay after a round: those of the head, and of the rounds that steps name."""
    left = [one for one in range(index + 1) if _leaving(recipe, one)]
    used = [one for one in left[:-1] if one in _used_rounds(recipe, index)]
    return sum(_leaving(recipe, one) for one in (*used, *left[-1:]))


def _after(recipe: Recipe, index: int, narrow: bool) -> Kept:
    """Return what stays after a round: the root, checkpoints of rounds, those of the warm-up with round 0, and the best one."""
    rounds, used = _kept_rounds(recipe, index), _used_rounds(recipe, index)
    trained = [one for one in rounds | used if one and _trained(recipe, one)]
    root = {0} & (rounds | used)
    warm = _trained(recipe, 0) if root else 0
    best, is_used = _best(recipe, rounds | used, index)
    whole = sum(one == index or one in used for one in trained) + (warm if 0 in used or not index else 0) + best * is_used
    every = len(trained) + warm + best
    return Kept(len(root) + whole, every - whole) if narrow else Kept(len(root) + every)


def _kept_rounds(recipe: Recipe, index: int) -> set[int]:
    """Return the rounds whose checkpoints `keep` names after round `index`, and that of the head: the last one that trained."""
    newest = set(range(max(0, index - recipe.keep.last + 1), index + 1)) if recipe.keep.last else set()
    head = max((one for one in range(1, index + 1) if _trained(recipe, one)), default=0)
    return newest | {head} | ({0} if recipe.keep.base else set())


def _used_rounds(recipe: Recipe, index: int) -> set[int]:
    """Return the rounds whose models the steps name."""
    found = {{"base": 0, "warm": 0}.get(one.when, one.round) for one in _references(recipe)}
    return {one for one in found if one is not None and one <= index}


def _best(recipe: Recipe, kept: set[int], index: int) -> tuple[int, bool]:
    """Return whether the best round may be one more (1 or 0), and whether a step works from it."""
    used = any(one.when == "best" for one in _references(recipe))
    may_be_another = recipe.best is not None and index + 1 > len(kept)
    return int(may_be_another and (recipe.keep.best or used)), used


def _references(recipe: Recipe) -> list[Any]:
    return [one for step in recipe.steps_of(recipe.rounds) for one in step.models().values()]


def free(folder: Path) -> int | None:
    """Return how much a run in `folder` may take: what is free there, and what it holds already; None where nothing says."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), None)
    with suppress(OSError):
        own = sum(path.lstat().st_size for path in folder.rglob("*")) if folder.is_dir() else 0
        return own + shutil.disk_usage(there).free if there else None
    return None
