"""Calling a user's function by the names of its parameters, and reading what it returns. Runs inside the worker processes.

Names are the contract. A function receives only what it names:

    prompt completion answer meta sample          of one sample: text of the last user message, the reply, the gold answer,
                                                  the prompt's meta columns (a dict), the sample's light columns (a dict)
    <a meta column> or a key of `params:`         by its own name
    prompts completions answers metas samples     lists over all samples of one prompt: the function is called once per
    completion_ids                                prompt and returns a list, so a majority vote is an ordinary reward

    solution ground_truth                         in a TRL reward function the gold answer, by name or in `**kwargs`, where no meta
                                                  column has that name
    trainer_state log_metric log_extra            what TRL passes beside them: a state at its beginning, and calls that lead
                                                  nowhere

Beside a plural, `prompt`, `answer`, `meta` and meta columns are the prompt's own single values, except in a TRL reward
function (a plural and `**kwargs`), where all columns are lists as TRL gives them. `prompts` and `completions` are texts, or
lists of messages for a function that reads them so (`selfkd.rewards.messages`). `async def` is awaited. A function that asks
for an answer (without a default) is not called for a prompt that has none: a comparison with None would be a quiet zero.

A failure is a value with a reason, never a zero: `(None, "ValueError: ...")`. Imports the standard library only, so that a
worker starts fast. How a file is loaded: `selfkd.rewards.load`.
"""

from __future__ import annotations

import inspect
import json
import linecache
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import asyncio

Row = Mapping[str, Any]
Result = tuple[float | None, str]
Placed = tuple[int, float | None, str]

ABSTAINED = "abstained"

ABSENT = {"answer": "this prompt has no answer", "completion_ids": "the token ids of this completion are not known"}
SINGULAR = ("prompt", "completion", "answer", "meta", "sample")
PLURAL = {f"{name}s": name for name in SINGULAR} | {"completion_ids": "token_ids"}  # name -> the key of a row behind it
CONTRACT = (*SINGULAR, *PLURAL)
TRL_COLUMNS = ("prompts", "completions", "completion_ids", "answer")  # what `**kwargs` of a TRL function gets of the contract
GOLD_NAMES = ("solution", "ground_truth")  # what data sets for TRL call the gold answer
TRL_EXTRAS = ("trainer_state", "log_metric", "log_extra")  # what TRL passes beside columns
MOST = 1e100  # of a score, either way: sums of larger ones overflow
WHY_CHARS = 300  # a reason must fit into a table
AT_CHARS = 120  # of the place where it arose
MOST_FRAMES = 12  # of a trace, the innermost ones
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")  # differs from process to process; a reason is part of a digest


class Parameters(NamedTuple):
    """What a function can be given by name; `required` have no default, `everything` is a `**kwargs`."""

    names: tuple[str, ...]
    required: frozenset[str]
    everything: bool

    @property
    def grouped(self) -> bool:
        """Whether one call takes all samples of a prompt: a plural is named, or there is nothing but `**kwargs`."""
        return any(name in PLURAL for name in self.names) or (self.names == () and self.everything)


class Missing:
    """Stands for a value that a row does not have, which is not the same as the value None."""


class Unscored(Exception):
    """The function cannot be asked about this row; the message is the whole reason."""


class Reason(str):
    """Why a sample has no value, with the place in the user's files where that arose, such as 'right.py:12'.

    It is its text: the place is shown and never recorded, for a comment above it would move it, and with it a digest. `trace` holds
    the frames of the user's files, for a debugger in this process; it does not leave it.
    """

    at: str
    raised: bool
    trace: str

    def __new__(cls, text: str, at: str = "", raised: bool = False, trace: str = "") -> Reason:
        made = super().__new__(cls, text)
        made.at, made.raised, made.trace = at[:AT_CHARS], raised, trace
        return made

    def __reduce__(self) -> tuple[type[Reason], tuple[str, str, bool]]:
        return Reason, (str(self), self.at, self.raised)


def told(name: str, why: str) -> str:
    """Return a reason as a person reads it: 'right (right.py:12): IndexError: ...'."""
    at = getattr(why, "at", "")
    return f"{name} ({at}): {why}" if at else f"{name}: {why}"


# -------------------------------------------------------------------------------------------------------------- calling


@dataclass(frozen=True)
class Reward:
    """A loaded function and how to call it. `messages`: it reads prompts and completions as lists of messages."""

    call: Callable[..., Any]
    params: Mapping[str, Any]
    module: ModuleType
    takes: Parameters
    messages: bool = False
    copy: str = ""  # the file that was run, where it is a copy
    shown: str = ""  # how messages and its frames call the file
    line: int = 0  # where its definition begins; 0 where it has none

    @property
    def grouped(self) -> bool:
        return self.takes.grouped

    @property
    def trl(self) -> bool:
        """Whether this is a reward function in TRL's form, where every column is a list."""
        return self.grouped and self.takes.everything

    def wants(self) -> frozenset[str] | None:
        """Return the keys of a row that the function can see, None for all: the rest need not be sent to a worker."""
        if self.takes.everything:
            return None
        return keys_of(self.takes.names, self.params) | ({"group", "messages"} if self.grouped else set())

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
            values = read_values(returned, len(rows)) if self.grouped else [read_value(returned)]
            return [(value, Reason(why, self.defined) if failed(value, why) else why) for value, why in values]
        except (Exception, SystemExit) as error:  # sys.exit() is the function's own doing
            return [(None, self.raised(error))] * len(rows)

    @property
    def defined(self) -> str:
        """Return where the function is written."""
        return f"{_name(self.shown)}:{self.line}" if self.line else ""

    def raised(self, error: BaseException) -> Reason:
        """Return the reason of a call that raised, with the innermost line of the user's files that it came through."""
        reason = beside(reason_of(error), self.copy)
        if isinstance(error, Unscored):
            return Reason(reason)
        frames = list(self.frames(error))[-MOST_FRAMES:]
        lines = [f"  {at}, in {function}\n    {linecache.getline(file, line).strip()}" for at, function, file, line in frames]
        at = frames[-1][0] if frames else self.defined
        return Reason(reason, at, True, "\n".join(["Traceback, in your files only:", *lines, reason]))

    def frames(self, error: BaseException) -> Iterator[tuple[str, str, str, int]]:
        """Yield (place, function, file, line) of each frame of the function's file and of what lies beside it, the outermost first."""
        folder = (self.copy or str(self.module.__file__)).rpartition("/")[0] + "/"
        frame = error.__traceback__
        while frame is not None:
            file, line, code = frame.tb_frame.f_code.co_filename, frame.tb_lineno, frame.tb_frame.f_code
            beside_it = file.startswith(folder) and "/site-packages/" not in file
            if file == self.shown or beside_it:
                name = _name(file) if file == self.shown else file.removeprefix(folder)
                yield f"{name}:{line}", code.co_name, file, line
            frame = frame.tb_next

    def arguments(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return what the function is called with; Unscored where it requires a value that the prompt does not have."""
        metas = [meta_of(row) for row in rows]
        found: dict[str, Any] = {}
        for name in self.takes.names:
            if name in self.params:
                continue
            value = self.value(name, rows, metas)
            if value is not Missing:
                found[name] = value
            elif name in self.takes.required:
                raise Unscored(ABSENT.get(name, f"no '{name}' in the meta of this prompt"))
        found |= self.params
        return found | self.rest(rows, metas, found) if self.takes.everything else found

    def value(self, name: str, rows: Sequence[Row], metas: Sequence[Mapping[str, Any]]) -> Any:
        """Return what the parameter `name` receives; Missing where the prompt has no answer, or no such meta column.

        `rows` are one sample, or all samples of one prompt. This and the module's docstring say the same.
        """
        if self.grouped and name in TRL_EXTRAS:
            return trainer_state() if name == "trainer_state" else unheard
        if name in ("prompts", "completions") and self.messages:
            return [conversation(row) if name == "prompts" else reply(row) for row in rows]
        if name in PLURAL:
            values = column(PLURAL[name], rows, metas)
            return Missing if name == "completion_ids" and None in values else values
        if name == "answer" and rows[0].get("answer") is None:
            return Missing
        if name in SINGULAR:
            values = column(name, rows, metas)
        elif name in metas[0]:
            values = [meta.get(name) for meta in metas]
        else:
            return self.value("answer", rows, metas) if self.trl and name in GOLD_NAMES else Missing
        if self.trl:
            return values
        return values[0]  # the one sample's, or what all samples of a prompt share

    def rest(self, rows: Sequence[Row], metas: Sequence[Mapping[str, Any]], named: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `**kwargs` receives beside what is `named`: meta columns and the contract, lists in a TRL function."""
        offered = dict.fromkeys((*metas[0], *((*TRL_COLUMNS, *GOLD_NAMES, *TRL_EXTRAS) if self.trl else SINGULAR)))
        values = {name: self.value(name, rows, metas) for name in offered if name not in named}
        return {name: value for name, value in values.items() if value is not Missing}


def _name(file: str) -> str:
    return file.rpartition("/")[2]


def conversation(row: Row) -> list[dict[str, Any]]:
    """Return the messages of the row's prompt, a list of its own."""
    return [dict(message) for message in row.get("messages") or ({"role": "user", "content": row.get("prompt")},)]


def reply(row: Row) -> list[dict[str, Any]]:
    """Return the row's completion as the messages of TRL: one, of the assistant."""
    return [{"role": "assistant", "content": row.get("completion")}]


def trainer_state() -> SimpleNamespace:
    """Return what stands for the state of TRL's trainer, always at its beginning: a score here depends on the sample alone."""
    return SimpleNamespace(
        global_step=0, max_steps=1, epoch=0.0, num_train_epochs=1, logging_steps=1, eval_steps=1, save_steps=1,
        train_batch_size=1, num_input_tokens_seen=0, total_flos=0.0, log_history=[], best_metric=None, best_global_step=None,
        best_model_checkpoint=None, is_local_process_zero=True, is_world_process_zero=True, is_hyper_param_search=False,
        trial_name=None, trial_params=None, stateful_callbacks={},
    )  # fmt: skip


def unheard(*_: Any, **__: Any) -> None:
    """Take what a TRL function logs: there is no table of completions, and no step of a trainer, to log it to."""


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
    if not math.isfinite(value):
        return None, f"returned {value}"
    return (value, why) if abs(value) <= MOST else (None, f"returned {value:g}, which no mean can hold")


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


def beside(reason: str, copy: str) -> str:
    """Return the reason with files that lie beside `copy` named relative to it: where copies lie differs from process to process."""
    folder, slash, _ = copy.rpartition("/")
    return reason.replace(folder + slash, "") if folder else reason


def without_addresses(value: Any) -> str:
    """Return the value as text that can be stored, and is the same in every process; half a surrogate is written as its escape."""
    return ADDRESS.sub("0x...", str(value).encode("utf-8", "backslashreplace").decode("utf-8"))
