"""Which tokens of an answer are scored by their log-probability, for every engine alike: ids, where they begin, and what becomes of them.

What cannot be scored is none of the values: it says NaN, and how many tokens there are. Imports transformers only when called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfkd.backend.base import Logprob
from selfkd.backend.tokens import OF_A_PROMPT, encode_completion, encode_prompts, named

PROBABILITY = "probability"  # of column `sums`: probabilities are added up, and not their logarithms
Ask = Callable[[list[list[int]]], Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Scored:
    """The ids of a prompt and an answer, as a training row would have them, and where the part begins that is scored."""

    ids: list[int]
    start: int

    @property
    def count(self) -> int:
        return len(self.ids) - self.start


def encode_scored(tok: Any, rows: Sequence[Mapping[str, Any]]) -> list[Scored]:
    """Return the ids of each row. Its answer is `text`, as sampled where there are `token_ids`; `given` is how it begins, unscored.

    The first token that says something of what follows `given` is scored, also where it says the end of that, too.
    """
    places = [f"{OF_A_PROMPT[1]}{row['id']} of {named(row['messages'])}" for row in rows]
    prompts = encode_prompts(tok, [row["messages"] for row in rows], places)
    return [_encoded(tok, row, prompt, place) for row, prompt, place in zip(rows, prompts, places, strict=True)]


def _encoded(tok: Any, row: Mapping[str, Any], prompt: list[int], place: str) -> Scored:
    text, given, messages = row["text"] or "", row.get("given") or "", row["messages"]
    sampled = None if given else row["token_ids"]
    answer = encode_completion(tok, text, sampled, row["finish_reason"] == "stop", place, messages)
    before = _common(encode_completion(tok, given, None, False, place, messages), answer) if given else 0
    return Scored(prompt + answer, len(prompt) + before)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids the two begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def summed(rows: Sequence[Mapping[str, Any]], found: Sequence[Scored], room: int, ask: Ask) -> list[Logprob]:
    """Return what each row's scored tokens add up to. `ask` gives the log-probabilities of every token of a sequence but its first.

    `room` is the most tokens of a sequence. NaN is said of one that is longer, of which the whole number is told, and with no token of
    one whose first scored token nothing stands before.
    """
    fits = [0 < one.start <= len(one.ids) <= room for one in found]
    values = iter(ask([one.ids for one, good in zip(found, fits, strict=True) if good]))
    return [
        _sum(row, one, next(values)) if good else (row["id"], math.nan, len(one.ids) if len(one.ids) > room else 0)
        for row, one, good in zip(rows, found, fits, strict=True)
    ]


def _sum(row: Mapping[str, Any], one: Scored, values: Sequence[float]) -> Logprob:
    kept = values[one.start - 1 :]
    total = sum(map(math.exp, kept)) if row.get("sums") == PROBABILITY else sum(kept)
    return row["id"], total, one.count
