"""The nouns: tables of prompts, samples, scores, drops and rows, the models, and the pool that holds them.

Ids, scores and marks are in memory; texts, messages and token ids ("heavy" columns) stay in the Parquet files that a pool
only names. Nothing here knows how a table was made or where a run lives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import polars as pl

MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))
IDS = pl.List(pl.Int32)
LOGPROBS = pl.List(pl.Float32)
MASK = pl.List(pl.Boolean)
NAMES = pl.List(pl.String)
RANKED = pl.List(pl.Struct({"text": pl.String, "ids": IDS, "ended": pl.Boolean, "score": pl.Float64}))
NUMBERS = pl.List(pl.Struct({"name": pl.String, "value": pl.Float64}))

SCHEMAS: dict[str, dict[str, Any]] = {
    # meta is a JSON object; answer is the gold answer; id is a content hash plus an occurrence number for repeats.
    "prompts": {"id": pl.String, "source": pl.String, "answer": pl.String, "messages": MESSAGES, "meta": pl.String},
    # teacher_messages is what the teacher saw; prompt is what the student sees. token_ids end where the text ends. logprob is the sum
    # over them: null where it was not asked for, or where a stop string began inside a token, so that its rest was never drawn;
    # token_logprobs are its parts, at temperature 1 and before any cut of the distribution.
    # aside is true for what is used only where its stream is named, as a judgment is; it is no answer to its prompt. Null elsewhere.
    "samples": {
        "id": pl.String,
        "prompt": pl.String,
        "stream": pl.String,
        "number": pl.Int32,
        "parents": NAMES,
        "model": pl.String,
        "finish_reason": pl.String,
        "seed": pl.Int64,
        "logprob": pl.Float64,
        "chars": pl.Int32,
        "tokens": pl.Int32,
        "tiebreak": pl.Float64,
        "aside": pl.Boolean,
        "teacher_messages": MESSAGES,
        "text": pl.String,
        "token_ids": IDS,
        "token_logprobs": LOGPROBS,
    },
    # value is null where the sample could not be scored, and why says so; never a quiet zero. A sample has one row per draw, and where
    # it was compared with another one, versus. The score is their mean, each counting by its weight.
    "scores": {
        "sample": pl.String,
        "name": pl.String,
        "draw": pl.Int32,
        "versus": pl.String,
        "value": pl.Float64,
        "weight": pl.Float64,
        "why": pl.String,
    },
    # id names a sample (stream = its stream) or a prompt (stream is null).
    "drops": {"id": pl.String, "stream": pl.String, "step": pl.String, "reason": pl.String},
    # One training row. messages is the student's view; *_ids are the sampled token ids, null for text nobody sampled
    # (a gold answer); *_ended says that the completion ended by itself, so an end-of-sequence token is there to learn;
    # *_mask is true where a token is learned, one value per id, and null where all of them are. label says how good the completion
    # is (kind label); columns are numbers of the row's own, by name, for a loss that asks for them. ranked are all answers of a row of
    # kind rank, the best first: that one is chosen, too. teacher_messages is what the teacher of a row of kind kd sees, and chosen_logprob
    # how likely the completion was to who sampled it, where that is known.
    "rows": {
        "id": pl.String,
        "kind": pl.String,
        "stream": pl.String,
        "role": pl.String,
        "weight": pl.Float64,
        "label": pl.Float64,
        "columns": NUMBERS,
        "samples": NAMES,
        "messages": MESSAGES,
        "chosen": pl.String,
        "chosen_ids": IDS,
        "chosen_ended": pl.Boolean,
        "chosen_mask": MASK,
        "rejected": pl.String,
        "rejected_ids": IDS,
        "rejected_ended": pl.Boolean,
        "rejected_mask": MASK,
        "ranked": RANKED,
        "teacher_messages": MESSAGES,
        "chosen_logprob": pl.Float64,
    },
}
KEYS = {
    "prompts": ("id",),
    "samples": ("id",),
    "scores": ("sample", "name", "draw", "versus"),
    "drops": ("id", "step"),
    "rows": ("id",),
}
HEAVY = {
    "prompts": ("messages", "meta"),
    "samples": ("teacher_messages", "text", "token_ids", "token_logprobs"),
    "scores": (),
    "drops": (),
    "rows": (
        *("messages", "chosen", "chosen_ids", "chosen_mask", "rejected", "rejected_ids", "rejected_mask", "ranked"),
        "teacher_messages",
    ),
}

APART = (
    "token_logprobs",
)  # columns that no digest covers: they steer nothing, and a run made before there were any goes on as it was


def empty(table: str) -> pl.DataFrame:
    """A table of no rows with every column, heavy ones included."""
    return pl.DataFrame(schema=SCHEMAS[table])


def shape(table: str, rows: Any) -> pl.DataFrame:
    """Rows (a frame or a list of dicts) as `table`: its columns in order, its types; missing columns become null."""
    frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows, schema_overrides=SCHEMAS[table], strict=False)
    missing = [pl.lit(None, kind).alias(name) for name, kind in SCHEMAS[table].items() if name not in frame.columns]
    return frame.with_columns(missing).select(pl.col(name).cast(kind) for name, kind in SCHEMAS[table].items())


def light_columns(table: str) -> list[str]:
    """Return the columns of a table that are in memory."""
    return [name for name in SCHEMAS[table] if name not in HEAVY[table]]


def scan(table: str, paths: Sequence[Path]) -> pl.LazyFrame:
    """Scan the files of a table with every column of its schema: one that a file lacks is null, one it has beside is ignored."""
    if not paths:
        return empty(table).lazy()
    return pl.scan_parquet(list(paths), schema=SCHEMAS[table], missing_columns="insert", extra_columns="ignore", glob=False)


def read_light(table: str, paths: Sequence[Path]) -> pl.DataFrame:
    """Read of a table's files the columns that are in memory."""
    return scan(table, paths).select(light_columns(table)).collect()


def as_stored(paths: Sequence[Path]) -> pl.DataFrame:
    """Read the files of a table with the columns they hold, whichever version wrote them: what a digest of the table covers."""
    frames = [pl.read_parquet(path, glob=False).drop(APART, strict=False) for path in paths]
    return pl.concat(frames, how="diagonal") if frames else pl.DataFrame()


def light(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """`frame` without the columns that stay on disk."""
    return frame.drop([column for column in HEAVY[table] if column in frame.columns])


@cache
def _none(table: str) -> pl.DataFrame:
    return light(table, empty(table))


@dataclass(frozen=True)
class Model:
    """Weights of one role. `path` is relative to the run folder in a pool, absolute where a backend is asked.

    `kind` is full weights, or an adapter that changes the full weights at `base`. `digest` is of what an engine serves: for an
    adapter, of both.
    """

    role: str
    path: str
    digest: str
    kind: Literal["full", "adapter"] = "full"
    base: str | None = None

    def __str__(self) -> str:
        return f"{self.role}@{self.digest[:12]}"

    def at(self, root: Path) -> Model:
        base = None if self.base is None else str(root / self.base)
        return replace(self, path=str(root / self.path), base=base)


@dataclass(frozen=True)
class Pool:
    """What a round knows so far: light tables, the files that hold their heavy columns, models by name, metrics.

    `scores_named` are the scores that steps have given, also those that no sample has yet: expressions may use them all.
    `prompt_columns` are the types of the prompts' own columns, where they are known without the files.
    `+` concatenates; a model or metric of the right side replaces that of the left.
    """

    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    scores_named: tuple[str, ...] = ()
    prompt_columns: Mapping[str, pl.DataType] | None = None

    def __getattr__(self, name: str) -> pl.DataFrame:
        if name not in SCHEMAS:
            raise AttributeError(name)
        return self.tables[name] if name in self.tables else _none(name)

    def scan(self, table: str) -> pl.LazyFrame:
        """The whole table with its heavy columns, read from disk only where a caller asks for them.

        A prompt may stand in several files, as when a round that drew some of them replays others; it is there once.
        """
        paths = self.files.get(table, ())
        found = scan(table, paths)
        return found.unique("id", keep="first", maintain_order=True) if table == "prompts" and len(paths) > 1 else found

    def __add__(self, more: Pool) -> Pool:
        names = [name for name in SCHEMAS if name in self.tables or name in more.tables]
        return Pool(
            {name: pl.concat([getattr(self, name), getattr(more, name)]) for name in names},
            {name: (*self.files.get(name, ()), *more.files.get(name, ())) for name in SCHEMAS},
            {**self.models, **more.models},
            {**self.metrics, **more.metrics},
            tuple(dict.fromkeys((*self.scores_named, *more.scores_named))),
            self.prompt_columns if more.prompt_columns is None else more.prompt_columns,
        )


Part = pl.DataFrame | Path  # of a table: a frame with its heavy columns, or a file that was written already


@dataclass(frozen=True)
class Addition:
    """What a step adds. A table is a list of frames (heavy columns included) or of files a worker already wrote.

    `models` maps a role to a finished folder under the run's tmp/, `bases` one whose folder holds an adapter to the folder of full weights
    that it changes, relative to the run, `states` one to the state of the optimiser that made it; `checks` are what models inside an
    update were measured to be; `notes` stand outside every digest.
    """

    tables: Mapping[str, list[Part]] = field(default_factory=dict)
    models: Mapping[str, Path] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    bases: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, Path] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)

    def whole(self, table: str) -> pl.DataFrame:
        """A table of this addition in memory, with every column."""
        parts = [
            part if isinstance(part, pl.DataFrame) else scan(table, [part]).collect() for part in self.tables.get(table, [])
        ]
        return pl.concat(parts) if parts else empty(table)


@dataclass(frozen=True)
class Function:
    """A user's function: `file.py:name`, the file as found, and the digest of its code.

    `environment` names variables that it may see although they look like secrets. `in_place`: it is run where it lies, for it
    is not a part of what a run freezes.
    """

    name: str
    path: Path
    digest: str
    params: Mapping[str, Any] = field(default_factory=dict)
    environment: tuple[str, ...] = ()
    in_place: bool = False
