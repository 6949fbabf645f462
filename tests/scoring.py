"""What the tests of rewards share: writing a reward file, a row to score, and scoring rows in workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfkd.core.pool import Function
from selfkd.rewards.contract import Result
from selfkd.rewards.find import find_function
from selfkd.rewards.pool import close_idle_workers, spread

Write = Callable[..., Function]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a reward file and finds the function in it."""

    def make(source: str, name: str = "f", file: str = "mine.py", **params: Any) -> Function:
        (tmp_path / file).write_text(source)
        return replace(find_function(f"{file}:{name}", [tmp_path]), params=params)

    yield make
    close_idle_workers()


def row(completion: str = "42", answer: str | None = "42", group: str = "p1", **meta: Any) -> dict[str, Any]:
    sample = {"chars": len(completion), "finish_reason": "stop"}
    return dict(
        group=group,
        prompt="6 x 7?",
        messages=[],
        completion=completion,
        answer=answer,
        meta=meta,
        sample=sample,
        token_ids=[1, 2],
    )


def results(function: Function, rows: list[dict[str, Any]], timeout: float = 10.0, **more: Any) -> list[Result]:
    return [result for batch in spread(function, [rows], 2, timeout, **more) for result in batch]
