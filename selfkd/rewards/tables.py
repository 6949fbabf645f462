"""A function over whole tables, called in a worker of its own: frames in, frames out, and nothing else decides what comes back.

It is called twice, in two processes, the second time with the rows of every table in another order. What differs then is no function of the
tables, and nothing that rests on it could be made again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.core import digest
from selfkd.core.pool import Function
from selfkd.errors import RewardError
from selfkd.rewards.pool import MEMORY_GB, question

GIVEN = ("prompts", "samples", "scores")  # what the function may ask for by name
MADE = ("scores", "drops", "samples")  # what it may return
TARGET = "selfkd.rewards.tables:call"
Tables = dict[str, pl.DataFrame]
FIX = "It must be a pure function of its tables: sort where order matters, and use no random numbers, clock, file or network."


def applied(function: Function, tables: Mapping[str, pl.DataFrame], timeout: float, where: str) -> Tables:
    """Return what the function makes of the tables; RewardError where it does not make the same twice."""
    with tempfile.TemporaryDirectory(prefix="selfkd-apply-") as place:
        first = _asked(function, tables, Path(place) / "first", timeout)
        second = _asked(function, {name: _turned(frame) for name, frame in tables.items()}, Path(place) / "second", timeout)
        if (unlike := _difference(first, second)) and not _difference(
            first, _asked(function, tables, Path(place) / "third", timeout)
        ):
            raise RewardError(
                f"{function.name} gives other {unlike} where the rows of its tables are in another order", where, FIX
            )
        if unlike:
            raise RewardError(f"{function.name} gives other {unlike} when it is called again with the same tables", where, FIX)
    return first


def _turned(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows in an order that is neither theirs nor its reverse."""
    order = [digest.uniform("turned", place) for place in range(frame.height)]
    return frame[sorted(range(frame.height), key=order.__getitem__)]


def _asked(function: Function, tables: Mapping[str, pl.DataFrame], place: Path, timeout: float) -> Tables:
    place.mkdir()
    for name, frame in tables.items():
        frame.write_parquet(place / f"{name}.parquet")
    plain = replace(function, params={})  # a worker keeps them for rows; here they are arguments
    words = {"place": str(place), "names": list(tables), "params": dict(function.params)}
    made: list[str] = question(plain, (TARGET, words), timeout, MEMORY_GB)
    return {name: pl.read_parquet(place / f"made-{name}.parquet", glob=False) for name in made}


def call(function: Callable[..., Any], place: str, names: list[str], params: Mapping[str, Any]) -> list[str]:
    """Call the function with the tables that it asks for, write what it returns, and return the names of that. In the worker."""
    import inspect

    home = Path(place)
    wanted = inspect.signature(function).parameters
    anything = any(one.kind is one.VAR_KEYWORD for one in wanted.values())
    tables = {name: pl.read_parquet(home / f"{name}.parquet", glob=False) for name in names if anything or name in wanted}
    made = function(**tables, **params)
    made = {"scores": made} if isinstance(made, pl.DataFrame) else made
    if not isinstance(made, dict) or not all(name in MADE and isinstance(frame, pl.DataFrame) for name, frame in made.items()):
        raise TypeError(
            f"returns {type(made).__name__}: give a frame of scores, or a mapping of frames with the names {', '.join(MADE)}"
        )
    for name, frame in made.items():
        frame.write_parquet(home / f"made-{name}.parquet")
    return sorted(made)


def _difference(one: Tables, other: Tables) -> str:
    """Return the name of a table that two calls made otherwise, whatever the order of its rows; ''."""
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or _meaning(one[name]) != _meaning(other[name]):
            return name
    return ""


def _meaning(frame: pl.DataFrame) -> str:
    return digest.table(frame, ())
