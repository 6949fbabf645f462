"""The shipped rewards against answers whose right value was found by hand, each with the rule that gives it.

The rows are in tests/answers, one file per reader; `value` is null where the reward abstains. A row of vote.jsonl holds one of
three samples: the other two state its `answer`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from readers import READERS, score

from selfkd.rewards.contract import failed

ANSWERS = Path(__file__).parents[1] / "answers"


def answers(reader: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ANSWERS / f"{reader}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("reader", READERS)
def test_each_answer_has_the_value_that_its_rule_gives(reader: str) -> None:
    if reader == "math":
        pytest.importorskip("math_verify")
    wrong = []
    for row in answers(reader):
        value, why = score(READERS[reader], row["completion"], row["answer"])
        if value != row["value"] or failed(value, why):
            wrong.append((row["completion"], row["answer"], f"{value} {why}", row["value"], row["rule"]))
    assert wrong == []


@pytest.mark.parametrize("reader", sorted({*READERS} - {"answer_line"}))
def test_a_reader_has_at_least_150_distinct_answers_of_every_value_with_a_rule(reader: str) -> None:
    rows = answers(reader)
    assert len({(row["completion"], row["answer"]) for row in rows}) == len(rows) >= 150
    assert all(row.keys() == {"completion", "answer", "value", "rule"} and row["rule"] for row in rows)
    count = Counter(row["value"] for row in rows)
    assert count[1] > 30 and count[0] > 30 and count.keys() <= {0, 1, None}
