"""Answers that exist already, read for a `bring` step: one row per answer, with its conversation, its scores, and our prompt if it answers one.

The sources are those of prompts, and so are the forms of a row: what is the gold answer of a prompt there is the answer that is brought here.
A row may also hold several answers as a list, or a chosen and a rejected one. Nothing here knows a run.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.core import digest
from selfkd.core.pool import MESSAGES
from selfkd.errors import UsageError
from selfkd.prompts import templates
from selfkd.prompts.forms import MISSING, Message, answer_cell, as_messages, cell, last_answer, missing_column
from selfkd.prompts.overlap import HeldOut, shared_passages, texts
from selfkd.prompts.read import (
    answer_text,
    check_messages,
    make_prompt,
    map_rows,
    source_kind,
    source_problems,
    source_words,
)
from selfkd.prompts.sources import SOURCES, Raw, Words

SPLIT = "train"  # of a hub's data set, where its source names none
ANSWERS = ("completion", "response")  # read beside the usual names of a gold answer
SIDES = {"chosen": 1.0, "rejected": 0.0}
PREFERRED = "preferred"  # the score of a pair's two answers
FROM_TRAIN = "its id is that of no train prompt"

FROZEN = {"messages": "messages", "answer": "completion"}  # how a frozen table is read as a source
Found = dict[str, Any]  # messages (None where an id says which prompt), prompt, completion, scores


def schema(scores: Sequence[str]) -> dict[str, Any]:
    """Return the columns of frozen answers: `ours` says that `prompt` is one of the train prompts, `drop` why an answer may not be used."""
    own = {"id": pl.String, "prompt": pl.String, "ours": pl.Boolean, "drop": pl.String}
    return {**own, "messages": MESSAGES, "completion": pl.String, **dict.fromkeys(scores, pl.Float64)}


def problems(source: Any, where: str) -> list[str]:
    """Return what is wrong with the words of a source of answers, before anything is read."""
    return [one.replace(f"prompts.{SPLIT}", where) for one in source_problems(source, SPLIT)]


def read_answers(
    source: Any, folders: Sequence[Path], scores: Sequence[str], prompts: Mapping[str, pl.DataFrame], by_id: str | None = None
) -> pl.DataFrame:
    """Return the answers of a source in its order; `prompts` are the splits, `by_id` the column that holds the id of a train prompt.

    An answer whose conversation is that of a train prompt, but for case and white space, is an answer to that prompt. One whose prompt
    another split holds out, or whose earlier turns ask such a prompt, may not be used: nothing may be learned from it.
    """
    words = source_words(source)
    found = list(itertools.islice(_found(words, folders, scores, by_id), words.get("limit")))
    if not found:
        raise UsageError("no answers", "", "The source is empty, or `map` left every row out.")
    table = pl.DataFrame([_row(one) for one in found], schema=schema(scores))
    return _with_ids(_matched(table, prompts))


def _row(one: Found) -> dict[str, Any]:
    return {"messages": one["messages"], "prompt": one.get("prompt"), "completion": one["completion"], **one["scores"]}


# ---- rows ----


def _found(words: Words, folders: Sequence[Path], scores: Sequence[str], by_id: str | None) -> Iterator[Found]:
    rows = map_rows(words, SOURCES[source_kind(words)].read(words, folders, SPLIT), folders)
    template = templates.load(words["template"], folders) if words.get("template") else None
    found = (one for raw in rows for one in _answers(words, raw, scores, by_id, template))
    if words.get("shuffle") is None:
        return found
    held = list(found)
    keys = [digest.uniform("shuffle", words["shuffle"], one["messages"], one["completion"], at) for at, one in enumerate(held)]
    return iter([held[at] for at in sorted(range(len(held)), key=keys.__getitem__)])


def _answers(
    words: Words, raw: Raw, scores: Sequence[str], by_id: str | None, template: templates.Template | None
) -> Iterator[Found]:
    """Yield the answers of a row: one, those of a list, or both of a pair."""
    row = dict(raw.value)
    given = {name: _cell(row, name, raw.where) for name in scores}
    rest = {name: value for name, value in row.items() if name not in scores}
    if "answer" not in words and all(side in row for side in SIDES):
        if PREFERRED not in scores:
            raise UsageError(
                "'chosen' and 'rejected' are two answers",
                raw.where,
                f"Write `scores: [{PREFERRED}]`, or name one: `answer: chosen`.",
            )
        for side, value in SIDES.items():
            own = {name: _one_of(cell_, None, raw.where, name) for name, cell_ in given.items()} | {PREFERRED: value}
            yield _answer(_side(rest, side), words, raw, by_id, template, own)
        return
    column = _answer_column(words, rest)
    said = cell(rest, column) if column else None
    several = isinstance(said, list | tuple) and len(said) > 0 and all(isinstance(one, str) for one in said)
    answers: list[Any] = list(said) if isinstance(said, list | tuple) and several else [said]
    for at, one in enumerate(answers):
        own = {name: _one_of(value, at if several else None, raw.where, name) for name, value in given.items()}
        filled = {**rest, str(column): one} if several else rest
        yield _answer(filled, {**words, **({"answer": column} if column else {})}, raw, by_id, template, own)


def _cell(row: Mapping[str, Any], name: str, place: str) -> Any:
    found = cell(dict(row), name)
    if found is not MISSING:
        return found
    if name == PREFERRED:
        return None
    raise missing_column(name, dict(row), place)


def _answer_column(words: Words, row: Mapping[str, Any]) -> str | None:
    return (
        words.get("answer") or next((name for name in ANSWERS if name in row), None) or ("answer" if "answer" in row else None)
    )


def _side(row: dict[str, Any], side: str) -> dict[str, Any]:
    """Return the row of one side of a pair: a conversation that ends with the answer, or an answer to the row's own prompt."""
    rest = {name: value for name, value in row.items() if name not in SIDES}
    said = row[side]
    if isinstance(said, list | tuple) and not {"prompt", "messages", "question"} & set(rest):
        return {**rest, "messages": said}
    spoken = said[-1].get("content") if isinstance(said, list | tuple) and said and isinstance(said[-1], Mapping) else said
    return {**rest, "answer": spoken}


def _answer(
    row: dict[str, Any], words: Words, raw: Raw, by_id: str | None, template: templates.Template | None, scores: Found
) -> Found:
    if by_id is not None:
        if (name := cell(row, by_id)) in (None, "") or not isinstance(name, str):
            raise missing_column(by_id, row, raw.where)
        return {"messages": None, "prompt": name, "completion": _text(_said(row, words, raw), raw), "scores": scores}
    apart = {name: value for name, value in words.items() if name not in ("limit", "shuffle")}
    prompt = make_prompt(apart, Raw(row, raw.source, raw.where), template)
    check_messages(prompt["messages"], raw.where)
    return {"messages": prompt["messages"], "completion": _text(prompt["answer"], raw), "scores": scores}


def _said(row: dict[str, Any], words: Words, raw: Raw) -> Any:
    """Return the answer of a row that names its prompt by its id alone."""
    if (column := words.get("answer") or _answer_column(words, row)) is not None:
        return answer_text(answer_cell(row, column, raw.where), raw.where)
    if "messages" in row:
        spoken: list[Message] = as_messages(row["messages"], "messages", raw.where)
        return last_answer(spoken, raw.where) if spoken[-1]["role"] == "assistant" else None
    return None


def _text(value: Any, raw: Raw) -> str:
    if not isinstance(value, str) or not value.strip():
        fix = "Name its column: `answer: COLUMN`. Conversations end with the assistant's message; a `map` function can leave rows out."
        raise UsageError("there is no answer in this row", raw.where, fix)
    return value


def _one_of(value: Any, at: int | None, place: str, name: str) -> float | None:
    """Return a score as a number: of several answers the `at`-th of a list, or the one that is given for all."""
    if isinstance(value, list | tuple) and at is not None:
        if at >= len(value):
            raise UsageError(f"column '{name}' has {len(value)} scores, and there are more answers", place)
        value = value[at]
    if value is None or isinstance(value, bool | int | float):
        return number if value is not None and math.isfinite(number := _as_float(value)) else None
    raise UsageError(
        f"column '{name}' is to be a score, and is no number: {str(value)[:40]!r}", place, "A `map` function can make one."
    )


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number that no float holds
        return math.inf


# ---- our prompts, and those held out ----


def _matched(table: pl.DataFrame, prompts: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """Return the answers with the ids of their prompts, their conversations, and why some may not be used."""
    train = prompts[SPLIT]
    table = _by_id(table, train)
    spoken = texts(table.select("id", "messages"))["text"]
    same = texts(train).unique("text", keep="first", maintain_order=True).select("text", _same="id")
    held = {split: HeldOut.of(frame) for split, frame in prompts.items() if split != SPLIT}
    talks = table["messages"].to_list()
    reasons = [_held_out(text, talk, held) for text, talk in zip(spoken, talks, strict=True)]
    table = table.with_columns(text=spoken, _held=pl.Series(reasons, dtype=pl.String)).join(
        same, on="text", how="left", maintain_order="left"
    )
    own = pl.Series([f"b{digest.of('brought', messages)[:15]}" for messages in table["messages"].to_list()], dtype=pl.String)
    prompt = pl.coalesce("prompt", "_same", own)
    ours = prompt.is_in(train["id"].implode())
    return table.with_columns(prompt=prompt, ours=ours, drop=pl.coalesce("drop", "_held")).drop("text", "_same", "_held")


def _held_out(text: str, talk: Sequence[Mapping[str, str]] | None, held: Mapping[str, HeldOut]) -> str | None:
    """Return why a conversation may not be used: what it asks, at its end or in an earlier turn, is held out."""
    for split, known in held.items():
        if text in known.texts:
            return f"its prompt stands in {split}"
    return next((f"a turn of it stands in {split}" for split, known in held.items() if known.among(talk)), None)


def passages_shared(table: pl.DataFrame, other: pl.DataFrame) -> int:
    """Return how many of the answers share 13 words in a row with a prompt of `other`, in their conversation or in themselves."""
    said = [
        [*(talk or []), {"role": "assistant", "content": text}]
        for talk, text in table.select("messages", "completion").iter_rows()
    ]
    spoken = table.select("id").with_columns(messages=pl.Series(said, dtype=MESSAGES))
    return len(shared_passages(spoken, other))


def _by_id(table: pl.DataFrame, train: pl.DataFrame) -> pl.DataFrame:
    """Return the answers that name a train prompt by its id with its conversation; one whose id is unknown may not be used."""
    known = train.select(prompt="id", _messages="messages")
    table = table.join(known, on="prompt", how="left", maintain_order="left")
    lost = pl.col("prompt").is_not_null() & pl.col("_messages").is_null()
    drop = pl.when(lost).then(pl.lit(FROM_TRAIN)).otherwise(pl.col("drop"))
    return table.with_columns(messages=pl.coalesce("messages", "_messages"), drop=drop).drop("_messages")


def _with_ids(table: pl.DataFrame) -> pl.DataFrame:
    """Return the answers with ids of their content; from the second of the same on, with their number."""
    seen: Counter[str] = Counter()
    ids = []
    for prompt, completion in table.select("prompt", "completion").iter_rows():
        key = digest.of("brought", prompt, completion)[:16]
        seen[key] += 1
        ids.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return table.with_columns(id=pl.Series(ids, dtype=pl.String))
