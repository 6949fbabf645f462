"""What the tests of prompts share: writing a JSONL file, reading a split, and the text of each of its prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.prompts.read import read_prompts


def read(source: Any, folder: Path, split: str = "train") -> pl.DataFrame:
    return read_prompts(source, [folder], split)


def lines(folder: Path, *rows: Any, name: str = "data.jsonl") -> str:
    (folder / name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return name


def user_texts(frame: pl.DataFrame) -> list[str]:
    return [talk[-1]["content"] for talk in frame["messages"].to_list()]
