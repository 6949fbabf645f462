"""A model that answers and judges by a script: what the tests of `judge` share. Values of their verdicts are found by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

import polars as pl
from chains import RECIPE

from selfkd.backend.fake import Fake
from selfkd.chain.run import Run

HEAD = RECIPE[: RECIPE.index("steps:")]
ANSWERS = ("short", "a middling answer", "a long answer, which says the same again and again")

Judge = Callable[[list[str], int], str]  # the answers shown, the seed: what the judge writes


def scripted(judge: Judge, answers: tuple[str, ...] = ANSWERS) -> Fake:
    """Return a backend that answers the k-th try of a prompt with the k-th of `answers`, and judges what stands in <angles>."""

    def said(messages: list[dict[str, str]], seed: int, skill: float) -> str:
        text = messages[-1]["content"]
        shown = re.findall(r"<<(.*?)>>", text, re.DOTALL)
        return judge(shown, seed) if shown else answers[seed % len(answers)]

    return Fake({}, said)


def of_length(shown: list[str], seed: int) -> str:
    """Mark an answer by its length, at most 5: 0 for the empty one, 1 for "short", 3 for the middling one, 5 for the long one."""
    return f"It has {len(shown[0])} letters.\nScore: {min(5, (len(shown[0]) + 3) // 6)}"


def table(run: Run, step: str, name: str, index: int = 1) -> pl.DataFrame:
    """Return what a step of a round left in a table."""
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(index)[step].tables[name].files])
