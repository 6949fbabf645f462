"""A loss as a function: log-probabilities and the rows' numbers in, one value per row out; and the proof that it is row-wise.

A micro-batch is cut where memory, cards and ranks say, so a row's value must not depend on who stands beside it. Knows torch, and
neither a model nor TRL.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfkd.backend.trainer.loss_kinds import ARGUMENTS, KL, LEARNED, OF_TOKENS, WEIGHT
from selfkd.core.pool import Function
from selfkd.core.user_module import load_module
from selfkd.errors import UsageError

Given = Mapping[str, torch.Tensor]  # by parameter name: [rows, tokens], or [rows]
SAME = 1e-5  # of the largest value or gradient: two ways to add up in a float32 that a function may use inside differ by less
FIX = "A row's value must follow from that row alone, and from the tokens that its mask holds; docs/losses.md shows how."


@dataclass(frozen=True)
class RowLoss:
    """A user's function, with its fixed arguments: called by the names of its parameters."""

    call: Callable[..., Any]
    params: Mapping[str, Any]
    rows: str
    where: str

    @classmethod
    def of(cls, function: Function, rows: str) -> RowLoss:
        """Load the function's file into this process, which is the trainer's; UsageError where that fails."""
        where = f"{function.path.name}:{function.name}"
        try:
            call = getattr(load_module(Path(function.path)), function.name)
            inspect.signature(call)
        except (Exception, SystemExit) as error:
            fix = "It is imported in the trainer's process, from the copy in the run's folder."
            raise UsageError(f"the loss could not be loaded: {type(error).__name__}: {error}", where, fix) from error
        return cls(call, dict(function.params), rows, where)

    @property
    def names(self) -> list[str]:
        """Return what it takes of what the trainer has."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        taken = inspect.signature(self.call).parameters.items()
        return [name for name, one in taken if one.kind in kinds and name not in self.params]

    @property
    def columns(self) -> list[str]:
        """Return the columns that every row must have."""
        known = {name for name in ARGUMENTS[self.rows] if name != "label"}
        taken = inspect.signature(self.call).parameters
        return [name for name in self.names if name not in known and taken[name].default is inspect.Parameter.empty]

    def values(self, given: Given) -> torch.Tensor:
        """Return the value of each row; UsageError where the function raises, or gives something else."""
        try:
            found = self.call(**{name: given[name] for name in self.names if name in given}, **self.params)
        except Exception as error:
            raise UsageError(f"the loss raised {_told(error)}", self.where, "Mend it, and repeat with --amend.") from error
        rows = len(given[LEARNED[self.rows][0]])
        if not isinstance(found, torch.Tensor) or found.shape != (rows,):
            shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            what = f"the loss returned {shape} for {rows} rows, where a tensor of one value per row is wanted: [{rows}]"
            raise UsageError(what, self.where, FIX)
        return found


def mask_of(name: str) -> str:
    """Return the mask of what is given per token by that name."""
    return "mask" if name in OF_TOKENS else name.removesuffix("logps") + "mask"


def _told(error: Exception) -> str:
    """Return an error with the innermost line that it came through."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (at {Path(frame.filename).name}:{frame.lineno})"


# ---- the proof ----


def refuse_mixed_rows(loss: RowLoss, given: Given) -> None:
    """Raise UsageError where the value of one of these rows, or its gradient, depends on the others; or where there is none."""
    for point in points(given, loss.rows):
        for problem in problems(loss, point):
            raise UsageError(problem, loss.where, FIX)


def points(given: Given, rows: str) -> Iterator[dict[str, torch.Tensor]]:
    """Yield rows in float64, as they are and with log-probabilities moved: where policy and reference agree, a mean of ratios hides."""
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    yield wide
    moved = dict(wide)
    for name in LEARNED[rows]:
        steps = torch.arange(1, wide[name].numel() + 1, dtype=torch.float64).view_as(wide[name])
        away = (0.03 + 0.05 * torch.sin(3 * steps) ** 2).to(wide[name].device)
        moved[name] = wide[name] - away * wide[mask_of(name)]
    yield moved


def problems(loss: RowLoss, given: Given) -> Iterator[str]:
    """Yield what is wrong with a loss on these rows, worked out together and one by one."""
    together, gradients = _worked_out(loss, given)
    rows = len(together)
    if not torch.isfinite(together).all():
        yield f"the loss is {together.tolist()} on the first rows, which is not finite"
        return
    if gradients is None:
        yield "the loss has no gradient: its value does not follow from the log-probabilities of the model that learns"
        return
    alone = [_worked_out(loss, _only(given, row, loss.rows), row) for row in range(rows)]
    values = torch.cat([value for value, _ in alone])
    if _differ(together, values):
        yield _said("value", together, values)
    elif any(not torch.isfinite(gradient).all() for gradient in gradients):
        yield "the gradient of the loss is not finite on the first rows"
    elif _differ(*_side_by_side(gradients, [found or () for _, found in alone])):
        yield "the gradient of a row of the loss changes with the other rows of its micro-batch, so it cannot be split"


def _worked_out(loss: RowLoss, given: Given, first: int = 0) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Return the values of rows, and the gradients of each log-probability; None where nothing is connected to them.

    Each row has a weight of its own in the sum that is differentiated, by its number from `first` on: what rows give each other shows.
    """
    learned = {name: given[name].detach().clone().requires_grad_() for name in LEARNED[loss.rows]}
    ended = {name: value.masked_fill(~given[mask_of(name)], 0.0) for name, value in learned.items()}  # as in the trainer
    values = loss.values({**given, **ended})
    if not values.requires_grad:
        return values.detach(), None
    weights = 1 + 0.37 * torch.arange(first, first + len(values), device=values.device)
    found = torch.autograd.grad((weights * values).sum(), list(learned.values()), allow_unused=True)
    if all(gradient is None for gradient in found):
        return values.detach(), None
    filled = [torch.zeros_like(one) if gradient is None else gradient for gradient, one in zip(found, learned.values())]
    return values.detach(), filled


def _only(given: Given, row: int, rows: str) -> dict[str, torch.Tensor]:
    """Return one row alone, as wide as it is."""
    found = {name: tensor[row : row + 1] if tensor.ndim else tensor for name, tensor in given.items()}
    for name in (name for name in ARGUMENTS[rows] if name.endswith("mask")):
        width, answers = int(found[name].sum(-1).max()), int(found[name].any(-1).sum())
        side = name.removesuffix("mask")
        for other in (other for other in (name, f"{side}logps", f"ref_{side}logps", *OF_TOKENS) if other in found):
            found[other] = found[other][..., :width] if found[other].ndim == 2 else found[other][:, :answers, :width]
        if "scores" in found and rows == "rank":
            found["scores"] = found["scores"][:, :answers]
    return found


def _side_by_side(
    together: Sequence[torch.Tensor], alone: Sequence[Sequence[torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients of rows together and alone, in one line each; alone, what lies behind a row's end has none."""
    for_all = torch.cat([gradient.reshape(-1) for gradient in together])
    padded = [torch.zeros_like(gradient) for gradient in together]
    for row, found in enumerate(alone):
        for whole, gradient in zip(padded, found):
            whole[row][tuple(slice(length) for length in gradient.shape[1:])] = gradient[0]
    return for_all, torch.cat([gradient.reshape(-1) for gradient in padded])


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    scale = max(1e-12, float(one.abs().max()), float(other.abs().max()))
    return bool((one - other).abs().max() > SAME * scale)


def _said(what: str, together: torch.Tensor, alone: torch.Tensor) -> str:
    at = int((together - alone).abs().argmax())
    found = f"{float(together[at]):.6g} beside other rows and {float(alone[at]):.6g} alone"
    return f"the loss cannot be split: the {what} of row {at + 1} is {found}"


# ---- rows that nobody sampled, for lint ----


def tried(call: Callable[..., Any], rows: str, params: Mapping[str, Any], columns: Sequence[str], where: str) -> list[str]:
    """Return what is wrong with a loss, tried on made-up rows: called in a process of its own."""
    loss = RowLoss(call, params, rows, where)
    try:
        return next((found for point in points(made_up(rows, columns), rows) if (found := list(problems(loss, point)))), [])
    except UsageError as error:
        return [error.what]


# Lengths of the answers of made-up rows; a ranking has several, and some have less of them.
MADE_UP: dict[str, list[Any]] = {
    **{"mask": [3, 5, 1, 4], "chosen_mask": [3, 5, 1, 4], "rejected_mask": [4, 2, 6, 3]},
    "rank": [[3, 5, 2], [4, 1, 0], [2, 2, 6], [5, 3, 0]],
}


def made_up(rows: str, columns: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return four rows of several lengths, their references and columns, the same each time."""
    drawn = torch.Generator().manual_seed(0)
    given: dict[str, torch.Tensor] = {}
    for name in (name for name in ARGUMENTS[rows] if name.endswith("mask")):
        lengths = torch.tensor(MADE_UP["rank" if rows == "rank" else name])
        mask = torch.arange(int(lengths.max())) < lengths[..., None]
        side = name.removesuffix("mask")
        logps = -2 * torch.rand(mask.shape, generator=drawn, dtype=torch.float64)
        given |= {name: mask, f"{side}logps": logps * mask}
        given[f"ref_{side}logps"] = (logps - 0.2 * torch.rand(mask.shape, generator=drawn, dtype=torch.float64)) * mask
    if rows == "kd":
        given |= {"teacher_logps": given.pop("ref_logps"), "divergence": (0.01 + given["logps"] ** 2) * given["mask"]}
    if rows == "rank":
        given["scores"] = torch.tensor([3.0, 1.5, 1.0]).double() * given["mask"].any(-1)
    given |= {"label": torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64), KL: torch.tensor(0.1, dtype=torch.float64)}
    return given | {
        name: torch.rand(4, generator=drawn, dtype=torch.float64) for name in columns if name not in (*given, WEIGHT)
    }
