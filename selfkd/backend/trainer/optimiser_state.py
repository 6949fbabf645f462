"""The state of an optimiser that lives on over rounds: written beside the model that it belongs to, put into the next update's optimiser.

B-STaR (arXiv 2412.17256) trains so. Whose state it is the chain knows, which compares; here only optimiser and parameters are compared.
"""

# transformers' callbacks have no types.
# mypy: allow-subclassing-any
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback

from selfkd.backend.trainer.parts import Parts, write
from selfkd.backend.trainer.resume import (
    WORDS,
    Unsaveable,
    inner,
    optimiser_tensors,
    optimiser_words,
    put_optimiser,
    states,
    trained,
)
from selfkd.backend.trainer.together import gathered, of_rank_0
from selfkd.core.wording import first_line
from selfkd.errors import StorageError, UsageError

FRESH = "Train as the update before did, or write `optimiser: fresh`."
# Schedules that no number of steps ends. In any other one the place of the update before is its end, where nothing is learned any more.
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")


class Put(TrainerCallback):
    """Begins with the moments that another update left, and at its place in a schedule without an end; hyperparameters are those of today."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        words, parts = json.loads((self.folder / WORDS).read_text("utf-8")), Parts(self.folder)
        _refuse_other(model, optimizer, parts, words)
        put_optimiser(model, optimizer, parts, words, as_it_was=False)
        if args.lr_scheduler_type in ENDLESS:
            _go_on_at(lr_scheduler, inner(optimizer), words["scheduler"]["last_epoch"])


class Saveable(TrainerCallback):
    """Refuses an optimiser whose state cannot be kept behind its first step, and not behind the last one."""

    def __init__(self) -> None:
        self._seen = False

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        if self._seen:
            return
        try:
            self._seen = all(True for _ in states(model, optimizer))
        except Unsaveable as error:
            fix = "Name another one, such as trl.optim: adamw_torch, or write `optimiser: fresh`."
            raise UsageError(f"{error}, so its state cannot be kept", "train.optimiser", fix) from None


def beside(out: Path) -> Path:
    """Return where the state of the optimiser that made the model in `out` is written."""
    return out.with_name(f"{out.name}-state")


def _go_on_at(scheduler: Any, optimiser: Any, step: int) -> None:
    """Have a schedule behave as one that made so many steps: transformers' are LambdaLR of torch, whose rate follows from the step."""
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch, scheduler._step_count, scheduler._last_lr = step, step + 1, rates
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate


def _refuse_other(model: Any, optimiser: Any, parts: Parts, words: dict[str, Any]) -> None:
    """Raise UsageError for a state that is of another optimiser, or of other parameters."""
    kind = type(inner(optimiser)).__name__
    if words["optimiser"] != kind:
        what = f"the state to go on with is of the optimiser {words['optimiser']}, and this step trains with {kind}"
        raise UsageError(what, "train.optimiser", FRESH)
    known = {name.rpartition("/")[0] for name in parts.names("optimiser/")} | words["values"].keys()
    if other := sorted(known - trained(model).keys()):
        what = f"the state to go on with is of other parameters than learn here, such as {other[0]}"
        raise UsageError(what, "train.optimiser", FRESH)


def keep(trainer: Any, out: Path, rank: int, ranks: int) -> Path:
    """Write the optimiser's state beside the model in `out`, each rank its part; StorageError on all of them where one cannot."""
    folder, problem = beside(out), ""
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    of_rank_0(None, ranks)  # the folder is there
    try:
        write(folder, rank, optimiser_tensors(trainer.model, trainer.optimizer))
        if rank == 0:
            words = optimiser_words(trainer.model, trainer.optimizer, trainer.lr_scheduler)
            (folder / WORDS).write_text(json.dumps(words, sort_keys=True), "utf-8")
    except (OSError, SafetensorError, Unsaveable, TypeError) as error:
        problem = first_line(error)
    if said := next((said for said in gathered(problem, ranks) if said), ""):
        fix = "Make room and repeat the command, or write `optimiser: fresh`."
        raise StorageError(f"the optimiser's state could not be written: {said}", "train.optimiser", fix)
    return folder
