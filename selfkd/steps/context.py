"""What a step may ask of the round that runs it. The one door from a verb to machines, files and earlier rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from selfkd.backend.base import Sampling, Trained, TrainSpec
from selfkd.core.pool import Function, Model, Pool


class Context(Protocol):
    """What a step may ask of its round. It never learns a path of the run, nor which machine answers."""

    index: int
    last: int
    name: str
    recipe: Any

    def seed(self, *names: Any) -> int: ...

    def model(self, reference: str) -> Model: ...

    def ask(self, model: Model, requests: pl.DataFrame, sampling: Sampling, stream: str) -> list[Path]:
        """Generate in canonical chunks; finished chunks of an earlier attempt are used. Files of the `samples` table."""

    def logprobs(self, model: Model, rows: pl.DataFrame) -> Iterator[tuple[str, float, int]]: ...

    def load(self, source: Mapping[str, Any], dither: int | None) -> tuple[Path, dict[str, Any]]: ...

    def train(self, start: Model, reference: Model | None, rows: pl.DataFrame, spec: TrainSpec) -> Trained: ...

    def map(
        self, function: Function, batches: Iterable[list[dict[str, Any]]], timeout: float
    ) -> Iterator[list[tuple[float | None, str]]]:
        """Reward outcomes, batch by batch in order: (value, why), the value None where it could not be scored ('abstained': would not be)."""

    def function(self, reference: str, params: Mapping[str, Any]) -> Function: ...

    def template(self, reference: str) -> Callable[..., list[dict[str, str]]]:
        """render(prompt row, messages, of=sample row or None) -> messages with the last user message replaced."""

    def earlier(self, window: int | None) -> Iterator[tuple[int, Pool]]:
        """(round, its final pool) of the sealed rounds on this chain, newest first; rolled-back rounds are left out."""

    def split(self, name: str) -> Pool: ...

    def save(self, table: str, frame: pl.DataFrame) -> Path:
        """Write one immutable part of a table now, so that a large table never has to be whole in memory."""

    def progress(self, done: int, total: int, unit: str, **more: Any) -> None: ...
