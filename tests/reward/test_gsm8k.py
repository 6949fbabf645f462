"""Rows of GSM8K become prompts with the answer and the solution apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from splits import lines, read

from selfkd.errors import UsageError


def test_gsm8k_rows_are_mapped_by_the_shipped_function(tmp_path: Path) -> None:
    lines(tmp_path, {"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42\n#### 42"})
    frame = read({"file": "data.jsonl", "map": "reward/gsm8k.py:row"}, tmp_path)
    assert frame["answer"].to_list() == ["42"] and json.loads(frame["meta"][0]) == {"solution": "6 x 7 = 42"}


def test_a_solution_that_states_no_answer_is_an_error_of_the_data(tmp_path: Path) -> None:
    lines(tmp_path, {"question": "6 x 7?", "answer": "6 x 7 = 42"})
    with pytest.raises(UsageError, match="states no answer behind ####"):
        read({"file": "data.jsonl", "map": "reward/gsm8k.py:row"}, tmp_path)
