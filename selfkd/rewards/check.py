"""What can be said of a user's function before it scores anything: its parameters, its doctests, and the gold answers.

A reward is a plain function in a file, named `file.py:function`; nothing to import, nothing to register. Parameters are read
from the source; doctests and gold answers run in worker processes. Only `score_batch`, for a debugger, runs the function in
this process. How a function is called: `selfkd.rewards.contract`.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selfkd.core.pool import Function
from selfkd.core.wording import did_you_mean
from selfkd.rewards import restate
from selfkd.rewards.advice import way_out
from selfkd.rewards.contract import CONTRACT, GOLD_NAMES, PLURAL, TRL_EXTRAS, Parameters, Result, Row, told
from selfkd.rewards.contract import failed as unscored
from selfkd.rewards.find import definition, parameters, required
from selfkd.rewards.load import load
from selfkd.rewards.pool import MEMORY_GB, cut, loaded, question, spread

GOLD_BATCH = 256  # completions
TRIED_ROWS = 20  # in every form, and with near misses
SHOWN_CHARS = 120  # of a text that is told of
OTHER_NAMES = (*GOLD_NAMES, "gold", "target", "label")  # of gold answers, in functions written for other data
OTHER_NAME = " The gold answer is called 'answer'; under another name it needs a column of its own."

# ----------------------------------------------------------------------------------------------------------- parameters


def check_parameters(function: Function, columns: Collection[str] | None) -> list[str]:
    """Return the problems with the parameters, one sentence each; `columns` are the meta columns, None where not known.

    They are read from the source. Of a name that the file imports, assigns or decorates, a worker that loads it tells them.
    """
    node, where, takes = definition(function), located(function), signature(function)
    by_place = [argument.arg for argument in node.args.posonlyargs] if node else []
    sentences = [f": '{name}' can only be given by position; names are the contract" for name in by_place]
    sentences += [*_unknown(takes, function, columns), *_unused(takes, function), *_mixed(takes, function)]
    return [f"{where}{sentence}" for sentence in sentences]


def located(function: Function) -> str:
    """Return the file and line at which a function is defined, and its name."""
    node = definition(function)
    return f"{function.path}:{node.lineno}  {function.name}" if node else f"{function.path}  {function.name}"


def signature(function: Function, memory_gb: float = MEMORY_GB) -> Parameters:
    """Return what the function can be given by name: from its source where that tells, else from a worker that loads it."""
    node = definition(function)
    if node is None:
        return loaded(function, memory_gb)
    return Parameters(tuple(parameters(node)), frozenset(required(node)), node.args.kwarg is not None)


def _unknown(takes: Parameters, function: Function, columns: Collection[str] | None) -> Iterator[str]:
    """Yield the required parameters that nothing will fill."""
    if columns is None:
        return
    also = f" (meta columns: {', '.join(sorted(columns))})" if columns else ""
    given = (*TRL_EXTRAS, *(GOLD_NAMES if takes.everything else ())) if takes.grouped else ()
    known = {*CONTRACT, *function.params, *columns, *given}
    for name in takes.names:
        if name in takes.required and name not in known:
            hint = OTHER_NAME if name in OTHER_NAMES else did_you_mean(name, (*CONTRACT, *columns))
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


def run_doctests(function: Function, timeout: float = 60.0, memory_gb: float = MEMORY_GB) -> list[str]:
    """Run the doctests of the function's file in a worker, from a copy in an empty folder; return their failures."""
    failures: list[str] = question(function, "doctests", timeout, memory_gb)
    raised = (failure.partition(" raises ")[2] for failure in failures)
    fixes = dict.fromkeys(fix for reason in raised if (fix := way_out(reason, str(function.path), function.environment)))
    return [*failures, *fixes]


def read_notes(function: Function, timeout: float = 60.0) -> Any:
    """Return what the function's file says of this host (its `notes()`), for a step's notes; None where it defines none."""
    node = definition(replace(function, name="notes"))
    return question(function, "notes", timeout) if node and not required(node) else None


@dataclass(frozen=True)
class GoldCheck:
    """What a reward makes of gold answers; a mark above one half passes.

    `failure` is the first answer that passes in no form; `unread` are those that the reward fails on in every form, as
    (place among the prompts, answer, reason): no completion of such a prompt can be scored. `forms` are those in which half of the answers or more pass; `uneven` is an
    answer that passes in another form, but not in one of these. `accepted` of `near` wrong answers pass; `example` is the first.
    """

    passed: int = 0
    total: int = 0
    failure: str = ""
    unread: tuple[tuple[int, str, str], ...] = ()
    forms: tuple[str, ...] = ()
    uneven: str = ""
    accepted: int = 0
    near: int = 0
    example: str = ""


def check_gold(function: Function, prompts: Iterable[Row], timeout: float = 10.0) -> GoldCheck:
    """Score the gold answers as completions state them (`restate.FORMS`), and answers that are nearly right.

    An answer may pass in any form that the reward takes, since a format check is right to refuse the others. Which ones it takes,
    and what it makes of near misses, is tried on a few rows. Prompts without an answer do not count, and a function that never
    looks at the answer has nothing to pass. `prompts` have the keys id, prompt, answer and meta.
    """
    node = definition(function)
    if node and not looks_at_gold(node):
        return GoldCheck()
    rows = [{**row, "place": place} for place, row in enumerate(prompts) if row.get("answer") is not None]
    tried = rows[:: -(-len(rows) // TRIED_ROWS) or 1]
    forms, uneven = _forms_taken(function, tried, timeout)
    failures = _failures(function, rows, forms or restate.ALL, timeout)
    failed = {row["id"] for row, *_ in failures}
    wrong, near = _accepted_near_misses(function, [row for row in tried if row["id"] not in failed], forms, timeout)
    return GoldCheck(
        passed=len(rows) - len(failures),
        total=len(rows),
        failure=next(
            (
                f"prompt {row['id']}, answer {row['answer']!r}: {describe(function.name, *result)}"
                for row, result, _ in failures
            ),
            "",
        ),
        unread=tuple((row["place"], str(row["answer"]), result[1]) for row, result, always in failures if always),
        forms=forms,
        uneven=uneven,
        accepted=len(wrong),
        near=near,
        example=wrong[0] if wrong else "",
    )


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def looks_at_gold(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a function names the gold answer: as a parameter, or as a key of its `**kwargs`."""
    named = {"answer", "answers", *GOLD_NAMES}
    keys = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return bool(named & set(parameters(node))) or (node.args.kwarg is not None and bool(named & keys))


def _forms_taken(function: Function, rows: Sequence[Row], timeout: float) -> tuple[tuple[str, ...], str]:
    """Return the forms in which half of the answers or more pass, and an answer that does not though it does in another form."""
    stated = [(row, form) for row in rows for form in restate.forms(str(row["answer"]))]
    results = _scored(function, [(row, form.format(row["answer"])) for row, form in stated], timeout)
    tried = [(row, form, result) for (row, form), result in zip(stated, results, strict=True)]
    passed = [(row["id"], form) for row, form, result in tried if _passes(result)]
    taken = Counter(form for _, form in passed)
    forms = tuple(form for form in restate.ALL if taken[form] * 2 >= sum(form == one for _, one in stated) > 0)
    some = {name for name, _ in passed}
    left_out = (
        f"{form.format(row['answer'])!r} where the answer is {row['answer']!r}{_by_failing(function, result)}"
        for row, form, result in tried
        if form in forms and row["id"] in some and (row["id"], form) not in passed
    )
    return forms, next(left_out, "")


def _by_failing(function: Function, result: Result) -> str:
    return f", on which it failed: {told(function.name, result[1])}" if unscored(*result) else ""


def _failures(function: Function, rows: Sequence[Row], forms: Sequence[str], timeout: float) -> list[tuple[Row, Result, bool]]:
    """Return the rows whose gold answer passes in no form, with what each got in the first, and whether every form failed."""
    left, first, scored = list(rows), dict[str, Result](), set[str]()
    for form in forms:
        results = _scored(function, [(row, form.format(row["answer"])) for row in left], timeout)
        failed = [(row, result) for row, result in zip(left, results, strict=True) if not _passes(result)]
        first = {row["id"]: result for row, result in failed} | first
        scored |= {row["id"] for row, result in failed if not unscored(*result)}
        left = [row for row, _ in failed]
    return [(row, first[row["id"]], row["id"] not in scored) for row in left]


def _accepted_near_misses(
    function: Function, rows: Sequence[Row], forms: Sequence[str], timeout: float
) -> tuple[list[str], int]:
    """Return the near misses that pass, each with the answer that they miss, and how many were tried."""
    form = forms[0] if forms else restate.BARE
    others = [*rows[1:], *rows[:1]]
    pairs = [
        (row, form.format(text))
        for row, other in zip(rows, others, strict=True)
        for text in restate.near_misses(str(row["answer"]), str(other["answer"]))
    ]
    results = _scored(function, pairs, timeout)
    wrong = [
        f"{_short(text)!r} where the answer is {_short(row['answer'])!r}"
        for (row, text), result in zip(pairs, results, strict=True)
        if _passes(result)
    ]
    return wrong, len(pairs)


def _scored(function: Function, pairs: Sequence[tuple[Row, str]], timeout: float) -> list[Result]:
    """Return the results of completions, each for the prompt beside it and in a group of its own."""
    rows = (
        {**row, "group": str(place), "completion": text, "sample": {}, "token_ids": []}
        for place, (row, text) in enumerate(pairs)
    )
    return [result for batch in spread(function, cut(rows, GOLD_BATCH), 1, timeout) for result in batch]


def _passes(result: Result) -> bool:
    return (result[0] or 0.0) > 0.5


def describe(name: str, value: float | None, why: str) -> str:
    return told(name, why) if value is None else f"scored {value:g} {why}".rstrip()


# ------------------------------------------------------------------------------------------------------- in this process


def score_batch(function: Function, rows: Sequence[Row]) -> list[Result]:
    """Return (value, why) of each row, scored in this process: no deadline, no memory cap, and the function's prints are seen.

    A row has the keys group, prompt, completion, answer, meta (a dict or its JSON text), sample and token_ids.
    """
    results: list[Result] = [(None, "")] * len(rows)
    for place, value, why in load(function.path, function.name, function.params).results(rows):
        results[place] = (value, why)
    return results
