"""The conversations of a run, before the first is asked: each of their shapes is written once with the model's chat template.

Says which are refused, in the template's words, and what the template does to the others. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import polars as pl

from selfkd.backend import chat_trial, tokens
from selfkd.backend.base import Questions
from selfkd.backend.chat import Chat, Message
from selfkd.backend.chat_trial import CLOSES, Counts
from selfkd.errors import UsageError

SLICE = 10_000  # prompts whose texts are in memory at once

Show = Callable[
    [Sequence[Message]], str
]  # messages as the text that a model is shown; UsageError where a template refuses them


class Refused(TypedDict):
    """A prompt that the chat template refuses: which one, which step asks it, and what the template says."""

    id: str
    split: str
    place: str
    step: str
    said: str


@dataclass(frozen=True)
class Shape:
    """Prompts that differ in their texts only: how many there are, and the first, a row of table QUESTIONS."""

    count: int
    first: Mapping[str, Any]

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(message["role"] for message in self.first["messages"])


@dataclass(frozen=True)
class Look:
    """How the model of a run is spoken to, the prompts that its template refuses, and what a person should know of the others."""

    chat: Chat
    refused: Sequence[Refused] = ()
    remarks: Sequence[str] = ()


def look(tok: Any, asked: Questions | None) -> Look:
    """Settle how conversations are written with this tokenizer, from now on, and write one of each shape that is asked."""
    chat = tokens.settled(tok, asked.words if asked else {}, asked.now if asked else "")
    tokens.with_chat(tok, chat)
    found = shapes(_rows([*asked.files, *asked.shapes])) if asked else []
    refused, counts = tried(found, lambda messages: tokens.rendered(tok, messages))
    said = chat_trial.remarks(tokens.writer(tok, chat), chat, counts) if tok.chat_template else chat_trial.bare_remarks(counts)
    return Look(chat, refused, said if asked else ())


def question(tok: Any, text: str) -> list[int]:
    """Return the ids of a single question, with a system message where the template takes none without."""
    alone = [{"role": "user", "content": text}]
    try:
        return tokens.encode_prompt(tok, alone)
    except UsageError:
        return tokens.encode_prompt(tok, [{"role": "system", "content": "Answer."}, *alone])


def _rows(files: Iterable[Path]) -> Iterator[Mapping[str, Any]]:
    for file in files:
        for part in pl.read_parquet(file).iter_slices(SLICE):
            yield from part.iter_rows(named=True)


def shapes(rows: Iterable[Mapping[str, Any]]) -> list[Shape]:
    """Return the shapes among rows of table QUESTIONS: roles in their order, and whether an earlier turn has a thought to lose."""
    found: dict[tuple[Any, ...], Shape] = {}
    for row in rows:
        thinks = any(CLOSES in message["content"] for message in row["messages"] if message["role"] == "assistant")
        key = (*(message["role"] for message in row["messages"]), thinks)
        found[key] = Shape(found[key].count + 1, found[key].first) if key in found else Shape(1, row)
    return list(found.values())


def tried(found: Iterable[Shape], show: Show) -> tuple[list[Refused], Counts]:
    """Write the first prompt of each shape; return those that are refused, and counts of what stands in the others."""
    refused: list[Refused] = []
    kept: list[tuple[Shape, bool]] = []
    for shape in found:
        try:
            text = show(shape.first["messages"])
        except UsageError as error:
            who = {name: str(shape.first.get(name) or "") for name in ("id", "split", "place", "step")}
            refused.append(Refused(**who, said=error.what))  # type: ignore[typeddict-item]
        else:
            kept.append((shape, chat_trial.dropped(text, shape.first["messages"])))
    return refused, _counts(kept)


def _counts(kept: Sequence[tuple[Shape, bool]]) -> Counts:
    def of(fits: Callable[[tuple[str, ...]], bool]) -> int:
        return sum(shape.count for shape, _ in kept if fits(shape.roles))

    lost = [shape for shape, lacks in kept if lacks]
    return Counts(
        system=of(lambda roles: "system" in roles),
        plain=of(lambda roles: "system" not in roles),
        repeated=of(lambda roles: any(one == other for one, other in pairwise(roles))),
        lost=sum(shape.count for shape in lost),
        lost_first=str(lost[0].first.get("place") or "") if lost else "",
        several=of(lambda roles: len(roles) > 1),
    )
