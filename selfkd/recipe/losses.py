"""What lint says of a loss that is a function: what it asks for against what its rows have, and whether it is row-wise on made-up rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfkd.backend.trainer.loss_kinds import ARGUMENTS, KL, LEARNED, WEIGHT
from selfkd.core.pool import Function
from selfkd.core.wording import did_you_mean, listed
from selfkd.rewards.check import located, signature
from selfkd.rewards.contract import Parameters
from selfkd.rewards.pool import question
from selfkd.steps import Step
from selfkd.steps.outlook import Outlook
from selfkd.steps.train import TrainStep

TRIAL = "selfkd.backend.trainer.row_loss:tried"  # runs beside the loss, in a worker: it needs torch
MEMORY_GB = 256.0  # of address space: what a build of torch for cards maps is more than a reward may have


def check_loss(function: Function, step: Step, seen: Outlook) -> list[str]:
    """Return the problems with the parameters of a train step's loss, one sentence each, with its file and line."""
    assert isinstance(step, TrainStep)
    columns = seen.row_columns.get((step.of, step.role), ())
    takes, rows = signature(function, MEMORY_GB), step.kind.rows
    found = [*_unknown(takes, function, rows, columns), *_unused(takes, function)]
    if step.kind.teacher:
        pass  # what it may not ask for was said: such rows have no reference
    elif not step.kind.reference:
        found += _without_reference(takes)
    elif not any(name.startswith("ref_") for name in takes.names) and step.reference is not None:
        found.append(" never looks at the reference model, which costs a pass over all rows: leave `reference` out")
    if not any(name in takes.names for name in LEARNED[rows]):
        found.append(f" asks for none of {listed(LEARNED[rows], 'or')}, so nothing could be learned from {rows} rows")
    return [f"{located(function)}{problem}" for problem in found]


def _unknown(takes: Parameters, function: Function, rows: str, columns: Sequence[str]) -> Iterator[str]:
    """Yield the required parameters that nothing will fill."""
    known = {*ARGUMENTS[rows], *function.params, *columns}
    for name in (name for name in takes.names if name in takes.required and name not in known):
        if name == WEIGHT:
            yield " asks for 'weight': the trainer multiplies each value with its row's weight already, and once is enough"
        elif kinds := [kind for kind, names in ARGUMENTS.items() if name in names]:
            yield f" asks for '{name}', which {rows} rows do not have: write `rows: {kinds[0]}` if it is for {kinds[0]} rows"
        else:
            there = f" (columns of the rows: {', '.join(columns)})" if columns else ""
            hint = did_you_mean(name, [*ARGUMENTS[rows], *columns])
            way = f" Write `columns: {{{name}: ...}}` in the build step, or give it in `params`."
            yield f" asks for '{name}', which its rows do not have{there}.{hint or way}"


def _unused(takes: Parameters, function: Function) -> Iterator[str]:
    for name in function.params:
        if name not in takes.names and not takes.everything:
            yield f" has no parameter '{name}'.{did_you_mean(name, takes.names)}"


def _without_reference(takes: Parameters) -> Iterator[str]:
    for name in takes.names:
        if (name.startswith("ref_") or name == KL) and name in takes.required:
            yield f" asks for '{name}', and the step names no reference model: write `reference: start`"


def try_loss(function: Function, step: Step) -> tuple[list[str], list[str]]:
    """Return what is wrong with a loss on made-up rows, tried in a worker; and what is only a remark: yours may hold other numbers."""
    assert isinstance(step, TrainStep)
    takes, rows = signature(function, MEMORY_GB), step.kind.rows
    columns = [name for name in takes.names if name in takes.required and name not in (*ARGUMENTS[rows], *function.params)]
    asked = {"rows": rows, "params": dict(function.params), "columns": columns, "where": located(function)}
    found: list[str] = question(function, (TRIAL, asked), memory_gb=MEMORY_GB)
    said = [f"{located(function)}: {problem}" for problem in found]
    if columns and any(word in problem for problem in found for word in ("raised", "not finite")):
        return [], [f"{text}, on made-up rows with made-up {listed(columns)}" for text in said]
    return said, []
