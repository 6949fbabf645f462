"""The records of a run: what `run.json`, a step's commit, a round's seal and the lesser ones hold, and their one reader.

Format 2 is additive. A field that this version does not know is kept (`more`) and stays under the record's own digest; a field
that an older writer did not know has its default. Whatever is compared or chained is a digest of meaning, made by the functions
at the end; `notes` are outside all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from selfkd.core import digest, storage
from selfkd.core.pool import Model
from selfkd.errors import ChainError

FORMAT = 2
RESTORE = "Restore the file from a copy. All damage: selfkd verify RUN"
Json = dict[str, Any]
AnyRecord = TypeVar("AnyRecord", bound="Record")


def _counted(words: Mapping[str, Any]) -> Mapping[str, Any]:
    if all(type(words.get(name)) is int for name in ("rounds", "context")):
        return words
    raise ValueError("a resolved recipe gives `rounds` and `context` as whole numbers")


RecipeWords = Annotated[Mapping[str, Any], AfterValidator(_counted)]


class Malformed(ValueError):
    """A record that lacks a field, or that holds in one what does not belong there: somebody else wrote it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all records share. `more` holds the fields of a newer writer, which are kept and verified but mean nothing here."""

    nested: ClassVar[Mapping[str, type[Record]]] = {}  # fields that map names to records
    listed: ClassVar[Mapping[str, type[Record]]] = {}  # fields that are lists of records

    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls: type[AnyRecord], content: Mapping[str, Any]) -> AnyRecord:
        """Build the record; Malformed says which field is missing or is of another kind than it should be."""
        known = {one.name: one for one in fields(cls) if one.name != "more"}
        given: Json = {}
        for name, one in known.items():
            if name in content:
                given[name] = cls._read(name, content[name])
            elif one.default is MISSING and one.default_factory is MISSING:
                raise Malformed(f"lacks the field {name!r}")
        return cls(**given, more={name: value for name, value in content.items() if name not in known and name != "self"})

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        try:
            _shape(cls, name).validate_python(value)  # type: ignore[arg-type] # a class is hashable whatever its instances are
        except ValidationError as error:
            raise Malformed(f"holds in {name!r} what does not belong there: {error.errors()[0]['msg']}") from None
        if name in cls.nested:
            return {key: cls.nested[name].from_json(inner) for key, inner in value.items()}
        return tuple(cls.listed[name].from_json(inner) for inner in value) if name in cls.listed else value

    def to_json(self) -> Json:
        """Return plain JSON, unknown fields included."""
        own = {one.name: _plain(getattr(self, one.name)) for one in fields(self) if one.name != "more"}
        return {**own, **self.more}


@cache
def _shape(kind: type[Record], name: str) -> TypeAdapter[Any]:
    """Return what checks the JSON of a field: that of a record within it is an object, whose own fields are checked when it is read."""
    hint: Any = get_type_hints(kind, include_extras=True)[name]
    if name in kind.nested:
        hint = dict[str, dict[str, Any]]
    elif name in kind.listed:
        hint = list[dict[str, Any]]
    return TypeAdapter(hint, config=ConfigDict(strict=True))


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class TableEntry(Record):
    """A table that a step added: its files relative to the run, its rows, and the digest of what it means."""

    files: list[str]
    rows: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class ModelEntry(Record):
    """A model: its folder relative to the run and the digest of the weights that an engine serves.

    `kind` is full weights or an adapter; an adapter names the folder of its `base`, and its digest covers both.
    """

    path: str
    digest: str
    kind: Literal["full", "adapter"] = "full"
    base: str | None = None

    @classmethod
    def of(cls, model: Model) -> ModelEntry:
        return cls(path=model.path, digest=model.digest, kind=model.kind, base=model.base)

    def model(self, role: str) -> Model:
        return Model(role, self.path, self.digest, self.kind, self.base)


@dataclass(frozen=True, kw_only=True)
class StateEntry(Record):
    """The state of the optimiser that made a model: its folder relative to the run, the digest of its files, and that of the `model`."""

    path: str
    digest: str
    model: str


@dataclass(frozen=True, kw_only=True)
class SplitEntry(Record):
    """The frozen prompts of a split. `overlap` counts prompts taken out because they stand in another split too.

    `read_sha256` is of the file they were read from; '' where they came from elsewhere.
    """

    file: str
    rows: int
    digest: str
    repeats: int = 0
    overlap: int = 0
    read_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class CodeEntry(Record):
    """A reward or template as frozen: its file relative to the run, and the digest of its code or text.

    Of a model that scores, its folder, the digest of its weights, and which `revision` of a hub's it is.
    """

    path: str
    digest: str
    revision: str = ""


@dataclass(frozen=True, kw_only=True)
class DataEntry(CodeEntry):
    """Answers that a `bring` step brings, as frozen: `digest` is of what the table means, `reading` the words that it was read by.

    `ours` of the rows answer train prompts, `dropped` may not be used. `read_sha256` is of the file they were read from; '' where they
    came from elsewhere. `licence` is what the recipe says it is, None where it does not.
    """

    rows: int
    ours: int
    dropped: int
    reading: Mapping[str, Any]
    read_sha256: str = ""
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class Info(Record):
    """run.json: all that is fixed when a run is created, and the numerics asked for then. `root` is what the first step follows."""

    nested = {"prompts": SplitEntry, "code": CodeEntry, "data": DataEntry}

    format: int
    name: str
    created: str
    seed: int
    root: str
    rounds: int
    model: Mapping[str, Any]
    prompts: Mapping[str, SplitEntry]
    recipe: RecipeWords
    code: Mapping[str, CodeEntry]
    numerics: Mapping[str, Any]
    machine: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, DataEntry] = field(default_factory=dict)
    numerics_fixed: bool = True  # by this record, as in older runs; else by numerics.json


@dataclass(frozen=True, kw_only=True)
class Numerics(Record):
    """numerics.json: what fixes the numbers of a run, from the first engine or trainer on that came up with it."""

    numerics: Mapping[str, Any]
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Computer(Record):
    """facts/KIND-001.json: what a process computed with when it was first met. `digest` is that of `facts`."""

    kind: str
    process: str
    facts: Mapping[str, Any]
    digest: str
    host: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Cut(Record):
    """cut-01-sample-KEY.json: into chunks of what `size` these requests are cut, and for how many `engines` that was decided.

    It is the unit of redoing and stays outside every digest.
    """

    key: str
    requests: int
    engines: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Amendment(Record):
    """A recipe that replaces the one in force from the steps on that are not made yet.

    `sealed` is how many rounds were sealed when it was written: a run that had stopped by then was asked to go on.
    """

    nested = {"code": CodeEntry}

    changed: list[str]
    recipe: RecipeWords
    code: Mapping[str, CodeEntry]
    files: Mapping[str, Mapping[str, Any]]
    when: str
    sealed: int = 0


@dataclass(frozen=True, kw_only=True)
class Commit(Record):
    """What a step added. `key` says what was asked for, `digest` also what came out; `parent` is the digest of the step before.

    `outside`: the step measured, so its tables stay out of the pool. `states` are those of optimisers that go on in later updates,
    `checks` what the models inside an update were measured to be, and which of them it left.
    """

    nested = {"tables": TableEntry, "models": ModelEntry, "states": StateEntry}

    format: int
    round: int
    number: int
    step: str
    verb: str
    outside: bool
    key: str
    parent: str
    identity: Mapping[str, Any]
    code: Mapping[str, str]
    tables: Mapping[str, TableEntry]
    models: Mapping[str, ModelEntry]
    metrics: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    digest: str
    states: Mapping[str, StateEntry] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SealedStep(Record):
    """A step as its round's seal names it."""

    name: str
    number: int
    verb: str
    digest: str
    file: str
    file_sha256: str


@dataclass(frozen=True, kw_only=True)
class Seal(Record):
    """The commit of a round: its steps, the models at the head it leaves, and whether the round was accepted or rolled back.

    `measures` says of each metric how it was measured: a digest of the step and its code. Two rounds in which it differs did
    not measure the same, whatever the metric is called.
    """

    nested = {"models": ModelEntry}
    listed = {"steps": SealedStep}

    format: int
    round: int
    parent: str
    steps: tuple[SealedStep, ...]
    models: Mapping[str, ModelEntry]
    metrics: Mapping[str, Any]
    accepted: bool
    why: str
    stop: str
    digest: str
    measures: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def head(self) -> dict[str, Model]:
        """Return the models that the round leaves, by role."""
        return {role: entry.model(role) for role, entry in self.models.items()}


@dataclass(frozen=True, kw_only=True)
class Tombstone(Record):
    """pruned-001.json, …: the checkpoints that retention took away from a round at one time; there may be more of them."""

    paths: list[str]


@dataclass(frozen=True, kw_only=True)
class RoundedEntry(Record):
    """A copy of a checkpoint rounded to bf16: its folder and files relative to the run, and the digest of the weights in it."""

    path: str
    digest: str
    files: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Rounded(Record):
    """rounded-001.json, …: {checkpoint that a step committed: the copy that retention left of it}."""

    nested = {"models": RoundedEntry}

    models: Mapping[str, RoundedEntry]


# ---- reading and writing ----


def read(path: Path, kind: type[AnyRecord], unchanged: bool = True) -> AnyRecord:
    """Read a record; ChainError where it is not JSON, was changed after it was written, or is of a format this version does not read.

    With `unchanged` false a changed one is read all the same: a status shows what is there, and `verify` says whether it holds.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ChainError(f"is not readable: {error}", str(path), RESTORE) from error
    if not isinstance(content, dict) or (unchanged and not digest.intact(content)):
        raise ChainError("was changed after it was written", str(path), RESTORE)
    if problem := format_problem(content):
        raise ChainError(problem, str(path))
    try:
        return kind.from_json(content)
    except Malformed as error:
        raise ChainError(str(error), str(path), RESTORE) from None


def format_problem(content: Mapping[str, Any]) -> str:
    """Return why this version cannot read a record of another format, or ''."""
    written = content.get("format", FORMAT)
    if written == FORMAT:
        return ""
    which = "an older" if isinstance(written, int) and written < FORMAT else "a newer"
    return f"was written by {which} selfkd (format {written}; this one reads format {FORMAT}): use that version, or start a new run"


def write(path: Path, record: Record, tmp: Path) -> bool:
    """Commit `record` with its own digest; False where that name exists already."""
    return storage.put_json(path, digest.with_self_digest(record.to_json()), tmp)


# ---- digests of meaning ----


def root_digest(seed: int, context: int, prompts: Mapping[str, SplitEntry]) -> str:
    """Return what the first step of a run follows."""
    return digest.of("run", FORMAT, seed, context, {split: entry.digest for split, entry in prompts.items()})


def key(parent: str, identity: Mapping[str, Any], code: Mapping[str, str]) -> str:
    """Return what a step is asked for: the history it follows, its fields, and the code it names."""
    return digest.of("key", parent, identity, code)


def step_digest(
    key: str,
    tables: Mapping[str, TableEntry],
    models: Mapping[str, ModelEntry],
    metrics: Mapping[str, Any],
    states: Mapping[str, StateEntry],
    checks: Mapping[str, Any],
) -> str:
    """Return what a step was asked for and what came out; states and checks only where there are some."""
    contents = ({name: table.digest for name, table in tables.items()}, _meanings(models))
    kept = [{role: [state.digest, state.model] for role, state in states.items()}] if states else []
    return digest.of("step", key, *contents, dict(metrics), *kept, *([dict(checks)] if checks else []))


def state_digest(files: Mapping[str, str]) -> str:
    """Return the digest of an optimiser's state, from the SHA-256 of its files by name; who divided it otherwise has other files."""
    return digest.of("state", dict(files))


def round_digest(index: int, last_step: str, models: Mapping[str, ModelEntry], accepted: bool) -> str:
    """Return what a round leaves: its last step's digest, the models at its head, and the verdict."""
    return digest.of("round", index, last_step, _meanings(models), accepted)


def _meanings(models: Mapping[str, ModelEntry]) -> Json:
    """Return {role: digest}; what is not full weights says so, and names its base."""
    plain = {role: model.digest for role, model in models.items() if model.kind == "full" and model.base is None}
    return plain | {role: [model.digest, model.kind, model.base] for role, model in models.items() if role not in plain}
