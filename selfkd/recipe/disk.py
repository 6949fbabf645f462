"""The most that a run takes on disk at once, from words alone: its weights, round by round as `keep` says, and its answers.

Mirrors what retention takes away, in the worst case: where it depends on how rounds turn out, the larger case counts. Starts nothing.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from selfkd.backend.machine import Machine
from selfkd.backend.memory import Training, optimiser_bytes
from selfkd.backend.trainer.sealed import KEPT
from selfkd.backend.trainer.trl_options import for_loss
from selfkd.core.number_format import BYTES
from selfkd.recipe import scorers
from selfkd.recipe.schema import Recipe
from selfkd.steps.average import AverageStep
from selfkd.steps.train import TrainStep

FP32 = BYTES["float32"]
STATE = 2  # times what learns: AdamW's two moments; other optimisers keep no more
BYTES_PER_TOKEN = 10  # of a stored answer: text and ids, compressed, with their share of the other columns
TWICE = 2  # an answer is stored as a sample and as a row to train on
GB = 1e9


@dataclass(frozen=True)
class Numbers:
    """How many numbers a model has, and an adapter of rank 1 of it; None where that is not known: it then counts as a model."""

    model: int
    of_rank_1: int | None = None

    def of(self, rank: int) -> int:
        """Return those of an adapter of this rank; 0 stands for the whole model."""
        return self.model if not rank or self.of_rank_1 is None else min(self.model, rank * self.of_rank_1)


@dataclass(frozen=True)
class Kept:
    """Checkpoints that lie on disk together: root and others in fp32, copies in bf16, those being written, and adapters by their ranks.

    `states` are those of optimisers that live on, by the rank of what they taught: 0 for all weights.
    """

    whole: int
    narrow: int = 0
    written: int = 0
    ranks: tuple[int, ...] = ()
    states: tuple[int, ...] = ()

    def bytes(self, numbers: Numbers) -> int:
        full = FP32 * numbers.model * (self.whole + self.written) + FP32 // 2 * numbers.model * self.narrow
        return full + FP32 * sum(map(numbers.of, self.ranks)) + STATE * FP32 * sum(map(numbers.of, self.states))

    def __str__(self) -> str:
        parts = {
            "in fp32": self.whole,
            "in bf16": self.narrow,
            "being written": self.written,
            "of adapters": len(self.ranks),
            "optimisers' states": len(self.states),
        }
        first, *others = [f"{count} {name}" for name, count in parts.items() if count]
        return ", ".join([first.replace(" ", " checkpoint " if self.whole == 1 else " checkpoints ", 1), *others])


@dataclass(frozen=True)
class Disk:
    """The peak of a run: what of its weights lies there then and in which round, and bytes of weights and of answers.

    `update` are those of the checkpoints inside an update, where it takes long, `scorers` those of models of others that the run copies to
    score by; None where the size of one is not known.
    """

    kept: Kept
    round: int
    weights: int
    answers: int
    least: int
    update: int = 0
    scorers: int | None = 0

    @property
    def peak(self) -> int:
        return self.weights + self.update + self.answers + (self.scorers or 0)

    def text(self, more: str, free: int | None) -> str:
        """Return the peak in words, beside the bytes that are `free` where that is known; `more` is what is not counted."""
        inside = f", {_gb(self.update)} of checkpoints inside its update where that takes long" if self.update else ""
        answers = f"{_gb(self.answers)} of answers and rows{more}"
        models = f", {_gb(self.scorers)} of models that score" if self.scorers else ""
        models = ", and models that score, of unknown size" if self.scorers is None else models
        parts = f"{_gb(self.weights)} of weights in round {self.round} ({self.kept}){inside}, {answers}{models}"
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


def of(recipe: Recipe, numbers: Numbers, made: int, dtype: str, machine: Machine | None = None) -> Disk:
    """Return the most that a run of a model with so many numbers takes, which generates `made` tokens for an engine in `dtype`."""
    narrow = recipe.keep.as_ == "bf16" and dtype == "bfloat16"
    moments = [
        (kept, _update(recipe, index, numbers, machine) if trains else 0, index)
        for index in range(recipe.rounds + 1)
        for kept, trains in _moments(recipe, index, narrow)
    ]
    kept, update, index = max(moments, key=lambda moment: moment[0].bytes(numbers) + moment[1])
    trains = any(_trained(recipe, index) for index in range(recipe.rounds + 1))
    answers = BYTES_PER_TOKEN * made * (TWICE if trains else 1)
    # The root at least is written; whether it is there already, as that of another run, is not known here.
    copied = _scorers(recipe)
    return Disk(kept, index, kept.bytes(numbers), answers, max(FP32 * numbers.model, copied or 0), update, copied)


def _scorers(recipe: Recipe) -> int | None:
    """Return what the copies of models take that only score, each once; None where the size of one is not known."""
    sizes = [scorers.bytes_of(one, recipe) for one in recipe.scorers()]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _trained(recipe: Recipe, index: int) -> list[TrainStep]:
    """Return the steps of a round that make a checkpoint."""
    return [step for step in recipe.steps_of(index) if isinstance(step, TrainStep)]


def _full(recipe: Recipe, index: int) -> int:
    """Return how many checkpoints of full weights a round makes."""
    averages = sum(isinstance(step, AverageStep) for step in recipe.steps_of(index))
    return averages + sum(step.lora is None for step in _trained(recipe, index))


def _ranks(recipe: Recipe, index: int) -> tuple[int, ...]:
    """Return the rank of each adapter that a round makes: of one that is laid over others, all of theirs with its own."""
    steps = [(at, step) for at in range(index + 1) for step in _trained(recipe, at)]
    found, stacked = [], 0
    for at, step in steps:
        if step.lora:
            alone = step.continue_ or step.from_ == "base"
            stacked = max(stacked, step.lora.r) if alone else stacked + step.lora.r
            found += [step.lora.r if step.from_ == "base" else stacked] if at == index else []
    return tuple(found)


def _update(recipe: Recipe, index: int, numbers: Numbers, machine: Machine | None) -> int:
    """Return what the checkpoints inside an update take beyond its child: KEPT and a draft, then KEPT and the child. A check makes them in any case."""
    if machine is None or machine.backend == "fake":
        return 0
    made = [step for step in _trained(recipe, index) if step.check or machine.checkpoint_minutes]
    return max((_of_update(step, numbers, machine) for step in made), default=0)


def _of_update(step: TrainStep, numbers: Numbers, machine: Machine) -> int:
    """Each holds what learns and what the optimiser keeps of it; one in 8 bits is not written."""
    optimiser = {**for_loss(step.loss, machine.trainer), **step.trl}.get("optim") or Training.optimiser
    learned = numbers.of(step.lora.r if step.lora else 0)
    one = int((FP32 + optimiser_bytes(optimiser)) * learned)
    return 0 if "8bit" in optimiser else max(KEPT * one, (KEPT + 1) * one - FP32 * learned)


def _moments(recipe: Recipe, index: int, narrow: bool) -> list[tuple[Kept, bool]]:
    """Return what lies on disk at the end of a round before anything is taken away (True: it trains), and while what is left is rounded."""
    before = _after(recipe, index - 1, narrow) if index else Kept(1)
    after = _after(recipe, index, narrow)
    # The last one to be rounded is still whole while its copy is written.
    rounding = [(replace(after, whole=after.whole + 1), False)] if after.narrow else []
    # Beside the newest model that an update measures on its way lies the best so far.
    twice = [step.lora is None for step in _trained(recipe, index) if step.check][:1]
    ranks = before.ranks + _ranks(recipe, index) * (1 + (twice == [False]))
    states = _states(recipe, index - 1) + _leaving(recipe, index)
    made = replace(before, written=_full(recipe, index) + (twice == [True]), ranks=ranks, states=states)
    return [(made, bool(_trained(recipe, index))), *rounding]


def _leaving(recipe: Recipe, index: int) -> tuple[int, ...]:
    """Return, for each optimiser's state that a round leaves beside its models, the rank of what it taught."""
    steps = _trained(recipe, index) if index >= 0 else []
    return tuple(step.lora.r if step.lora else 0 for step in steps if step.optimiser == "continue")


def _states(recipe: Recipe, index: int) -> tuple[int, ...]:
    """Return those that stay after a round: of the head, and of the rounds that steps name."""
    left = [one for one in range(index + 1) if _leaving(recipe, one)]
    used = [one for one in left[:-1] if one in _used_rounds(recipe, index)]
    return tuple(rank for one in (*used, *left[-1:]) for rank in _leaving(recipe, one))


def _after(recipe: Recipe, index: int, narrow: bool) -> Kept:
    """Return what stays after a round: the root, checkpoints of rounds, those of the warm-up with round 0, and the best one."""
    rounds, used = _kept_rounds(recipe, index), _used_rounds(recipe, index)
    trained = [one for one in rounds | used if one and _full(recipe, one)]
    ranks = [made[-1] for one in sorted(rounds | used) if (made := _ranks(recipe, one))]
    best, is_used = _best(recipe, rounds | used, index)
    if best and _ranks(recipe, index):
        best, ranks = 0, [*ranks, _ranks(recipe, index)[-1]]
    root = {0} if ranks else {0} & (rounds | used)  # an adapter needs what lies beneath it
    warm = _full(recipe, 0) if root else 0
    whole = sum(one == index or one in used for one in trained) + (warm if 0 in used or not index else 0) + best * is_used
    every = len(trained) + warm + best
    kept = Kept(len(root) + whole, every - whole) if narrow else Kept(len(root) + every)
    return replace(kept, ranks=tuple(ranks))


def _kept_rounds(recipe: Recipe, index: int) -> set[int]:
    """Return the rounds whose checkpoints `keep` names after round `index`, and that of the head: the last one that trained."""
    newest = set(range(max(0, index - recipe.keep.last + 1), index + 1)) if recipe.keep.last else set()
    head = max((one for one in range(1, index + 1) if _trained(recipe, one)), default=0)
    return newest | {head} | ({0} if recipe.keep.base else set())


def _used_rounds(recipe: Recipe, index: int) -> set[int]:
    """Return the rounds whose models the steps name."""
    found = {{"base": 0, "warm": 0}.get(one.when, one.round) for one in recipe.named_models()}
    return {one for one in found if one is not None and one <= index}


def _best(recipe: Recipe, kept: set[int], index: int) -> tuple[int, bool]:
    """Return whether the best round may be one more (1 or 0), and whether a step works from it."""
    used = any(one.when == "best" for one in recipe.named_models())
    may_be_another = recipe.best is not None and index + 1 > len(kept)
    return int(may_be_another and (recipe.keep.best or used)), used


def free(folder: Path) -> int | None:
    """Return how much a run in `folder` may take: what is free there, and what it holds already; None where nothing says."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), None)
    with suppress(OSError):
        own = sum(path.lstat().st_size for path in folder.rglob("*")) if folder.is_dir() else 0
        return own + shutil.disk_usage(there).free if there else None
    return None
