"""Prompts made of raw rows: messages, a gold answer or none, and every other column as meta.

A row that cannot be a prompt is an error with its file and line, never a silently skipped one. Where rows come from:
`sources.py`; which of their columns is what: `forms.py`. Nothing here knows a recipe or a run.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeGuard

import polars as pl

from selfkd.core import digest
from selfkd.core.pool import SCHEMAS, shape
from selfkd.core.wording import did_you_mean
from selfkd.errors import SelfkdError, UsageError
from selfkd.prompts import templates
from selfkd.prompts.forms import ANSWER_NAMES, Message, Row, kind_of, likely, parts_of, yaml_word
from selfkd.prompts.rows import NESTED
from selfkd.prompts.sources import COMMON_FIELDS, SOURCES, Raw, Words, place_of
from selfkd.prompts.user_code import load_function, run_user_code

Prompt = dict[str, Any]  # messages, answer, meta (JSON text) and source
HINT_ROWS = 100  # enough to see which columns there are
CODE = re.compile(r".+\.py:[A-Za-z_]\w*")  # how a function is named
ROLES = ("system", "user", "assistant", "tool", "developer")


def read_prompts(source: Words | str | Sequence[Any], folders: Sequence[Path], split_name: str) -> pl.DataFrame:
    """Return the prompts of one split as table `prompts`, in the order of the source (or shuffled by seed).

    ids are hashes of messages and answer, so they do not depend on the order of rows; repeats get `-2`, `-3`.
    `messages` keep role and content only.
    """
    words = {**source_words(source)}
    if problems := source_problems(words, split_name):
        raise UsageError("\n".join(problems))
    kind = source_kind(words)
    rows = map_rows(words, SOURCES[kind].read(words, folders, split_name), folders)
    template = templates.load(words["template"], folders) if words.get("template") else None
    found: Iterator[Prompt] = (make_prompt(words, raw, template) for raw in rows)
    if words.get("shuffle") is not None:
        found = iter(shuffle(list(found), words["shuffle"]))
    taken = list(itertools.islice(found, words.get("limit")))
    if not taken:
        fix = "The source is empty, or `map` left every row out."
        raise UsageError("no prompts", place_of(kind, words, split_name), fix)
    return shape("prompts", pl.DataFrame(with_ids(taken), schema=SCHEMAS["prompts"]))


def places_of(
    source: Words | str | Sequence[Any], folders: Sequence[Path], split_name: str, ids: Collection[str]
) -> dict[str, str]:
    """Return {id: file and line} of prompts, for an error; those that the source does not say any more are left out."""
    words = source_words(source)
    if on_hub(words):
        return {}
    try:
        raws = list(map_rows(words, SOURCES[source_kind(words)].read(words, folders, split_name), folders))
        template = templates.load(words["template"], folders) if words.get("template") else None
        made = [{**make_prompt(words, raw, template), "where": f"{raw.source}{line_of(raw.where)}"} for raw in raws]
    except SelfkdError:  # it was read when the run was created; now it is not what it was
        return {}
    if words.get("shuffle") is not None:
        made = shuffle(made, words["shuffle"])
    return {one["id"]: one["where"] for one in with_ids(made[: words.get("limit")]) if one["id"] in ids}


def line_of(where: str) -> str:
    """Return the end of a place that says which line, `:3`, or which row, ` row 3`.

    >>> line_of("/elsewhere/train.jsonl:3")
    ':3'
    """
    found = re.search(r"(:| row )\d+$", where)
    return found[0] if found else ""


def meta_columns(frame: pl.DataFrame) -> list[str]:
    """Return the names of all meta columns, sorted."""
    return sorted({name for text in frame["meta"].drop_nulls() for name in json.loads(text)})


def gold_hint(frame: pl.DataFrame) -> str:
    """Return which column looks like the gold answer that no prompt has; "" where one has it, or none looks so."""
    found = likely(meta_columns(frame.head(HINT_ROWS)), ANSWER_NAMES) if frame["answer"].is_null().all() else None
    return f"no prompt has a gold answer; if it is in a column, write `answer: {yaml_word(found)}`" if found else ""


# ----------------------------------------------------------------------------------------------------- words of a source


def source_words(source: Words | str | Sequence[Any]) -> Words:
    """Return the one form of a source: a path is `{file: path}`, a list `{rows: list}`; a field that is null is left out."""
    if isinstance(source, str):
        return {"file": source}
    if isinstance(source, Mapping):
        return {name: value for name, value in source.items() if value is not None or name in SOURCES}
    return {"rows": list(source)}


def source_kind(words: Mapping[str, Any]) -> str:
    """Return which kind of prompt source a mapping is; "" for any other mapping."""
    return next((kind for kind in SOURCES if kind in words), "")


def on_hub(source: Any) -> TypeGuard[Words]:
    """Whether a split's source lies on a hub, so that reading it takes the network."""
    return isinstance(source, Mapping) and "hub" in source


def source_problems(source: Words | str | Sequence[Any], split_name: str) -> list[str]:
    """Return what is wrong with the words of a source, before anything is read."""
    words = source_words(source)
    kinds = [kind for kind in SOURCES if kind in words]
    if len(kinds) != 1:
        has = f"both {' and '.join(kinds)}" if kinds else "none of them"
        return [f"prompts.{split_name} needs one of {', '.join(SOURCES)}; it has {has}"]
    return [f"prompts.{split_name}: {problem}" for problem in field_problems(words, kinds[0])]


def field_problems(words: Words, kind: str) -> Iterator[str]:
    """Yield what is wrong with the fields of a source: unknown, of a wrong type, or in each other's way."""
    known = (kind, *SOURCES[kind].fields, *COMMON_FIELDS)
    for key, value in words.items():
        if key not in known:
            yield f"no field '{key}' for a source of kind {kind}.{did_you_mean(key, known)}"
        elif wrong := value_problem(key, value):
            yield f"'{key}' should be {wrong}, not {shown(value)}"
    columns = [key for key in ("prompt", "messages", "answer") if key in words]
    if "map" in words and columns:
        yield f"with `map`, the function names the columns; leave out {', '.join(columns)}"
    if "messages" in words and "prompt" in words:
        yield "name a `prompt` column or a `messages` column, not both"


def value_problem(key: str, value: Any) -> str:
    """Return what a field of a source should be, or "" where it is that."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if key in ("limit", "shuffle"):
        least = 1 if key == "limit" else 0
        return "" if whole and value >= least else f"a whole number of at least {least}"
    if key == "gold":
        return "" if value is False else "false, or left out"
    if key in ("params", "reasoning_gym", "evals"):
        return "" if isinstance(value, Mapping) else "a mapping (name: value)"
    if key == "rows":
        fits = isinstance(value, list | tuple) and value and all(isinstance(row, str | Mapping) for row in value)
        return "" if fits else "a list of texts or mappings, at least one"
    if not isinstance(value, str) or not value.strip():
        return "text"
    if key in ("map", "function") and not CODE.fullmatch(value):
        return "file.py:function"
    return ""


def shown(value: Any) -> str:
    """Return a value as a message quotes it, cut where it is long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------- mapped rows


def map_rows(words: Words, rows: Iterator[Raw], folders: Sequence[Path]) -> Iterator[Raw]:
    """Yield the rows as `map` makes them (None leaves a row out), with texts as `{prompt: text}`."""
    change = load_function(words["map"], folders) if "map" in words else None
    for raw in rows:
        value = map_row(words["map"], change, raw) if change else raw.value
        if value is not None:
            value = {"prompt": value} if isinstance(value, str) else value
            if not isinstance(value, Mapping):
                raise UsageError(f"a row must be a JSON object or a text, not {type(value).__name__}", raw.where)
            yield Raw(value, raw.source, raw.where)


def map_row(label: str, change: Callable[..., Any], raw: Raw) -> Any:
    """Return what the user's function makes of a row; an error names its line and the row."""
    try:
        return run_user_code(label, lambda: change(raw.value))
    except UsageError as error:
        raise UsageError(f"{error.what} (mapping {raw.where})", error.where, error.fix) from error


# -------------------------------------------------------------------------------------------------------- one row, read


def make_prompt(words: Words, raw: Raw, template: templates.Template | None) -> Prompt:
    """Return one row as a prompt: what its form says is prompt and answer, and every other column in meta."""
    try:
        row = dict(raw.value)
        parts = parts_of(words, row, raw.where)
        answer = answer_text(parts.answer, raw.where)
        meta = meta_of(row, parts.used)
        if words.get("gold") is False:
            row, answer, meta = {}, None, {}
        messages = told(words, parts.messages, template, row, answer, meta, raw.where)
        check_messages(messages, raw.where)
        return {"messages": messages, "answer": answer, "meta": as_json(meta, raw.where), "source": raw.source}
    except RecursionError:
        raise UsageError(NESTED, raw.where) from None


def meta_of(row: Row, used: Collection[str]) -> dict[str, Any]:
    """Return all columns but those used; the parts of a column `meta` are columns too."""
    rest = {key: value for key, value in row.items() if key not in used}
    return {**rest.pop("meta")} | rest if isinstance(rest.get("meta"), Mapping) else rest


def told(
    words: Words,
    messages: list[Message],
    template: templates.Template | None,
    row: Row,
    answer: str | None,
    meta: Row,
    place: str,
) -> list[Message]:
    """Return the messages with the recipe's `template` and `system` for every prompt."""
    if template is not None:
        # `prompt` is what every other template sees; as text it is the prompt's own, so {{ prompt }} works too.
        values = {**row, **meta, "prompt": templates.visible_prompt(messages, answer, meta)}
        messages = templates.with_last_message(messages, template.render(**values))
    if not words.get("system"):
        return messages
    if messages and messages[0]["role"] == "system":
        raise UsageError("has a system message of its own already", place, "Leave `system:` out, or drop it in `map`.")
    return [{"role": "system", "content": words["system"]}, *messages]


def check_messages(messages: Sequence[Message], place: str) -> None:
    """Raise UsageError with the reason where nobody could answer these messages."""
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UsageError(f"a message has the role {role!r}.{did_you_mean(str(role), ROLES)}", place)
        if not isinstance(content, str):
            raise UsageError(f"the {role} message must be text, not {kind_of(content)}", place)
        check_text(content, place)
    users = [message["content"] for message in messages if message["role"] == "user"]
    if not users or not users[-1].strip():
        raise UsageError("the prompt is empty" if users else "there is no user message", place)
    if messages[-1]["role"] == "assistant":
        fix = "Give the conversation up to the user's last message; a `map` function can cut it."
        raise UsageError("the last message is the assistant's, so there is nothing to answer", place, fix)


def check_text(text: str, place: str) -> None:
    """Raise UsageError where the text cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("holds half of a surrogate pair (\\ud800 to \\udfff), which is not text", place) from None


def answer_text(value: Any, place: str) -> str | None:
    """Return the gold answer as text that rewards can read; an empty or blank one as None.

    Numbers are written in full, a float that is whole as the integer: pandas makes 42.0 of 42 where a column has a null.

    >>> [answer_text(value, "") for value in (42.0, 0.00001, 1e22, -0.5, True)]
    ['42', '0.00001', '10000000000000000000000', '-0.5', 'true']
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        check_text(value, place)
        return value
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"
    if isinstance(value, bool | int | float):
        return as_json(value, place)
    raise UsageError(f"the answer must be text or a number, not {kind_of(value)}", place, "A `map` function can pick one.")


def as_json(value: Any, place: str) -> str:
    """Return canonical JSON; what JSON does not know (a date) is written as text, NaN is refused."""
    try:
        return digest.canonical(json.loads(json.dumps(value, default=str, allow_nan=False))).decode()
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"a value that JSON cannot hold: {error}", place) from None


# ------------------------------------------------------------------------------------------------------------- all rows


def with_ids(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return each prompt with its id: 16 hex digits of its content's hash, and from its second occurrence on their number."""
    seen: Counter[str] = Counter()
    found = []
    for one in prompts:
        key = digest.of(one["messages"], one["answer"])[:16]
        seen[key] += 1
        found.append({"id": key if seen[key] == 1 else f"{key}-{seen[key]}", **one})
    return found


def shuffle(prompts: list[Prompt], seed: int) -> list[Prompt]:
    """Return the prompts ordered by a hash of seed and id: the same in every version of Python, and for every order of rows."""
    keys = [digest.uniform("shuffle", seed, one["id"]) for one in with_ids(prompts)]
    return [prompts[place] for place in sorted(range(len(prompts)), key=keys.__getitem__)]
