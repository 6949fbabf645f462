"""The shipped rewards that read answers, and scoring one completion with one of them in this process."""

from __future__ import annotations

from selfkd.core.files import builtin_folder
from selfkd.rewards.contract import Result, Reward
from selfkd.rewards.load import load

READERS = {
    "number": "number.py:last_number",
    "answer_line": "number.py:answer_line",
    "gsm8k": "gsm8k.py:correct",
    "math": "math.py:correct",
    "exact": "exact.py:match",
    "vote": "vote.py:majority",
}
_loaded: dict[str, Reward] = {}


def score(reference: str, completion: str, answer: str) -> Result:
    """(value, why) of one completion; a vote is taken with two others that state the answer."""
    if reference not in _loaded:
        file, name = reference.split(":")
        _loaded[reference] = load(builtin_folder() / "reward" / file, name)
    reward = _loaded[reference]
    texts = [completion] + [f"Answer: {answer}"] * 2 if reward.grouped else [completion]
    rows = [dict(group="p", prompt="", completion=text, answer=answer, meta={}) for text in texts]
    return next((value, why) for place, value, why in reward.results(rows) if place == 0)
