"""try: a reward on a few rows of a file."""

from __future__ import annotations

import json
from pathlib import Path


def test_try_scores_rows_of_a_file_and_says_why(said):
    rows = [
        {"prompt": "2 + 2?", "completion": "so it is 4", "answer": "4"},
        {"prompt": "2 + 3?", "completion": "none", "answer": 5},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = said("try", "reward/number.py:last_number", "rows.jsonl")
    assert "so it is 4" in text and "last_number 1" in text and "last_number 0" in text
    assert "of 2 scored" in text


def test_try_gives_other_columns_by_their_names(said):
    Path("named.py").write_text("def near(completion, limit):\n    return float(len(completion) < limit), f'limit {limit}'\n")
    Path("columns.jsonl").write_text(json.dumps({"completion": "abc", "limit": 5}) + "\n")
    text = said("try", "named.py:near", "columns.jsonl")
    assert "near 1" in text and "limit 5" in text


def test_try_names_file_and_line_of_a_broken_row(said):
    Path("broken.jsonl").write_text('{"completion": "x"}\n{"completion": \n')
    assert "broken.jsonl:2  is not JSON" in said("try", "reward/number.py:last_number", "broken.jsonl", code=2)
    Path("empty.jsonl").write_text("")
    assert "no rows" in said("try", "reward/number.py:last_number", "empty.jsonl", code=2)
