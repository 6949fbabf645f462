"""Where prompts come from: a hub data set, a file, a function, a reasoning-gym task, or the recipe itself.

Every source becomes plain rows (dicts), every row becomes a prompt: messages, a gold answer or none, and whatever else it
has as meta. A row that cannot be a prompt is an error with its file and line, never a silently skipped one. Nothing here
knows a recipe or a run.
"""

from __future__ import annotations

import itertools
import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import polars as pl

from selfkd.core import digest
from selfkd.core.files import locate
from selfkd.core.pool import SCHEMAS, shape
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError
from selfkd.prompts import sources, templates
from selfkd.prompts.sources import Raw
from selfkd.rewards.contract import load
from selfkd.rewards.find import find_function

# What a source may be, and the fields that only this kind has.
SOURCE_KINDS = {"hub": ("subset", "split", "revision"), "file": (), "function": ("params",), "reasoning_gym": (), "rows": ()}

COMMON_FIELDS = ("prompt", "answer", "messages", "map", "limit", "shuffle", "template", "system")

ROLES = ("system", "user", "assistant", "tool", "developer")


def read_prompts(source: Mapping[str, Any] | str | Sequence[Any], folders: Sequence[Path], split_name: str) -> pl.DataFrame:
    """The prompts of one split as table `prompts`, in the order of the source (or shuffled by seed).

    ids are hashes of messages and answer, so they do not depend on where a row stands; repeats get `-2`, `-3`.
    `messages` keep role and content only.
    """
    spec = {**source_words(source)}
    check_keys(spec, split_name)
    rows = mapped(spec, raw_rows(spec, folders, split_name), folders)
    form = templates.load(spec["template"], folders) if spec.get("template") else None
    found: Iterator[dict[str, Any]] = (prompt(spec, raw, form) for raw in rows)
    if spec.get("shuffle") is not None:
        found = iter(shuffled(list(found), spec["shuffle"]))
    kept = list(itertools.islice(found, spec.get("limit")))
    if not kept:
        raise UsageError("no prompts", where(spec, split_name), "The source is empty, or `map` left every row out.")
    return shape("prompts", pl.DataFrame(numbered(kept), schema=SCHEMAS["prompts"]))


def source_words(source: Mapping[str, Any] | str | Sequence[Any]) -> Mapping[str, Any]:
    """The one form of a source: a path is `{file: path}`, a list `{rows: list}`."""
    if isinstance(source, str):
        return {"file": source}
    return source if isinstance(source, Mapping) else {"rows": list(source)}


def where(spec: Mapping[str, Any], split_name: str) -> str:
    kind = next((kind for kind in SOURCE_KINDS if kind in spec), "")
    named = spec.get(kind)
    named = named.get("task") if kind == "reasoning_gym" and isinstance(named, Mapping) else named
    return f"prompts.{split_name} ({kind}{'' if kind == 'rows' else f': {named}'})"


def source_problems(source: Mapping[str, Any] | str | Sequence[Any], split_name: str) -> list[str]:
    """What is wrong with the words of a source, before anything is read."""
    spec = source_words(source)
    kinds = [kind for kind in SOURCE_KINDS if kind in spec]
    if len(kinds) != 1:
        said = f"both {' and '.join(kinds)}" if kinds else "none of them"
        return [f"prompts.{split_name} needs one of {', '.join(SOURCE_KINDS)}; it has {said}"]
    known = (kinds[0], *SOURCE_KINDS[kinds[0]], *COMMON_FIELDS)
    found = [
        f"prompts.{split_name}: no field '{key}' for a source of kind {kinds[0]}.{did_you_mean(key, known)}"
        for key in spec
        if key not in known
    ]
    for key in ("limit", "shuffle"):
        if spec.get(key) is not None and (not isinstance(spec[key], int) or isinstance(spec[key], bool) or spec[key] < 0):
            found.append(f"prompts.{split_name}: {key} must be a whole number, not {spec[key]!r}")
    if "map" in spec and (names := [key for key in ("prompt", "messages", "answer") if key in spec]):
        found.append(f"prompts.{split_name}: with `map`, the function names the columns; leave out {', '.join(names)}")
    if "messages" in spec and "prompt" in spec:
        found.append(f"prompts.{split_name}: name a `prompt` column or a `messages` column, not both")
    return found


def on_hub(source: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a split's source lies on a hub, so that reading it takes the network."""
    return isinstance(source, Mapping) and "hub" in source


def check_keys(spec: Mapping[str, Any], split_name: str) -> None:
    if found := source_problems(spec, split_name):
        raise UsageError("\n".join(found))


def raw_rows(spec: Mapping[str, Any], folders: Sequence[Path], split_name: str) -> Iterator[Raw]:
    if "file" in spec:
        return sources.from_file(locate(spec["file"], folders), spec["file"])
    if "hub" in spec:
        return sources.from_hub(spec, split_name)
    if "reasoning_gym" in spec:
        return sources.from_gym(spec["reasoning_gym"], split_name)
    if "function" in spec:
        label, function = spec["function"], loaded(spec["function"], folders)
        produced = boundary(label, lambda: list(function(**spec.get("params", {}))))
        return (Raw(value, label, f"{label} row {place}") for place, value in enumerate(produced, 1))
    return (Raw(value, "recipe", f"prompts.{split_name} row {place}") for place, value in enumerate(spec["rows"], 1))


def loaded(reference: str, folders: Sequence[Path]) -> Callable[..., Any]:
    function = find_function(reference, folders)
    return boundary(reference, lambda: load(function.path, function.name).call)


def boundary(label: str, work: Callable[[], Any]) -> Any:
    """Run a user's code; whatever it raises is an error of that file, told with the line in it."""
    try:
        return work()
    except UsageError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        file = next(
            (frame for frame in reversed(frames) if Path(frame.filename).name == Path(label.partition(":")[0]).name), None
        )
        raise UsageError(f"{type(error).__name__}: {error}", f"{file.filename}:{file.lineno}" if file else label) from error


def mapped(spec: Mapping[str, Any], rows: Iterator[Raw], folders: Sequence[Path]) -> Iterator[Raw]:
    """Rows as `map` makes them (None leaves a row out), with strings as `{prompt: string}`."""
    change = loaded(spec["map"], folders) if "map" in spec else None
    for raw in rows:
        value = boundary_of_row(spec["map"], change, raw) if change else raw.value
        if value is not None:
            value = {"prompt": value} if isinstance(value, str) else value
            if not isinstance(value, Mapping):
                raise UsageError(f"a row must be a JSON object or a text, not {type(value).__name__}", raw.where)
            yield Raw(value, raw.source, raw.where)


def boundary_of_row(label: str, change: Callable[..., Any], raw: Raw) -> Any:
    try:
        return boundary(label, lambda: change(raw.value))
    except UsageError as error:
        raise UsageError(f"{error.what} (mapping {raw.where})", error.where, error.fix) from error


# -------------------------------------------------------------------------------------------------------- one row, read


def prompt(spec: Mapping[str, Any], raw: Raw, form: templates.Template | None) -> dict[str, Any]:
    """One row as a prompt: the named (or the usual) columns, and every other column in meta."""
    row = dict(raw.value)
    column = chosen(spec, row, raw.where, "messages", "prompt", "question") or ""
    if column not in row:
        raise missing("prompt", row, raw.where)
    answer_column = chosen(spec, row, raw.where, "answer")
    answer = answer_text(row.get(answer_column) if answer_column else None, raw.where)
    messages = as_messages(row[column], column, raw.where)
    rest = {key: value for key, value in row.items() if key not in (column, answer_column)}
    meta = {**rest.pop("meta")} | rest if isinstance(rest.get("meta"), Mapping) else rest
    if form is not None:
        # `prompt` is the view that every other template sees; as text it is the prompt's own, so {{ prompt }} works too.
        values = {**row, **meta, "prompt": templates.view(messages, answer, meta)}
        messages = templates.ask(messages, form.render(**values))
    if spec.get("system"):
        if messages[0]["role"] == "system":
            raise UsageError("has a system message of its own already", raw.where, "Leave `system:` out, or drop it in `map`.")
        messages = [{"role": "system", "content": spec["system"]}, *messages]
    return {"messages": valid(messages, raw.where), "answer": answer, "meta": as_json(meta, raw.where), "source": raw.source}


def chosen(spec: Mapping[str, Any], row: Mapping[str, Any], place: str, *usual: str) -> str | None:
    """The column that the recipe names, else the first of the `usual` names that the row has."""
    named = next((spec[key] for key in usual if spec.get(key)), None)
    if named is not None and named not in row:
        raise missing(named, row, place)
    return named or next((name for name in usual if name in row), None)


def missing(column: str, row: Mapping[str, Any], place: str) -> UsageError:
    hint = did_you_mean(column, row)
    return UsageError(f"no column '{column}'.{hint}", place, f"Columns: {', '.join(map(str, row))}")


def as_messages(value: Any, column: str, place: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple) or not value:
        raise UsageError(f"column '{column}' must be text or a list of messages, not {kind_of(value)}", place)
    for message in value:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UsageError(f"column '{column}': a message needs `role` and `content`, got {str(message)[:80]}", place)
    return [{"role": message["role"], "content": message["content"]} for message in value]


def kind_of(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def valid(messages: list[dict[str, str]], place: str) -> list[dict[str, str]]:
    """The messages, or the reason why nobody could answer them."""
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UsageError(f"a message has the role {role!r}.{did_you_mean(str(role), ROLES)}", place)
        if not isinstance(content, str):
            raise UsageError(f"the {role} message must be text, not {kind_of(content)}", place)
        encodable(content, place)
    users = [message["content"] for message in messages if message["role"] == "user"]
    if not users or not users[-1].strip():
        raise UsageError("the prompt is empty" if users else "there is no user message", place)
    if messages[-1]["role"] == "assistant":
        fix = "Give the conversation up to the user's last message; a `map` function can cut it."
        raise UsageError("the last message is the assistant's, so there is nothing to answer", place, fix)
    return messages


def encodable(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("holds half of a surrogate pair (\\ud800 to \\udfff), which is not text", place) from None


def answer_text(value: Any, place: str) -> str | None:
    """The gold answer as text: numbers and truth values as JSON writes them; an empty one is none."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        encodable(value, place)
        return value
    if isinstance(value, bool | int | float):
        return as_json(value, place)
    raise UsageError(f"the answer must be text or a number, not {kind_of(value)}", place, "A `map` function can pick one.")


def as_json(value: Any, place: str) -> str:
    """Canonical JSON; what JSON does not know (a date) is written as text, NaN is refused."""
    try:
        text = digest.canonical(json.loads(json.dumps(value, default=str, allow_nan=False))).decode()
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"a value that JSON cannot hold: {error}", place) from None
    return text


# ------------------------------------------------------------------------------------------------------------- all rows


def numbered(prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each prompt with its id: the first 16 hex digits of its content's hash, and its occurrence number from the second on."""
    seen: Counter[str] = Counter()
    found = []
    for one in prompts:
        key = digest.of(one["messages"], one["answer"])[:16]
        seen[key] += 1
        found.append({"id": key if seen[key] == 1 else f"{key}-{seen[key]}", **one})
    return found


def shuffled(prompts: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """In the order of hashes of seed and id: the same in every version of Python, wherever a row stood before."""
    keys = [digest.uniform("shuffle", seed, one["id"]) for one in numbered(prompts)]
    return [prompts[place] for place in sorted(range(len(prompts)), key=keys.__getitem__)]


def meta_columns(frame: pl.DataFrame) -> list[str]:
    """The names of all meta columns, sorted."""
    return sorted({name for text in frame["meta"].drop_nulls() for name in json.loads(text)})


def source_kind(words: Mapping[str, Any]) -> str:
    """Which kind of prompt source a mapping is; '' for any other mapping."""
    return next((name for name in SOURCE_KINDS if name in words), "")
