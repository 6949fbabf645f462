"""What is asked of a judge: criteria, requests and what comes back, and which answers are compared. Pure; knows no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from selfkd.steps.context import Row
from selfkd.steps.judged import Judgment
from selfkd.steps.parsers import Parsed


class Criterion(BaseModel):
    """A question that is answered by yes or no, and how much its answer counts."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1)
    ask: str
    weight: float = Field(1.0, gt=0)


def as_criterion(value: Any) -> Any:
    return {"ask": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class Ask:
    """One request: the answers shown, in their order, which draw, which criterion, and the canary among them, if there is one."""

    id: str
    prompt: Row
    shown: tuple[Row, ...]
    number: int
    criterion: str = ""
    canary: str = ""

    @property
    def parents(self) -> list[str]:
        return [row["id"] for row in self.shown if row["id"]]

    def read(self, parsed: Parsed) -> Judgment:
        shown = tuple(row["id"] for row in self.shown)
        return Judgment(self.id, self.prompt["id"], shown, self.number, *parsed, criterion=self.criterion)


@dataclass(frozen=True)
class Judged:
    """What came back: files of samples, and each judgment as read."""

    files: Sequence[Path]
    asks: Sequence[Ask]
    judgments: Sequence[Judgment]
    finished: Mapping[str, str]

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Return {judgment: the kind of canary that it is of}."""
        return {ask.id: ask.canary for ask in self.asks}


def ring(rows: Sequence[Row], most: int | None) -> list[tuple[Row, Row]]:
    """Return pairs of rows: neighbours in a circle, then those two apart, and so on, so that the first few reach every row.

    >>> [a["id"] + b["id"] for a, b in ring([{"id": name} for name in "abcd"], None)]
    ['ab', 'bc', 'cd', 'da', 'ac', 'bd']
    """
    count = len(rows)
    places = [(at, (at + apart) % count) for apart in range(1, count // 2 + 1) for at in range(count)]
    once = list({frozenset(pair): pair for pair in reversed(places)}.values())[::-1]
    return [(rows[one], rows[other]) for one, other in once[:most]]


def by_prompt(found: pl.DataFrame) -> dict[str, list[Row]]:
    """Return {prompt: its answers}, each in the order of the hashed number that breaks ties."""
    groups: dict[str, list[Row]] = {}
    for row in found.sort("prompt", "tiebreak", "id").iter_rows(named=True):
        groups.setdefault(row["prompt"], []).append(row)
    return groups


def texts_of(files: Sequence[Path]) -> dict[str, tuple[str, str]]:
    """Return {id: (text, finish_reason)} of what a model answered."""
    if not files:
        return {}
    frame = pl.scan_parquet(list(files), glob=False).select("id", "text", "finish_reason").collect()
    return {name: (text, finished) for name, text, finished in frame.iter_rows()}
