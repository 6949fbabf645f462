"""Proof that a run folder is what its commits state: the chain, the meaning of every table and model, the bytes of every file.

Each record (run.json, step commits, sealed.json) carries its own digest, names the one before it, and names the files that
count with their hashes; so one flipped bit anywhere in them is found. What no record names (logs, leases, tmp, orphans of
a crash) does not count. Needs neither torch nor the machine that made the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from selfkd.chain import records, rounded, ways
from selfkd.chain.paths import Paths, RoundPaths
from selfkd.chain.records import (
    Amendment,
    Commit,
    Computer,
    Cut,
    Info,
    ModelEntry,
    Numerics,
    Record,
    Rounded,
    RoundedEntry,
    Seal,
    StateEntry,
    Tombstone,
)
from selfkd.core import digest, storage
from selfkd.core.pool import KEYS, as_stored
from selfkd.errors import ChainError
from selfkd.report import averages, brought, changes, checked, lost
from selfkd.report.recomputed import recompute
from selfkd.report.verdicts import Verdicts

AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass
class Findings:
    """What an examination found: `problems`, one sentence each, naming the file; empty where all is as committed.

    `pruned` names checkpoints that retention took away on purpose, `rounded` those of which it left a copy in bf16: no damage. `moved`
    says which rounds were made with something else than the run began with, so that their numbers may differ from what they would be.
    `again` counts the steps that were made again from the stored tables, where that was asked for.
    """

    problems: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    files: int = 0
    steps: int = 0
    rounds: int = 0
    again: int = 0
    head: str = ""


def verify(folder: str | Path, quick: bool = False, data: bool = False) -> Findings:
    """Walk the chain from run.json to the newest step; ChainError where another version of selfkd wrote it.

    `quick` trusts contents and checks records, links and sizes only. With `data`, every selection and training row is made again from
    the stored tables, where all is as it was committed.
    """
    walk = _Walk(Paths(Path(folder)), quick)
    walk.run()
    if data and not walk.found.problems:
        made = recompute(Path(folder))
        walk.found.problems, walk.found.again = made.problems, made.steps
    return walk.found


class _Walk:
    """One pass over a run. `parent` is the digest the next step must name, None where damage hides it."""

    def __init__(self, paths: Paths, quick: bool) -> None:
        self.paths, self.quick, self.found = paths, quick, Findings()
        self.parent: str | None = None
        self.models: dict[str, ModelEntry] = {}
        self.info: Info | None = None
        self.round: list[Commit] = []  # what was made of the round at hand so far
        self.states: set[str] = set()  # where those of optimisers were committed
        self.made: dict[str, Commit] = {}
        self.verdicts: Verdicts | None = None  # None where damage hides what they rest on
        self.blind = False  # a damaged commit hides which models there were

    def run(self) -> None:
        info = self.record(self.paths.info, Info)
        if info is None:
            return
        self.parent, self.info = info.root, info
        self.frozen(info)
        amendments = {path: self.record(path, Amendment) for path in self.paths.amendments()}
        for path, amendment in amendments.items():
            self.files(amendment.files if amendment else {}, self.paths.relative(path))
        if None not in amendments.values():
            self.verdicts = Verdicts(info, [one for one in amendments.values() if one], self.paths.folder)
        if self.paths.numerics.exists():
            self.record(self.paths.numerics, Numerics)
        facts = {path: self.record(path, Computer) for path in self.paths.facts()}
        for path in (path for names in self.paths.rounds() for path in names.cuts()):
            self.record(path, Cut)
        gone = {path: self.tombstone(path) for names in self.paths.rounds() for path in names.tombstones()}
        taken = [path for paths in gone.values() for path in paths]
        copied = self.recorded_copies()
        self.found.pruned = [path for path in taken if not self.lies(path, copied)]
        self.copies(copied)
        self.found.rounded = sorted(rounded.gone(self.paths.folder, copied) - set(self.found.pruned))
        self.rounds()
        for name in () if self.blind else sorted(copied.keys() - self.models.keys()):
            self.problem(f"{copied[name].path} is a copy of {name}, which no step committed")
        self.found.problems += lost.numerics(self.paths, info, self.made)
        self.found.problems += lost.facts(facts, self.made)
        self.found.problems += lost.amendments(self.paths, info, amendments, self.made)
        for tombstone, paths in gone.items():
            for name in () if self.blind else sorted(set(paths) - self.models.keys() - self.states):
                where = self.paths.relative(tombstone)
                self.problem(f"{where} was changed after it was written: no step committed {name}")

    def problem(self, text: str) -> None:
        self.found.problems.append(text)

    # ---- records ----

    def record(self, path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
        """Return a record that reads, carries its own digest and is as it was written; else add a problem."""
        name = self.paths.relative(path)
        if not path.is_file():
            self.problem(f"{name} is missing")
            return None
        self.found.files += 1
        content = path.read_bytes()
        try:
            read = json.loads(content)
        except ValueError as error:
            self.problem(f"{name} was damaged: {error}")
            return None
        # The digest is blind to how a number is spelled (1e-05, 1E-05); one bit apart, so the text is compared too.
        if not isinstance(read, dict) or not digest.intact(read) or storage.json_text(read) != content:
            self.problem(f"{name} was changed after it was committed")
            return None
        return self.understood(name, read, kind)

    def understood(self, name: str, content: Mapping[str, Any], kind: type[AnyRecord]) -> AnyRecord | None:
        """Return the record; add a problem where a field is missing or malformed, raise ChainError where its format is another."""
        if problem := records.format_problem(content):
            raise ChainError(
                problem, self.paths.shown(self.paths.folder / name)
            )  # not damage: whether it is whole is not known
        try:
            return kind.from_json(content)
        except records.Malformed as error:
            self.problem(f"{name} {error}")
            return None

    def tombstone(self, path: Path) -> list[str]:
        """Return what retention says it took away. A damaged tombstone hides nothing: the checkpoint then counts as missing."""
        record = self.record(path, Tombstone)
        return list(record.paths) if record else []

    def recorded_copies(self) -> dict[str, RoundedEntry]:
        """Return {committed checkpoint: its copy in bf16} of all that are recorded, whether or not they are still there."""
        known: dict[str, RoundedEntry] = {}
        for path in (path for names in self.paths.rounds() for path in names.rounded()):
            record = self.record(path, Rounded)
            known |= record.models if record else {}
        return known

    def lies(self, path: str, copied: Mapping[str, RoundedEntry]) -> bool:
        """Whether a checkpoint is there, whole or as its copy: one that a kill left behind a tombstone may be in use again."""
        folders = [path, *([copied[path].path] if path in copied else [])]
        return any((self.paths.folder / folder).exists() for folder in folders)

    def copies(self, copied: Mapping[str, RoundedEntry]) -> None:
        """Check the copies in bf16 of checkpoints that are not pruned by now."""
        for name, copy in copied.items():
            if name not in self.found.pruned and not self.files(copy.files, f"the copy in bf16 of {name}") and not self.quick:
                self.weights("the copy in bf16", copy.path, copy.digest)

    def frozen(self, info: Info) -> None:
        """Check prompts, recipe and code, as frozen when the run was created."""
        damaged = self.files(info.files, "run.json")
        for split, entry in info.prompts.items():
            if not damaged:
                self.table("prompts", [entry.file], entry.rows, entry.digest, f"run.json: the prompts of '{split}'")
        self.found.problems += [] if damaged or self.quick else brought.frozen_problems(self.paths.folder, info.data)
        if records.root_digest(info.seed, info.recipe["context"], info.prompts) != info.root:
            self.problem("run.json: its root does not follow from its seed and prompts")

    # ---- the chain ----

    def rounds(self) -> None:
        """Check that rounds are numbered without a gap, and that only the last one is open."""
        on_disk = self.paths.rounds()
        for index, names in enumerate(on_disk):
            if names.index != index:
                missing = self.paths.round(index).folder.name
                self.problem(f"{missing} is missing, but {names.folder.name} is there")
                return
            opened, commits = self.parent, self.steps(names)
            if names.seal.is_file():
                self.sealed(names, opened, commits)
            elif index + 1 < len(on_disk):
                after = on_disk[index + 1].folder.name
                self.problem(f"{self.paths.relative(names.seal)} is missing, but {after} is there")
                self.parent = None

    def steps(self, names: RoundPaths) -> list[Commit | None]:
        """Return the step commits of a round, each checked; None where one is damaged."""
        found: list[Commit | None] = []
        self.round = []
        for number, path in enumerate(names.commits(), 1):
            commit = self.record(path, Commit)
            found.append(commit)
            if commit is None:
                self.parent, self.blind = None, True
                continue
            self.found.steps += 1
            place = (commit.round, commit.number, names.commit(number, commit.step).name)
            if place != (names.index, number, path.name):
                name = self.paths.relative(path)
                self.problem(f"{name} is not where it belongs: it is step {commit.number} of round {commit.round}")
            self.step(self.paths.relative(path), commit)
        return found

    def step(self, name: str, commit: Commit) -> None:
        if self.parent is not None and commit.parent != self.parent:
            self.problem(f"{name} does not follow the step before it")
        if commit.key != records.key(commit.parent, commit.identity, commit.code):
            self.problem(f"{name}: its key does not follow from its fields and code")
        if commit.digest != records.step_digest(
            commit.key, commit.tables, commit.models, commit.metrics, commit.states, commit.checks
        ):
            self.problem(f"{name}: its digest does not follow from what it added")
        self.contents(name, commit)
        self.made[name] = commit
        self.round.append(commit)
        self.parent = commit.digest

    def contents(self, name: str, commit: Commit) -> None:
        """Check the files of a step, then what they mean; the meaning of damaged files is not looked at."""
        damaged = self.files(commit.files, name)
        for table, entry in commit.tables.items():
            unnamed = [path for path in entry.files if path not in commit.files]
            if unnamed:
                self.problem(f"{name}: {unnamed[0]} is used but not among its files")
            elif not damaged:
                self.table(table, entry.files, entry.rows, entry.digest, f"{name}: table '{table}'")
        for role, model in commit.models.items():
            self.models[model.path] = model
            if not damaged and not self.quick and not self.is_gone(f"{model.path}/"):
                self.weights(f"{name}: model '{role}'", model.path, model.digest)
                self.base(f"{name}: model '{role}'", model)
        self.found.problems += [f"{name}: {problem}" for problem in checked.problems(commit)]
        if not (damaged or self.quick):
            away = {*self.found.pruned, *self.found.rounded}
            found = [*self.brought(commit), *changes.of_answers(self.paths, commit)]
            found += [] if self.blind else averages.problems(self.paths.folder, commit, self.models, away)
            self.found.problems += [f"{name}: {problem}" for problem in found]
        self.left_states(name, commit)
        for role, state in commit.states.items():
            self.states.add(state.path)
            self.state(f"{name}: the optimiser's state of '{role}'", role, state, commit)

    def brought(self, commit: Commit) -> list[str]:
        """Work out again what a step brought; of a round with damage in it only what rests on nothing else."""
        before = None if self.found.problems else self.round
        return list(brought.problems(self.paths, self.info, commit, before)) if self.info else []

    def left_states(self, name: str, commit: Commit) -> None:
        """A state lies beside each model that was trained with `optimiser: continue`, and beside no other one."""
        due = set(commit.models) if commit.identity.get("optimiser") == "continue" else set()
        for role in sorted(due - commit.states.keys()):
            self.problem(
                f"{name}: '{role}' was trained with `optimiser: continue`, and no state of its optimiser was committed"
            )
        for role in sorted(commit.states.keys() - due):
            self.problem(f"{name}: a state of the optimiser of '{role}' was committed, and its step asked for none")

    def state(self, where: str, role: str, state: StateEntry, commit: Commit) -> None:
        """Compare a state with the model that it names, and its digest with those of its files, which were compared before."""
        if role not in commit.models or commit.models[role].digest != state.model:
            self.problem(f"{where} belongs to other weights ({state.model[:12]}) than were committed with it")
        under = f"{state.path}/"
        files = {path.removeprefix(under): one["sha256"] for path, one in commit.files.items() if path.startswith(under)}
        if records.state_digest(files) != state.digest:
            self.problem(f"{where} at {state.path} is not what its digest says")

    def sealed(self, names: RoundPaths, opened: str | None, commits: Sequence[Commit | None]) -> None:
        """Compare the seal with the steps on disk; after it the next round must follow this one."""
        last_step, self.parent = self.parent, None
        seal = self.record(names.seal, Seal)
        if seal is None:
            self.verdicts = None
            return
        self.found.rounds += 1
        self.found.head = self.parent = seal.digest
        if what := seal.notes.get("level", "").partition(": ")[2]:
            self.found.moved.append(f"round {names.index} was not made with what the run began with: {what}")
        for made, differs in checked.differently(commits) if seal.notes.get("level") == "exact" else ():
            self.problem(f"{self.paths.relative(names.commit(made.number, made.step))}: {differs}")
        where = self.paths.relative(names.seal)
        if opened is not None and seal.parent != opened:
            self.problem(f"{where} does not follow the round before it")
        self.sealed_steps(names, seal)
        if last_step is not None:
            if seal.digest != records.round_digest(names.index, last_step, seal.models, seal.accepted):
                self.problem(f"{where}: its digest does not follow from its steps and models")
            metrics = {key: value for commit in commits if commit for key, value in commit.metrics.items()}
            again = not (self.quick or self.found.problems)  # of damaged answers nothing can be worked out
            for wrong in changes.problems(self.paths, [one for one in commits if one], seal.metrics, metrics, again):
                self.problem(f"{where}: {wrong}")
            for wrong in self.verdicts.problems(seal, [one for one in commits if one]) if self.verdicts else ():
                self.problem(f"{where}: {wrong}")
            measures = {name: how for one in commits if one and one.outside for name, how in ways.measures_of(one).items()}
            if seal.measures and seal.measures != measures:
                self.problem(f"{where}: how it measured is not what its steps say")
        for role, model in seal.models.items():
            if not self.blind and self.models.get(model.path) != model:
                self.problem(f"{where}: model '{role}' is not the one that was committed at {model.path}")

    def sealed_steps(self, names: RoundPaths, seal: Seal) -> None:
        """Compare the commits on disk with those that the seal names."""
        named = {names.folder / step.file: step.file_sha256 for step in seal.steps}
        present = names.commits()
        for path in present:
            name = self.paths.relative(path)
            if path not in named:
                self.problem(f"{name} is not part of the round that was sealed")
            elif digest.file(path) != named[path]:
                self.problem(f"{name} is not the commit that {self.paths.relative(names.seal)} names")
        for path in sorted(named.keys() - set(present)):
            self.problem(f"{self.paths.relative(path)} is missing")

    # ---- contents ----

    def files(self, recorded: Mapping[str, Any], where: str) -> bool:
        """Add a problem for each missing, resized or changed file; return whether there are any. What retention took is passed over."""
        expected = {name: entry for name, entry in recorded.items() if not self.is_gone(name)}
        self.found.files += len(expected)
        wrong = storage.damaged(expected, self.paths.folder, rehash=not self.quick)
        self.found.problems += [f"{text} (named by {where})" for text in wrong]
        return bool(wrong)

    def is_gone(self, name: str) -> bool:
        """Whether retention took the checkpoint of a file away, with or without leaving a copy."""
        return any(name.startswith(f"{path}/") for path in (*self.found.pruned, *self.found.rounded))

    def table(self, table: str, files: Sequence[str], rows: int, meaning: str, where: str) -> None:
        if self.quick:
            return
        frame = as_stored([self.paths.folder / file for file in files])
        if frame.height != rows:
            self.problem(f"{where} has {frame.height} rows, {rows} were committed")
        elif digest.table(frame, KEYS[table]) != meaning:
            self.problem(f"{where} does not mean what was committed")

    def weights(self, where: str, path: str, expected: str) -> None:
        try:
            same = digest.holds(self.paths.folder / path, expected)
        except (OSError, ValueError, KeyError) as error:
            self.problem(f"{where} at {path} cannot be read: {error}")
            return
        if not same:
            self.problem(f"{where} at {path} does not hold the weights that were committed")

    def base(self, where: str, model: ModelEntry) -> None:
        """Compare the base that an adapter's folder names with the model that was committed where its record says it lies."""
        named = digest.base_of(self.paths.folder / model.path)
        known = self.models.get(model.base or "")
        if not self.blind and named != (known and known.digest):
            told = f"{named[:12]} is its base" if named else "it is no adapter"
            self.problem(f"{where} at {model.path} says that {told}, and its record names {model.base or 'none'}")
