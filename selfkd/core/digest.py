"""Identity is content: canonical JSON, hashes of meaning, and seeds that come from names.

Nothing here knows an index, a time, a host or a path. Parquet files and Hugging Face configs carry the version of their
writer, so tables and weights are hashed by what they mean; the hash of a file's bytes is only used to find damage.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl

READ_BYTES = 1 << 22  # of a tensor in memory at once

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
)
ADAPTER = "adapter.json"  # in the folder of an adapter: the digest of the weights that it changes, and how it is served
# What a model folder says beside its tensors: all that decides how text becomes ids, ids become text, and where an answer ends.
DESCRIPTIONS = (
    *("config.json", "adapter_config.json", "generation_config.json", "chat.json"),
    ADAPTER,
    *TOKENIZER_FILES,
    *("chat_template.jinja", "chat_template.json", "chat_templates/*"),
)
FIRST_DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "adapter_config.json")
# Fields of these files that name their writer, or the place they were read from, instead of the model.
WRITER_FIELDS = {
    *("transformers_version", "_name_or_path", "_model_name_or_path", "_from_model_config", "dtype", "torch_dtype"),
    *("name_or_path", "tokenizer_file", "is_local", "local_files_only", "peft_version"),
}

# Made once, because seeds are hashed by the million.
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8; NaN and infinity are refused."""
    return _encoder.encode(value).encode()


def as_json(value: Any) -> Any:
    """Return `value` as a record gives it back: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))


def of(*parts: Any) -> str:
    """Return the SHA-256 (64 hex digits) of the canonical JSON of `parts`, kept apart by being one list."""
    return hashlib.sha256(canonical(list(parts))).hexdigest()


def seed(*names: Any) -> int:
    """Return 63 bits of a hash of names (run seed, round, step, prompt, number, try): order and restarts cannot matter."""
    return int(of("seed", *names)[:16], 16) >> 1


def uniform(*names: Any) -> float:
    """Return a number in [0, 1) hashed from names; it breaks ties the same way on every machine."""
    return (int(of("u", *names)[:16], 16) >> 11) / (1 << 53)


def file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, which finds damage and says nothing about meaning."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def table(frame: pl.DataFrame, by: Iterable[str]) -> str:
    """Return the digest of a table's meaning: rows sorted by the key columns `by`, then each column's values, name and type.

    Row order, chunking, compression and the Parquet writer do not matter; a null differs from a zero or an empty text. A column
    that is null everywhere counts as not there, so a schema may grow without changing the digests of tables made before.
    Rows with equal keys are sorted by all they say.
    """
    frame = frame.select(column for column in frame if column.null_count() < frame.height)
    keys = [column for column in by if column in frame.columns]
    frame = frame.sort(keys, nulls_last=True) if keys else frame
    if _has_ties(frame, keys):
        said = pl.Series([repr(row) for row in frame.select(sorted(frame.columns)).iter_rows()])
        frame = frame.select(pl.all().sort_by(*keys, said, nulls_last=True))
    state = hashlib.sha256(canonical([frame.height, sorted(frame.columns)]))
    for name in sorted(frame.columns):
        state.update(canonical([name, str(frame.schema[name])]))
        for part in _buffers(frame[name]):
            state.update(part)
    return state.hexdigest()


def _has_ties(frame: pl.DataFrame, keys: list[str]) -> bool:
    """Whether two neighbours of a sorted frame have the same key; without keys, whether there are two rows at all."""
    if not keys:
        return frame.height > 1
    same = pl.all_horizontal(pl.col(key).eq_missing(pl.col(key).shift()) for key in keys)
    return bool(frame.select(same.slice(1).any()).item())


def _buffers(series: pl.Series) -> Iterator[bytes]:
    """Yield the bytes of a column, free of its memory layout: a null mask, lengths where values vary, then values."""
    yield np.packbits(series.is_null().to_numpy()).tobytes()
    if isinstance(series.dtype, pl.List):
        yield series.list.len().fill_null(0).cast(pl.Int64).to_numpy().tobytes()
        filled = series.filter(series.list.len() > 0)  # exploding a null or an empty list would invent a row
        yield from _buffers(filled.explode()) if len(filled) else ()
    elif isinstance(series.dtype, pl.Struct):
        for field in series.struct.fields:
            yield from _buffers(series.struct.field(field))
    elif series.dtype == pl.String:
        yield series.str.len_bytes().fill_null(0).cast(pl.Int64).to_numpy().tobytes()
        yield "".join(series.fill_null("").to_list()).encode()
    else:
        yield series.fill_null(0).to_numpy().tobytes()


def weights(folder: Path) -> str:
    """Return the digest of a model folder: (name, dtype, shape, bytes) of each tensor, architecture, tokenizer, chat template.

    Reads safetensors headers itself, so `verify` needs neither torch nor safetensors. A folder without safetensors is a
    fake model, which its `weights.json` describes.
    """
    return next(_readings(folder))


def weights_and_files(folder: Path) -> tuple[str, dict[Path, str]]:
    """Return the digest of a model folder, and the SHA-256 of each of its safetensors files, all from one reading of them."""
    files: dict[Path, str] = {}
    return next(_readings(folder, files)), files


def base_of(folder: Path) -> str | None:
    """Return the digest of the full weights that the adapter in a folder changes; None where the folder holds full weights."""
    path = folder / ADAPTER
    return str(json.loads(path.read_text("utf-8"))["base"]) if path.is_file() else None


def holds(folder: Path, expected: str) -> bool:
    """Whether a model folder holds the weights of this digest; so does one whose digest was taken when it covered fewer texts."""
    return expected in _readings(folder)


def _readings(folder: Path, files: dict[Path, str] | None = None) -> Iterator[str]:
    """Yield the digest of a model folder, then the one that it had in runs made before; fill `files` with the hashes of its shards."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        yield of("fake", json.loads((folder / "weights.json").read_text()))
        return
    with ThreadPoolExecutor(4) as threads:  # hashlib releases the interpreter lock
        read = list(threads.map(lambda path: _tensors(path, files is not None), shards))
    tensors = dict(entry for entries, _ in read for entry in entries)
    if files is not None:
        files.update((path, whole) for path, (_, whole) in zip(shards, read, strict=True))
    for patterns in (DESCRIPTIONS, FIRST_DESCRIPTIONS):
        yield of("weights", tensors, descriptions(folder, patterns))


def descriptions(folder: Path, patterns: Iterable[str]) -> dict[str, str]:
    """Return {name: digest} of the files of a model folder that match, without the fields that name their writer."""
    texts = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): _description(path) for path in texts}


def _description(path: Path) -> str:
    """Return the digest of a file beside the tensors, without the fields that name its writer."""
    if path.suffix == ".json":
        content = json.loads(path.read_text("utf-8"))
        named = isinstance(content, dict)
        return of({key: value for key, value in content.items() if key not in WRITER_FIELDS} if named else content)
    return of(path.read_text("utf-8")) if path.suffix in (".jinja", ".txt") else file(path)


def _tensors(path: Path, with_file: bool) -> tuple[list[tuple[str, list[Any]]], str]:
    """Return [(name, [dtype, shape, sha256 of the bytes])] of one safetensors file, by the format's published layout.

    With `with_file` also the sha256 of the file: every byte is read once, in order, and both are hashed side by side.
    """
    found: list[tuple[str, list[Any]]] = []
    with path.open("rb") as handle, ThreadPoolExecutor(1) as beside:
        reader = _Reader(handle, beside if with_file else None)
        (length,) = struct.unpack("<Q", reader.take(8))
        header: Mapping[str, Any] = json.loads(reader.take(length))
        tensors = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in sorted(
            tensors, key=lambda item: item[1]["data_offsets"]
        ):  # whole: one without bytes shares its start
            start, end = entry["data_offsets"]
            reader.skip_to(8 + length + start)
            found.append((name, [entry["dtype"], entry["shape"], reader.hash_of_next(end - start)]))
        return found, reader.of_file()


class _Reader:
    """Reads a file from its beginning to its end, each block once; with a thread beside it, hashes the whole file as it goes."""

    def __init__(self, handle: BinaryIO, beside: ThreadPoolExecutor | None) -> None:
        self.handle, self.beside, self.at, self.whole = handle, beside, 0, hashlib.sha256()

    def take(self, length: int) -> bytes:
        block = self.handle.read(length)
        if len(block) < length:
            raise EOFError("the file ends inside a tensor")
        self._pass(block, None)
        return block

    def skip_to(self, place: int) -> None:
        """Go on at `place`; one that was read already is only possible in a file that breaks the format."""
        if place < self.at:
            raise ValueError("two tensors share bytes of the file")
        self.hash_of_next(place - self.at)

    def hash_of_next(self, length: int) -> str:
        """Return the SHA-256 of the next `length` bytes."""
        state = hashlib.sha256()
        while length > 0:
            block = self.handle.read(min(READ_BYTES, length))
            if not block:
                raise EOFError("the file ends inside a tensor")
            self._pass(block, state)
            length -= len(block)
        return state.hexdigest()

    def of_file(self) -> str:
        """Return the SHA-256 of the file, what follows the last tensor included; '' where nobody asked."""
        while self.beside and (block := self.handle.read(READ_BYTES)):
            self._pass(block, None)
        return self.whole.hexdigest() if self.beside else ""

    def _pass(self, block: bytes, state: Any) -> None:
        self.at += len(block)
        other = self.beside.submit(self.whole.update, block) if self.beside else None
        if state is not None:
            state.update(block)
        if other is not None:
            other.result()


def with_self_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return `record` as JSON reads it back, with its own digest under "self": reading the file alone finds a flipped bit."""
    body: dict[str, Any] = as_json({key: value for key, value in record.items() if key != "self"})
    return {**body, "self": _self_digest(body)}


def intact(record: Mapping[str, Any]) -> bool:
    """Whether a record that was read back still has the content of which "self" is the digest."""
    return record.get("self") == _self_digest(record)


def _self_digest(record: Mapping[str, Any]) -> str:
    return of("self", {key: value for key, value in record.items() if key != "self"})
