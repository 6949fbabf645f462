"""Calling a user's function by the names of its parameters, and reading what it returns. Runs inside the worker processes.

Names are the contract. A function receives only what it names:

    prompt completion answer meta sample          of one sample: text of the last user message, the reply, the gold answer,
                                                  the prompt's meta columns (a dict), the sample's light columns (a dict)
    <a meta column> or a key of `params:`         by its own name
    prompts completions answers metas samples     lists over all samples of one prompt: the function is called once per
    completion_ids                                prompt and returns a list, so a majority vote is an ordinary reward

Beside a plural, `prompt`, `answer`, `meta` and meta columns are the prompt's own single values, except in a TRL reward
function (a plural and `**kwargs`), where all columns are lists as TRL gives them. TRL passes lists of messages for
conversational prompts; here prompts and completions are always texts. `async def` is awaited. A function that asks for an
answer (without a default) is not called for a prompt that has none: a comparison with None would be a quiet zero.

A failure is a value with a reason, never a zero: `(None, "ValueError: ...")`. Imports the standard library only, so that a
worker starts fast.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import json
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

Row = Mapping[str, Any]
Result = tuple[float | None, str]
Placed = tuple[int, float | None, str]

ABSTAINED = "abstained"
SINGULAR = ("prompt", "completion", "answer", "meta", "sample")
PLURAL = {f"{name}s": name for name in SINGULAR} | {"completion_ids": "token_ids"}  # name -> the key of a row behind it
CONTRACT = (*SINGULAR, *PLURAL)
TRL_COLUMNS = ("prompts", "completions", "completion_ids", "answer")  # what `**kwargs` of a TRL function gets of the contract
WHY_CHARS = 300  # a reason must fit into a table
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")  # differs from process to process; a reason is part of a digest


class Missing:
    """Stands for a value that a row does not have, which is not the same as the value None."""


class Unscored(Exception):
    """The function cannot be asked about this row; the message is the whole reason."""


# -------------------------------------------------------------------------------------------------------------- calling


@dataclass(frozen=True)
class Reward:
    """A loaded function and how to call it. `required` are parameters without a default; `everything` is a `**kwargs`."""

    call: Callable[..., Any]
    params: Mapping[str, Any]
    module: ModuleType
    names: tuple[str, ...]
    required: frozenset[str]
    everything: bool

    @property
    def grouped(self) -> bool:
        """Whether one call takes all samples of a prompt: a plural is named, or there is nothing but `**kwargs`."""
        return any(name in PLURAL for name in self.names) or (self.names == () and self.everything)

    @property
    def trl(self) -> bool:
        """Whether this is a reward function in TRL's form, where every column is a list."""
        return self.grouped and self.everything

    def wants(self) -> frozenset[str] | None:
        """Return the keys of a row that the function can see, None for all: the rest need not be sent to a worker."""
        if self.everything:
            return None
        return keys_of(self.names, self.params) | ({"group"} if self.grouped else set())

    def results(self, rows: Sequence[Row], before_call: Callable[[int], None] | None = None) -> Iterator[Placed]:
        """Yield (place, value, why) of each row. `before_call` gets the place of the first row of the next call."""
        for places in self.units(rows):
            if before_call is not None:
                before_call(places[0])
            values = self.score([rows[place] for place in places])
            for place, (value, why) in zip(places, values, strict=True):
                yield place, value, why

    def units(self, rows: Sequence[Row]) -> Iterable[list[int]]:
        """Return the places of the rows of each call: one row, or those of one prompt."""
        if not self.grouped:
            return ([place] for place in range(len(rows)))
        groups: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(row["group"], []).append(place)
        return groups.values()

    def score(self, rows: Sequence[Row]) -> list[Result]:
        """Call once. Whatever goes wrong inside is the reason that these rows have no value."""
        try:
            arguments = self.arguments(rows)
            returned = self.call(**arguments)
            if inspect.isawaitable(returned):
                returned = event_loop().run_until_complete(awaited(returned))
            return read_values(returned, len(rows)) if self.grouped else [read_value(returned)]
        except (Exception, SystemExit) as error:  # sys.exit() is the function's own doing
            return [(None, reason_of(error))] * len(rows)

    def arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return what the function is called with; Unscored where it requires a value that the prompt does not have."""
        metas = [meta_of(row) for row in rows]
        found: dict[str, Any] = {}
        for name in self.names:
            if name in self.params:
                continue
            value = self.value(name, rows, metas)
            if value is not Missing:
                found[name] = value
            elif name in self.required:
                raise Unscored(f"this prompt has no {name}" if name == "answer" else f"no '{name}' in the meta of this prompt")
        found |= self.params
        return found | self.rest(rows, metas, found) if self.everything else found

    def value(self, name: str, rows: Sequence[Row], metas: Sequence[Mapping[str, Any]]) -> Any:
        """Return what the parameter `name` receives; Missing where the prompt has no answer, or no such meta column.

        `rows` are one sample, or all samples of one prompt. This and the module's docstring say the same.
        """
        if name in PLURAL:
            return column(PLURAL[name], rows, metas)
        if name == "answer" and rows[0].get("answer") is None:
            return Missing
        if name in SINGULAR:
            values = column(name, rows, metas)
        elif name in metas[0]:
            values = [meta.get(name) for meta in metas]
        else:
            return Missing
        if self.trl:
            return values
        return values[0]  # the one sample's, or what all samples of a prompt share

    def rest(self, rows: Sequence[Row], metas: Sequence[Mapping[str, Any]], named: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `**kwargs` receives beside what is `named`: meta columns and the contract, lists in a TRL function."""
        offered = dict.fromkeys((*metas[0], *(TRL_COLUMNS if self.trl else SINGULAR)))
        values = {name: self.value(name, rows, metas) for name in offered if name not in named}
        return {name: value for name, value in values.items() if value is not Missing}


def meta_of(row: Row) -> Mapping[str, Any]:
    """Return the meta columns of the row's prompt, which may come as JSON text."""
    meta = row.get("meta")
    found: Mapping[str, Any] = json.loads(meta) if isinstance(meta, str) else meta or {}
    return found


def column(key: str, rows: Sequence[Row], metas: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return what each row has under `key`; the meta columns as dicts, whatever form they came in."""
    return list(metas) if key == "meta" else [row.get(key) for row in rows]


def keys_of(names: Iterable[str], params: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys of a row behind parameter names; a name outside the contract is a meta column."""
    behind = {name: name for name in SINGULAR} | PLURAL
    return frozenset(behind.get(name, "meta") for name in names if name not in params)


async def awaited(value: Any) -> Any:
    """Turn whatever can be awaited into the coroutine that an event loop runs."""
    return await value


@cache
def event_loop() -> asyncio.AbstractEventLoop:
    """Return the one event loop of this process: a client that an async function keeps is bound to its loop."""
    import asyncio  # here: only async rewards need it, and it was 18 of the 43 ms of a worker's imports

    return asyncio.new_event_loop()


# -------------------------------------------------------------------------------------------------------------- loading


def load(path: str | Path, name: str, params: Mapping[str, Any] | None = None) -> Reward:
    """Run the file and take the function out of it. Whatever the file raises comes through."""
    module = load_module(Path(path))
    call = getattr(module, name)
    parameters = list(inspect.signature(call).parameters.values())
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    import_ahead(call, module)
    return Reward(
        call,
        dict(params or {}),
        module,
        names=tuple(one.name for one in named),
        required=frozenset(one.name for one in named if one.default is one.empty),
        everything=any(one.kind is one.VAR_KEYWORD for one in parameters),
    )


def load_module(path: Path) -> ModuleType:
    """Run the file as a module of its own. Its folder goes *last* on the path: reward/math.py must not become `import math`."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"selfkd_file_{path.stem}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    # Not through importlib: its cache cannot tell apart two versions of one length written within one second.
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module


def import_ahead(call: Callable[..., Any], module: ModuleType) -> None:
    """Make the imports inside the function now, so that its first sample does not pay for them.

    Importing sympy takes a second on an idle machine; on a busy one the first sample of each worker would be late.
    """
    seen: set[CodeType] = set()
    waiting = [code for code in [getattr(inspect.unwrap(call), "__code__", None)] if code]
    while waiting:
        code = waiting.pop()
        seen.add(code)
        around = [getattr(vars(module).get(name), "__code__", None) for name in code.co_names]
        waiting += [other for other in (*code.co_consts, *around) if isinstance(other, CodeType) and other not in seen]
        for name in imported_names(code):
            try:
                importlib.import_module(name)
            except Exception:  # the function meets this error itself, and its samples carry the reason
                continue


def imported_names(code: CodeType) -> Iterator[str]:
    return (step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME" and step.argval)


# -------------------------------------------------------------------------------------------------------------- reading


def read_value(returned: Any) -> Result:
    """Return what one sample's function returned, as (value, why)."""
    why = ""
    if isinstance(returned, tuple):
        if len(returned) != 2:
            return None, f"returned a tuple of {len(returned)}, expected (value, why)"
        returned, why = returned[0], without_addresses(returned[1])[:WHY_CHARS]
    if returned is None:
        return None, f"{ABSTAINED}: {why}" if why else ABSTAINED
    if type(returned) not in (float, int, bool):
        returned = scalar(returned)
    if not isinstance(returned, numbers.Real):
        return None, f"returned {type(returned).__name__} {without_addresses(returned)[:60]!r}, expected a number"
    try:
        value = float(returned)
    except OverflowError:
        return None, "returned a number that is too large"
    return (value, why) if math.isfinite(value) else (None, f"returned {value}")


def scalar(value: Any) -> Any:
    """Return the Python number inside a numpy or torch scalar; anything else as it is."""
    try:
        return value.item() if callable(getattr(value, "item", None)) else value
    except (ValueError, TypeError, RuntimeError):
        return value


def read_values(returned: Any, count: int) -> list[Result]:
    """Return one result per sample of a group; where the function did not return a list of that length, none has a value."""
    values = returned.tolist() if callable(getattr(returned, "tolist", None)) else returned
    if not isinstance(values, list | tuple):
        return [(None, f"returned {type(returned).__name__}, expected a list of {count}")] * count
    if len(values) != count:
        return [(None, f"returned {len(values)} values for {count} completions")] * count
    return [read_value(value) for value in values]


def failed(value: float | None, why: str) -> bool:
    """Whether the function failed, which giving a value or abstaining (returning None) is not."""
    return value is None and not why.startswith(ABSTAINED)


def reason_of(error: BaseException) -> str:
    """Return `ValueError: first line`, short enough for a table."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, Unscored):
        return text
    return without_addresses(f"{type(error).__name__}: {text}".removesuffix(": "))[:WHY_CHARS]


def without_addresses(value: Any) -> str:
    return ADDRESS.sub("0x...", str(value))
