"""What the records and tables of a run hold, looked up by id: rows, samples, scores, drops, prompts, checkpoints, code.

Everything is found by value: a model by its digest, code by the digest that a commit names. What is not there is said, never guessed.
Knows not what follows from what: that is `origins` and `uses`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError

from selfkd.backend.base import made_by
from selfkd.backend.probe import FILE as PROBE
from selfkd.chain import records, rounded
from selfkd.chain.models import known_models
from selfkd.chain.paths import Paths
from selfkd.chain.records import Amendment, CodeEntry, Commit, Info, ModelEntry, Seal
from selfkd.core import storage
from selfkd.core.known_models import Models
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Model, read_light, scan
from selfkd.errors import ChainError
from selfkd.recipe.schema import Best
from selfkd.report import status
from selfkd.steps import VERBS, Step
from selfkd.steps.average import AverageStep
from selfkd.steps.train import TrainStep

AT = "_commit"  # which commit a row of a table is of
Parent = tuple[
    str, str, Model | None
]  # the field that names a model, how it does, and which one that was; None where it is not there
Found = tuple[Commit, dict[str, Any]]  # a row of a table, and the commit that added it


@dataclass(frozen=True)
class Checkpoint:
    """A model that a step committed: the first step that did, under which role, and its entry there."""

    commit: Commit
    role: str
    entry: ModelEntry

    @property
    def name(self) -> str:
        return f"{self.role}@{self.entry.digest[:12]}"


@dataclass
class History:
    """The commits of a run in their order, its seals, and what was frozen. ChainError for a record that was changed after it was written."""

    paths: Paths
    info: Info
    amendments: Sequence[Amendment]
    seals: Mapping[int, Seal]
    commits: Sequence[Commit]
    relied: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # files of which a row was used, as committed
    missing: dict[str, None] = field(default_factory=dict)  # files of tables that are not there, in the order met
    _tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    _prompts: dict[str, tuple[list[str], dict[str, Any]] | None] = field(default_factory=dict)
    _weights: dict[str, set[str]] = field(default_factory=dict)
    _steps: dict[str, Step | None] = field(default_factory=dict)
    _parents: dict[str, list[Parent]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> History:
        """Read the records of the run in `folder`; UsageError where there is none."""
        paths = Paths(folder)
        status.info_of(paths)
        names = paths.rounds()
        seals = {one.index: records.read(one.seal, Seal) for one in names if one.seal.is_file()}
        commits = [records.read(path, Commit) for one in names for path in one.commits()]
        amendments = [records.read(path, Amendment) for path in paths.amendments()]
        return cls(paths, records.read(paths.info, Info), amendments, seals, commits)

    def where(self, commit: Commit) -> str:
        """Return the place of a commit as its folder is called: round-001/02-score."""
        return self.paths.relative(self.paths.round(commit.round).data(commit.number, commit.step))

    # ---- rows of tables ----

    def look(
        self, table: str, keep: pl.Expr, heavy: Sequence[str] = (), commits: Sequence[Commit] | None = None
    ) -> list[Found]:
        """Return the rows of a table for which `keep` holds, in the order of the commits, with these of the columns that stay on disk."""
        frame = self.table(table).filter(keep)
        if commits is not None:
            wanted = {id(one) for one in commits}
            frame = frame.filter(pl.col(AT).is_in([at for at, one in enumerate(self.commits) if id(one) in wanted]))
        rows = frame.to_dicts()
        for at in sorted({row[AT] for row in rows}):
            self.relied |= {
                name: entry for name, entry in self.commits[at].files.items() if name in self.commits[at].tables[table].files
            }
            if heavy:
                self._add_heavy(table, at, [row for row in rows if row[AT] == at], heavy)
        return [(self.commits[row.pop(AT)], row) for row in rows]

    def table(self, name: str) -> pl.DataFrame:
        """Return a table of all commits without the columns that stay on disk; AT says which commit a row is of."""
        if name not in self._tables:
            parts = [
                read_light(name, self.files(commit, name)).with_columns(pl.lit(at, pl.Int64).alias(AT))
                for at, commit in enumerate(self.commits)
                if name in commit.tables
            ]
            none = read_light(name, []).with_columns(pl.lit(0, pl.Int64).alias(AT))
            self._tables[name] = pl.concat([none, *parts])
        return self._tables[name]

    def _add_heavy(self, table: str, at: int, rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
        wanted = pl.col("id").is_in([row["id"] for row in rows])
        frame = scan(table, self.files(self.commits[at], table)).filter(wanted).select("id", *columns).collect()
        known = {row["id"]: row for row in frame.iter_rows(named=True)}
        for row in rows:
            row |= known[row["id"]]

    def files(self, commit: Commit, table: str) -> list[Path]:
        """Return the files of a commit's table that are there; the others are noted as missing."""
        there = []
        for name in commit.tables[table].files if table in commit.tables else ():
            if (self.paths.folder / name).is_file():
                there.append(self.paths.folder / name)
            else:
                self.missing[name] = None
        return there

    def frozen_prompts(self) -> Iterator[tuple[str, Path]]:
        """Yield (split, file) of the prompts frozen in the run."""
        for split, entry in self.info.prompts.items():
            path = self.paths.folder / entry.file
            if path.is_file():
                yield split, path
            else:
                self.missing[entry.file] = None

    def prompt(self, name: str) -> tuple[list[str], dict[str, Any]] | None:
        """Return the splits that a prompt is frozen in, and its row; None where it stands in none."""
        if name not in self._prompts:
            self._prompts[name] = self._frozen_prompt(name)
        return self._prompts[name]

    def _frozen_prompt(self, name: str) -> tuple[list[str], dict[str, Any]] | None:
        splits, row = list[str](), None
        for split, path in self.frozen_prompts():
            if found := scan("prompts", [path]).filter(pl.col("id") == name).collect().to_dicts():
                splits, row = [*splits, split], row or found[0]
                entry = self.info.prompts[split].file
                self.relied |= {entry: self.info.files[entry]} if entry in self.info.files else {}
        return (splits, row) if row else None

    def changed(self) -> list[str]:
        """Return one sentence for each file that was relied upon and is not as it was committed, and for each that is missing."""
        return [*storage.damaged(self.relied, self.paths.folder, rehash=True), *(f"{name} is missing" for name in self.missing)]

    # ---- steps and their code ----

    def step(self, commit: Commit) -> Step | None:
        """Return the step as its commit says it was; None where this version cannot read its fields, as those of the load step."""
        where = self.where(commit)
        if where not in self._steps:
            self._steps[where] = _read(commit)
        return self._steps[where]

    def code(self, digest: str) -> CodeEntry | None:
        """Return where code, a template, data or a scoring model of this digest was frozen; None where it is nowhere."""
        frozen = [self.info.code, self.info.data, *(one.code for one in self.amendments)]
        return next((entry for known in frozen for entry in known.values() if entry.digest == digest), None)

    def sha256(self, path: str) -> str:
        """Return the hash that was recorded of a frozen file, which is relied upon from now on; '' where none was."""
        known = [self.info.files, *(one.files for one in self.amendments)]
        entry = next((files[path] for files in known if path in files), None)
        self.relied |= {path: entry} if entry else {}
        return str(entry["sha256"]) if entry else ""

    # ---- models ----

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """Every model that was committed, each digest once, in the order in which they were made."""
        found: dict[str, Checkpoint] = {}
        for commit in self.commits:
            for role, entry in commit.models.items():
                found.setdefault(entry.digest, Checkpoint(commit, role, entry))
        return list(found.values())

    def checkpoint(self, digest: str) -> Checkpoint | None:
        return next((one for one in self.checkpoints if one.entry.digest == digest), None)

    def sampler(self, name: str) -> list[Checkpoint]:
        """Return the models that `role@digest`, as a sample names its own, may mean: one, where the digest is of a committed model."""
        begins = name.partition("@")[2]
        return [one for one in self.checkpoints if begins and one.entry.digest.startswith(begins)]

    def made_files(self, commit: Commit) -> set[str]:
        """Return the digests of the weights that, as the files of a commit's samples say inside, made them."""
        where = self.where(commit)
        if where not in self._weights:
            self._weights[where] = {made_by(path).weights for path in self.files(commit, "samples")} - {""}
        return self._weights[where]

    def lies(self, checkpoint: Checkpoint) -> str:
        """Return where a checkpoint lies now, relative to the run; '' where it is on disk no more."""
        found = rounded.located(self.paths.folder, checkpoint.entry.model(checkpoint.role)).path
        return found if (self.paths.folder / found).is_dir() else ""

    def heads(self, digest: str) -> list[int]:
        """Return the rounds at whose end a model was the head of the chain."""
        return [index for index, seal in self.seals.items() if any(one.digest == digest for one in seal.models.values())]

    def named(self, commit: Commit, reference: ModelRef) -> Model | None:
        """Return the model that a step named, from what was sealed and committed before it; None where that is not there."""
        before = [self.seals[index] for index in sorted(self.seals) if index < commit.round]
        start: Models = before[-1].head() if before else {}
        made = [one for one in self.commits if one.round == commit.round and one.number < commit.number and not one.outside]
        now = {**start, **{role: entry.model(role) for one in made for role, entry in one.models.items()}}
        known = known_models(commit.round, start, before, self.best, self._loaded)
        try:
            return known.find(reference, now, self.where(commit))
        except ChainError:
            return None

    def parents(self, one: Checkpoint) -> list[Parent]:
        """Return the models that a checkpoint was trained from, held against, taught by, or averaged of."""
        if one.entry.digest not in self._parents:
            self._parents[one.entry.digest] = self._named_by(one)
        return self._parents[one.entry.digest]

    def _named_by(self, one: Checkpoint) -> list[Parent]:
        step, commit = self.step(one.commit), one.commit
        if isinstance(step, AverageStep):
            made_of = commit.notes.get("average", [])
            return [(f"{made['share']:g} of", made["model"], Model(one.role, made["path"], made["digest"])) for made in made_of]
        if isinstance(step, TrainStep):
            return [(field, str(named), self.named(commit, named)) for field, named in step.models().items()]
        return []

    @property
    def best(self) -> Best | None:
        words = status.in_force(self.info, self.amendments).get("best")
        return Best.model_validate(words) if words else None

    def _loaded(self) -> Models:
        first = next((one for one in self.commits if one.round == 0), None)
        return {role: entry.model(role) for role, entry in first.models.items()} if first else {}

    def parent_said(self, checkpoint: Checkpoint) -> str | None:
        """Return the digest of the model that a checkpoint says it was trained from; None where its folder is gone or does not say."""
        path = self.paths.folder / (self.lies(checkpoint) or "gone") / PROBE
        try:
            said = json.loads(path.read_text("utf-8")).get("parent")
        except (OSError, ValueError, AttributeError):
            return None
        return said if isinstance(said, str) else None


def _read(commit: Commit) -> Step | None:
    words = {name: value for name, value in commit.identity.items() if name != "verb"}
    try:
        return VERBS[commit.verb].model_validate(words) if commit.verb in VERBS else None
    except ValidationError:
        return None
