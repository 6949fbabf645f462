"""What can be said of a user's function before it scores anything: its parameters, its doctests, and the gold answers.

A reward is a plain function in a file, named `file.py:function`; nothing to import, nothing to register. Parameters are read
from the source; doctests and gold answers run in worker processes. Only `score_batch`, for a debugger, runs the function in
this process. How a function is called: `selfkd.rewards.contract`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from selfkd.core.pool import Function
from selfkd.core.wording import did_you_mean
from selfkd.rewards.advice import way_out
from selfkd.rewards.contract import CONTRACT, PLURAL, TRL_EXTRAS, Parameters, Result, Row
from selfkd.rewards.find import definition, parameters, required
from selfkd.rewards.load import load
from selfkd.rewards.pool import cut, loaded, question, spread

FORMS = ("{}", "Answer: {}", "#### {}", "\\boxed{{{}}}", "<answer>{}</answer>")  # ways in which gold answers are stated
GOLD_BATCH = 256  # prompts
GOLD_NAMES = ("solution", "ground_truth", "gold", "target", "label")  # in functions written for other data sets
OTHER_NAME = " The gold answer is called 'answer'; under another name it needs a column of its own."

# ----------------------------------------------------------------------------------------------------------- parameters


def check_parameters(function: Function, columns: Collection[str] | None) -> list[str]:
    """Return the problems with the parameters, one sentence each; `columns` are the meta columns, None where not known.

    They are read from the source. Of a name that the file imports, assigns or decorates, a worker that loads it tells them.
    """
    node = definition(function)
    where = f"{function.path}:{node.lineno}  {function.name}" if node else f"{function.path}  {function.name}"
    takes = signature(function)
    by_place = [argument.arg for argument in node.args.posonlyargs] if node else []
    sentences = [f": '{name}' can only be given by position; names are the contract" for name in by_place]
    sentences += [*_unknown(takes, function, columns), *_unused(takes, function), *_mixed(takes, function)]
    return [f"{where}{sentence}" for sentence in sentences]


def signature(function: Function) -> Parameters:
    """Return what the function can be given by name: from its source where that tells, else from a worker that loads it."""
    node = definition(function)
    if node is None:
        return loaded(function)
    return Parameters(tuple(parameters(node)), frozenset(required(node)), node.args.kwarg is not None)


def _unknown(takes: Parameters, function: Function, columns: Collection[str] | None) -> Iterator[str]:
    """Yield the required parameters that nothing will fill."""
    if columns is None:
        return
    also = f" (meta columns: {', '.join(sorted(columns))})" if columns else ""
    known = {*CONTRACT, *function.params, *columns, *(TRL_EXTRAS if takes.grouped else ())}
    for name in takes.names:
        if name in takes.required and name not in known:
            hint = OTHER_NAME if name in GOLD_NAMES else did_you_mean(name, (*CONTRACT, *columns))
            yield f" asks for '{name}', which is neither {', '.join(CONTRACT)} nor a meta column{also}.{hint}"


def _unused(takes: Parameters, function: Function) -> Iterator[str]:
    """Yield the entries of the step's `params` that the function does not take."""
    for name in function.params:
        if name not in takes.names and not takes.everything:
            yield f" has no parameter '{name}'.{did_you_mean(name, takes.names)}"


def _mixed(takes: Parameters, function: Function) -> Iterator[str]:
    """Yield the parameters of one sample beside lists over a group."""
    if any(name in PLURAL for name in takes.names):
        for name in ("completion", "sample"):
            if name in takes.names and name not in function.params:
                yield f" asks for '{name}' of one sample and for lists over a group; take '{name}s'"


# ------------------------------------------------------------------------------------------------------ in worker processes


def run_doctests(function: Function, timeout: float = 60.0) -> list[str]:
    """Run the doctests of the function's file in a worker, from a copy in an empty folder; return their failures."""
    failures: list[str] = question(function, "doctests", timeout)
    raised = (failure.partition(" raises ")[2] for failure in failures)
    fixes = dict.fromkeys(fix for reason in raised if (fix := way_out(reason, str(function.path), function.environment)))
    return [*failures, *fixes]


def read_notes(function: Function, timeout: float = 60.0) -> Any:
    """Return what the function's file says of this host (its `notes()`), for a step's notes; None where it defines none."""
    node = definition(replace(function, name="notes"))
    return question(function, "notes", timeout) if node and not required(node) else None


def check_gold(function: Function, prompts: Iterable[Row], timeout: float = 10.0) -> tuple[int, int, str]:
    """Score each gold answer as if it were the completion; return (passed, total, first failure). Above one half passes.

    An answer may be stated in any usual form (FORMS), since a format check is right to refuse a bare number. Prompts without an
    answer do not count, and a function that never looks at the answer has nothing to pass: (0, 0, "").
    `prompts` have the keys id, prompt, answer and meta.
    """
    node = definition(function)
    if node and not {"answer", "answers"} & set(parameters(node)):
        return 0, 0, ""
    left = [row for row in prompts if row.get("answer") is not None]
    total, first = len(left), ""
    for form in FORMS:
        batches = cut((state_answer(row, form) for row in left), GOLD_BATCH)
        results = [result for batch in spread(function, batches, 1, timeout) for result in batch]
        failures = [(row, result) for row, result in zip(left, results, strict=True) if not (result[0] or 0) > 0.5]
        if failures and not first:
            row, result = failures[0]
            first = f"prompt {row['id']}, answer {row['answer']!r}: {describe(*result)}"
        left = [row for row, _ in failures]
    return total - len(left), total, first if left else ""


def state_answer(row: Row, form: str) -> dict[str, Any]:
    """Return the row of a sample that states the prompt's gold answer in this form."""
    completion = form.format(row["answer"])
    return {**row, "group": row["id"], "completion": completion, "sample": {}, "token_ids": []}


def describe(value: float | None, why: str) -> str:
    return why if value is None else f"scored {value:g} {why}".rstrip()


# ------------------------------------------------------------------------------------------------------- in this process


def score_batch(function: Function, rows: Sequence[Row]) -> list[Result]:
    """Return (value, why) of each row, scored in this process: no deadline, no memory cap, and the function's prints are seen.

    A row has the keys group, prompt, completion, answer, meta (a dict or its JSON text), sample and token_ids.
    """
    results: list[Result] = [(None, "")] * len(rows)
    for place, value, why in load(function.path, function.name, function.params).results(rows):
        results[place] = (value, why)
    return results
