"""A step's commit: the key that says what was asked for, writing what was added, reading it back, and refusing what does not belong.

A step exists if and only if its commit parses, chains, and its files are there. What the next step sees is always what is read
back here, never what was in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.chain import records, rounded
from selfkd.chain.paths import Paths, RoundPaths
from selfkd.chain.records import CodeEntry, Commit, ModelEntry, Seal, SealedStep, StateEntry, TableEntry, Tombstone
from selfkd.core import digest, storage
from selfkd.core.pool import KEYS, Addition, Model, Pool, as_stored, read_light, scan
from selfkd.errors import ChainError, GuardError
from selfkd.steps import VERBS, Step
from selfkd.steps.train import TrainStep


@dataclass(frozen=True)
class Place:
    """Where a step stands in its run: which round, which number in it, and the digest that it follows."""

    paths: Paths
    index: int
    number: int
    step: Step
    parent: str
    code: Mapping[str, str]

    @property
    def round(self) -> RoundPaths:
        return self.paths.round(self.index)

    @property
    def commit(self) -> Path:
        return self.round.commit(self.number, self.step.name)

    @property
    def data(self) -> Path:
        return self.round.data(self.number, self.step.name)

    def cut(self, key: str) -> Path:
        """Return the record of how the requests of this key are cut."""
        return self.round.cut(self.number, self.step.name, key)

    @cached_property
    def key(self) -> str:
        return records.key(self.parent, self.step.identity(), self.code)

    @property
    def generation_key(self) -> str:
        """Return what the answers of this step are asked for, whatever scores them: the key without that."""
        texts = {name: text for name, text in self.code.items() if name in self.step.templates()}
        return records.key(self.parent, self.step.generation(), texts)

    @property
    def where(self) -> str:
        """Return the place as messages name it."""
        return f"{self.round.folder.name}/{self.step.name}"


def code_of(step: Step, frozen: Mapping[str, CodeEntry]) -> dict[str, str]:
    """Return {reference: digest} of the code, templates, scoring models and data that a step names; text inside the recipe is in its identity."""
    names = [*step.functions(), *step.templates(), *step.scorers(), *([step.data()] if step.data() else [])]
    return {name: frozen[name].digest for name in names if name in frozen}


# ---- writing ----


def write(place: Place, added: Addition, pool: Pool, before: Mapping[str, Model], notes: Mapping[str, Any]) -> None:
    """Commit what a step added to `pool`; GuardError for a row that is there already.

    `before` are the models that entered the round: a training that changed nothing is refused.
    """
    files = {name: [_written(place, part) for part in parts] for name, parts in added.tables.items()}
    tables = {name: _table(place, name, paths, pool) for name, paths in files.items()}
    hashes: dict[Path, str] = {}
    models = {role: _adopted(place, role, added, before, hashes) for role in added.models}
    states = {role: _state(place, role, folder, models[role], hashes) for role, folder in added.states.items()}
    kept = [path for paths in files.values() for path in paths]
    folders = [*(model.path for model in models.values()), *(state.path for state in states.values())]
    kept += [path for folder in folders for path in storage.files_in(place.paths.folder / folder)]
    record = Commit(
        format=records.FORMAT,
        round=place.index,
        number=place.number,
        step=place.step.name,
        verb=place.step.verb,
        outside=place.step.outside,
        key=place.key,
        parent=place.parent,
        identity=place.step.identity(),
        code=place.code,
        tables=tables,
        models=models,
        metrics=dict(added.metrics),
        files=storage.file_hashes(kept, place.paths.folder, hashes),
        digest=records.step_digest(place.key, tables, models, added.metrics, states, added.checks),
        states=states,
        checks=dict(added.checks),
        notes=notes,
    )
    records.write(place.commit, record, place.paths.tmp)


def _written(place: Place, part: pl.DataFrame | Path) -> Path:
    return part if isinstance(part, Path) else storage.write_parquet(part, place.data, place.paths.tmp)


def _table(place: Place, name: str, files: list[Path], pool: Pool) -> TableEntry:
    frame = as_stored(files)
    _refuse_repeats(place, name, frame, pool)
    written = [place.paths.relative(path) for path in files]
    return TableEntry(files=written, rows=frame.height, digest=digest.table(frame, KEYS[name]))


def _refuse_repeats(place: Place, name: str, frame: pl.DataFrame, pool: Pool) -> None:
    """Raise GuardError where two rows have one key: joins would double them, and what is trained on them counts twice."""
    if not frame.height:
        return
    keys = [key for key in KEYS[name] if key in frame.columns]
    known = [] if place.step.outside or name not in pool.tables else [pool.tables[name].select(keys)]
    rows = pl.concat([*known, frame.select(keys)])
    if rows[keys[0]].n_unique() == rows.height or rows.n_unique() == rows.height:  # the first is five times quicker
        return
    first = rows.filter(rows.is_duplicated()).row(0, named=True)
    said = ", ".join(f"{key} {value}" for key, value in first.items() if value is not None)
    fix = "Nothing of this step was committed. Report it with the recipe and this message."
    raise GuardError(f"two rows of the table '{name}' are the same one: {said}", place.where, fix)


def _adopted(place: Place, role: str, added: Addition, before: Mapping[str, Model], hashes: dict[Path, str]) -> ModelEntry:
    """Move a finished checkpoint into the step's folder, under a name that carries its weights digest; note the hashes of its shards.

    Nothing that the trainer says of its files is taken over: they are read here, once, for the digest and for the hashes of the record.
    """
    folder, base = added.models[role], added.bases.get(role)
    found, files = digest.weights_and_files(folder)
    if place.step.verb == TrainStep.verb and role in before and found == before[role].digest:
        fix = "Raise trl.learning_rate, or look at the loss in the log."
        raise GuardError("training left the weights unchanged", place.where, fix)
    target = place.data / f"{role}-{found[:16]}"
    kept = not target.exists()  # one that lies there already is hashed itself
    path = storage.adopt(folder, target)
    hashes.update((path / file.relative_to(folder), whole) for file, whole in files.items() if kept)
    return ModelEntry(path=place.paths.relative(path), digest=found, kind="adapter" if base else "full", base=base)


def _state(place: Place, role: str, folder: Path, model: ModelEntry, hashes: dict[Path, str]) -> StateEntry:
    """Move the state of the optimiser that made a model beside it, under a name that carries its digest; note the hashes of its files."""
    files = {path.relative_to(folder).as_posix(): digest.file(path) for path in storage.files_in(folder)}
    found = records.state_digest(files)
    target = place.data / f"{role}-state-{found[:16]}"
    kept = not target.exists()  # one that lies there already is hashed itself
    path = storage.adopt(folder, target)
    hashes.update((path / name, sha256) for name, sha256 in files.items() if kept)
    return StateEntry(path=place.paths.relative(path), digest=found, model=model.digest)


# ---- reading back ----


def read(place: Place) -> Commit:
    """Return the commit at `place`; ChainError where it was made by another recipe, or its files are not as committed."""
    commit = records.read(place.commit, Commit)
    if problem := mismatch(place, commit):
        raise ChainError(problem, place.paths.shown(place.commit), _ways_out(place))
    _check_files(place, commit)
    return commit


def mismatch(place: Place, commit: Commit) -> str:
    """Return in what a commit is not the step at `place`, or ''."""
    return "" if commit.key == place.key else f"was made by a different recipe: {_difference(place, commit)}"


def refuse_another(place: Place) -> None:
    """Raise ChainError where another step holds this number."""
    for other in others(place):
        raise ChainError(f"is where the recipe now has '{place.step.name}'", place.paths.shown(other), _ways_out(place))


def others(place: Place) -> list[Path]:
    """Return the commits of other steps at the number of this one."""
    return [path for path in place.round.at_number(place.number) if path != place.commit]


def pool_of(paths: Paths, commit: Commit) -> Pool:
    """Return what a commit adds to a pool. A step outside the pool (measure) gives only its metrics."""
    if commit.outside:
        return Pool(metrics=commit.metrics)
    files = {name: tuple(paths.folder / path for path in table.files) for name, table in commit.tables.items()}
    frames = {name: read_light(name, found) for name, found in files.items() if found}
    return Pool(frames, files, {role: entry.model(role) for role, entry in commit.models.items()}, commit.metrics)


def generated_tokens(paths: Paths, commit: Commit) -> int:
    """Return how many tokens a model generated in a step: those of its samples, and those of checks inside an update.

    What `replay` copies was counted when it was made.
    """
    if commit.checks:
        return sum(int(one["tokens"]) for one in commit.checks["figures"])
    asks = commit.verb in VERBS and VERBS[commit.verb].stage in ("generate", "measure")
    if not asks or "samples" not in commit.tables:
        return 0
    files = [paths.folder / path for path in commit.tables["samples"].files]
    try:
        return int(scan("samples", files).select(pl.col("tokens").sum()).collect().item())
    except pl.exceptions.PolarsError as error:  # it is read here before an attempt hashes what it trusts
        wrong = storage.damaged(commit.files, paths.folder, rehash=True) or [f"a table cannot be read: {error}"]
        fix = f"Restore it from a copy. All damage: selfkd verify {paths.folder}"
        raise ChainError("; ".join(wrong), str(paths.folder), fix) from error


def generated_in(paths: Paths, seal: Seal) -> int:
    """Return how many tokens were generated in a sealed round."""
    folder = paths.round(seal.round).folder
    return sum(generated_tokens(paths, records.read(folder / step.file, Commit)) for step in seal.steps)


def own_pool_of(paths: Paths, commit: Commit) -> Pool:
    """Return what a step made: what it added, without samples that it copied from other rounds."""
    added = pool_of(paths, commit)
    if not (commit.verb in VERBS and VERBS[commit.verb].copies):
        return added
    kept = [name for name in ("prompts",) if name in added.tables]
    return Pool({name: added.tables[name] for name in kept}, {name: added.files[name] for name in kept})


def entry_of(place_of_round: RoundPaths, commit: Commit) -> SealedStep:
    """Return a commit as the seal of its round names it."""
    path = place_of_round.commit(commit.number, commit.step)
    return SealedStep(
        name=commit.step,
        number=commit.number,
        verb=commit.verb,
        digest=commit.digest,
        file=path.name,
        file_sha256=digest.file(path),
    )


def pruned_paths(names: RoundPaths) -> list[str]:
    """Return the checkpoints (relative to the run) that retention took away from a round, whenever it did."""
    return [path for tombstone in names.tombstones() for path in records.read(tombstone, Tombstone).paths]


# ---- refusals ----


def _check_files(place: Place, commit: Commit) -> None:
    """Compare sizes of everything and hashes of tables; a checkpoint that retention took away is not damage."""
    pruned = tuple(f"{path}/" for path in [*pruned_paths(place.round), *rounded.copies(place.round)])
    files = {name: entry for name, entry in commit.files.items() if not name.startswith(pruned)} if pruned else commit.files
    wrong: list[str] = []
    for rehash in (True, False):
        some = {name: entry for name, entry in files.items() if name.endswith(".parquet") == rehash}
        wrong += storage.damaged(some, place.paths.folder, rehash)
    if wrong:
        fix = "Restore the files from a copy; selfkd verify lists all damage."
        raise ChainError("; ".join(wrong[:3]), place.paths.shown(place.commit), fix)


def _difference(place: Place, commit: Commit) -> str:
    """Return which fields and which code the commit was made with, and which the recipe has now."""
    was, now = commit.identity, digest.as_json(place.step.identity())
    changed = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
    said = [f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in changed]
    edited = sorted(name for name in commit.code.keys() | place.code.keys() if commit.code.get(name) != place.code.get(name))
    return "; ".join([*said, *(f"{name} changed" for name in edited)]) or "a step before it differs"


def _ways_out(place: Place) -> str:
    resume = f"selfkd resume {place.paths.folder}"
    return f"Keep the chain: restore the recipe, or `{resume}`.   Start a new chain: --name X"
