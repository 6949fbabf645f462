"""Rewards as their users see them: finding a function, checking its parameters, trying it. Calling it: `selfkd.rewards.contract`.

A reward is a plain function in a file, named `file.py:function`; nothing to import, nothing to register. Nothing of a user's
is run here in the driver's own process except by `score_batch`: parameters are read from the source, and doctests, gold
checks and scoring happen in worker processes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from selfkd.core.pool import Function
from selfkd.core.wording import did_you_mean
from selfkd.rewards.contract import CONTRACT, PLURAL, Result, Row, load
from selfkd.rewards.contract import failed as failed
from selfkd.rewards.find import definition, required
from selfkd.rewards.pool import ask, cut, spread

FORMS = ("{}", "Answer: {}", "#### {}", "\\boxed{{{}}}", "<answer>{}</answer>")  # ways in which gold answers are stated


# ------------------------------------------------------------------------------------------------------------- checking


def parameter_problems(function: Function, columns: Collection[str] | None) -> list[str]:
    """Problems with the function's parameters, one sentence each; `columns` are the meta columns, None where not known.

    Read from the source, nothing is run; a name that the file imports or assigns has no parameters to read.
    """
    node = definition(function)
    if node is None:
        return []
    named = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
    where = f"{function.path}:{node.lineno}  {function.name}"
    found = [f"{where}: '{one.arg}' can only be given by position; names are the contract" for one in node.args.posonlyargs]
    for name in required(node):
        if name not in CONTRACT and name not in function.params and columns is not None and name not in columns:
            hint = did_you_mean(name, (*CONTRACT, *columns))
            also = f" (meta columns: {', '.join(sorted(columns))})" if columns else ""
            found.append(f"{where} asks for '{name}', which is neither {', '.join(CONTRACT)} nor a meta column{also}.{hint}")
    for name in function.params:
        if name not in named and node.args.kwarg is None:
            found.append(f"{where} has no parameter '{name}'.{did_you_mean(name, named)}")
    if any(name in PLURAL for name in named):
        for name in ("completion", "sample"):
            if name in named and name not in function.params:
                found.append(f"{where} asks for '{name}' of one sample and for lists over a group; take '{name}s'")
    return found


# ------------------------------------------------------------------------------------------- for lint, try and the steps


def score_batch(function: Function, rows: Sequence[Row]) -> list[Result]:
    """(value, why) of each row, in this process: no deadline, no memory cap, and the function's prints are seen.

    A row has the keys group, prompt, completion, answer, meta (a dict or its JSON text), sample and token_ids.
    """
    results: list[Result] = [(None, "")] * len(rows)
    for place, value, why in load(function.path, function.name, function.params).results(rows):
        results[place] = (value, why)
    return results


def doctests(function: Function, timeout: float = 60.0) -> list[str]:
    """Failures of the doctests of the function's file, run in a worker."""
    found: list[str] = ask(function, "doctests", timeout)
    return found


def notes(function: Function, timeout: float = 60.0) -> Any:
    """What the function's file has to say of this host (its `notes()`), for a step's notes; None where it defines none."""
    node = definition(replace(function, name="notes"))
    return ask(function, "notes", timeout) if node and not required(node) else None


def gold_check(function: Function, prompts: Iterable[Row], timeout: float = 10.0) -> tuple[int, int, str]:
    """(passed, total, first failure) with each gold answer scored as if it were the completion; passing is above one half.

    An answer may be stated in any usual form (FORMS), since a format check is right to refuse a bare number. Prompts without an
    answer do not count, and a function that never looks at the answer has nothing to pass: (0, 0, "").
    `prompts` have the keys id, prompt, answer and meta.
    """
    node = definition(function)
    named = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)] if node else ["answer"]
    if not {"answer", "answers"} & set(named):
        return 0, 0, ""
    left = [row for row in prompts if row.get("answer") is not None]
    total, first = len(left), ""
    for form in FORMS:
        batches = cut((stated(row, form) for row in left), 256)
        results = [result for batch in spread(function, batches, 1, timeout) for result in batch]
        failures = [(row, result) for row, result in zip(left, results, strict=True) if not (result[0] or 0) > 0.5]
        first = first or next(
            (f"prompt {row['id']}, answer {row['answer']!r}: {described(*result)}" for row, result in failures), ""
        )
        left = [row for row, _ in failures]
    return total - len(left), total, first if left else ""


def described(value: float | None, why: str) -> str:
    return why if value is None else f"scored {value:g} {why}".rstrip()


def stated(row: Row, form: str) -> dict[str, Any]:
    completion = form.format(row["answer"])
    return {**row, "group": row["id"], "completion": completion, "sample": {}, "token_ids": []}
