"""Tasks of reasoning-gym bring what their own scorers need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from splits import read, user_texts

from selfkd.rewards.check import check_gold, score_batch
from selfkd.rewards.find import find_function


def test_a_gym_task_carries_what_its_scorer_needs(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    gym = {"task": "chain_sum", "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2, "size": 20}
    source = {"reasoning_gym": gym, "template": "templates/answer.j2"}
    frame = read(source, tmp_path)
    assert frame.height == 20 and all("Answer: <n>" in text and " =" in text for text in user_texts(frame))
    assert frame.equals(read(source, tmp_path)) and not frame["id"].equals(read(source, tmp_path, "test")["id"])
    meta = json.loads(frame["meta"][0])
    assert meta["source_dataset"] == "chain_sum" and meta["question"] in user_texts(frame)[0]
    rows = [
        dict(completion=f"Answer: {answer}", answer=answer, meta=text) for answer, text in zip(frame["answer"], frame["meta"])
    ]
    solved = find_function("reward/gym.py:solved", [])
    assert score_batch(solved, rows) == [(1.0, "")] * 20
    gold = [dict(id=row["id"], prompt="", answer=row["answer"], meta=row["meta"]) for row in frame.to_dicts()]
    found = check_gold(solved, gold, 60.0)
    assert (found.passed, found.total, found.failure) == (20, 20, "") and found.accepted == 0 < found.near


def test_a_gym_scorer_that_compares_tuples_gets_them_back(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    frame = read({"reasoning_gym": {"task": "arc_agi", "size": 2}}, tmp_path)
    rows = [dict(completion=f"Answer: {row['answer']}", answer=row["answer"], meta=row["meta"]) for row in frame.to_dicts()]
    assert score_batch(find_function("reward/gym.py:solved", []), rows) == [(1.0, "")] * 2
