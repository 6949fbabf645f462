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
from typing import Any

import polars as pl

from selfkd.core import digest, storage
from selfkd.core.pool import KEYS

Record = dict[str, Any]


@dataclass
class Findings:
    """What an examination found. `pruned` names checkpoints that retention removed on purpose: no damage."""

    problems: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    files: int = 0
    steps: int = 0
    rounds: int = 0
    head: str = ""


def verify(folder: Path, quick: bool = False) -> list[str]:
    """Return the problems of a run, one sentence each, naming the file; empty where all is as committed."""
    return examine(folder, quick).problems


def examine(folder: Path, quick: bool = False) -> Findings:
    """Walk the chain from run.json to the newest step. `quick` trusts contents and checks records, links and sizes only."""
    walk = _Walk(folder, quick)
    walk.run()
    return walk.found


class _Walk:
    """One pass over a run. `parent` is the digest the next step must name, None where damage hides it."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick, self.found = folder, quick, Findings()
        self.parent: str | None = None
        self.models: dict[str, str] = {}
        self.blind = False  # a damaged commit hides which models there were

    def run(self) -> None:
        info = self.record("run.json")
        if info is None:
            return
        self.parent = info["root"]
        self.frozen(info)
        for path in self.names("amendments/*.json"):
            if (amendment := self.record(path)) is not None:
                self.files(amendment.get("files", {}), path)
        gone = {name: self.tombstone(name) for name in self.names("round-*/pruned.json")}
        self.found.pruned = [path for paths in gone.values() for path in paths if not (self.folder / path).exists()]
        self.rounds()
        for name, paths in gone.items():
            for path in () if self.blind else sorted(set(paths) - self.models.keys()):
                self.problem(f"{name} was changed after it was written: no step committed {path}")

    def problem(self, text: str) -> None:
        self.found.problems.append(text)

    def names(self, pattern: str) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob(pattern))

    # ---- records ----

    def record(self, name: str) -> Record | None:
        """Return a JSON record that can be read, carries its own digest and is as it was written; else None, after a problem."""
        path = self.folder / name
        if not path.is_file():
            self.problem(f"{name} is missing")
            return None
        self.found.files += 1
        content = path.read_bytes()
        try:
            record = json.loads(content)
        except ValueError as error:
            self.problem(f"{name} was damaged: {error}")
            return None
        # The digest is blind to how a number is spelled (1e-05, 1E-05); one bit apart, so the text is compared too.
        if not isinstance(record, dict) or not digest.intact(record) or _text(record) != content:
            self.problem(f"{name} was changed after it was committed")
            return None
        return record

    def tombstone(self, name: str) -> list[str]:
        """Return what retention removed. A tombstone that cannot be read hides nothing: the checkpoint then counts as missing."""
        content = (self.folder / name).read_bytes()
        try:
            record = json.loads(content)
            paths = [str(path) for path in record["paths"]]
        except (ValueError, KeyError, TypeError):
            paths, record = [], {}
        if not paths or _text(record) != content or ("self" in record and not digest.intact(record)):
            self.problem(f"{name} was changed after it was written")
        return paths

    def frozen(self, info: Record) -> None:
        """Check prompts, recipe and code against what was frozen when the run was created."""
        damaged = self.files(info["files"], "run.json")
        for split, table in info["prompts"].items():
            if not damaged:
                self.table("prompts", [table["file"]], table, f"run.json: the prompts of '{split}'")
        root = digest.of("run", info["format"], info["seed"], info["recipe"]["context"], _digests(info["prompts"]))
        if root != info["root"]:
            self.problem("run.json: its root does not follow from its seed and prompts")

    # ---- the chain ----

    def rounds(self) -> None:
        """Check every round: they are numbered without a gap, and only the last one may be open."""
        folders = self.names("round-*/")
        for index, name in enumerate(folders):
            if name != f"round-{index:03d}":
                self.problem(f"round-{index:03d} is missing, but {name} is there")
                return
            opened, commits = self.parent, self.steps(index, name)
            if (self.folder / name / "sealed.json").is_file():
                self.sealed(index, name, opened, commits)
            elif index + 1 < len(folders):
                self.problem(f"{name}/sealed.json is missing, but {folders[index + 1]} is there")
                self.parent = None

    def steps(self, index: int, round_name: str) -> list[Record | None]:
        """Check the step commits of a round and return them, None in place of a damaged one."""
        found: list[Record | None] = []
        for number, name in enumerate(self.names(f"{round_name}/[0-9][0-9]-*.json"), 1):
            commit = self.record(name)
            found.append(commit)
            if commit is None:
                self.parent, self.blind = None, True
                continue
            self.found.steps += 1
            if (commit["round"], commit["number"], f"{number:02d}-{commit['step']}.json") != (index, number, Path(name).name):
                self.problem(f"{name} is not where it belongs: it is step {commit['number']} of round {commit['round']}")
            self.step(name, commit)
        return found

    def step(self, name: str, commit: Record) -> None:
        if self.parent is not None and commit["parent"] != self.parent:
            self.problem(f"{name} does not follow the step before it")
        if commit["key"] != digest.of("key", commit["parent"], commit["identity"], commit["code"]):
            self.problem(f"{name}: its key does not follow from its fields and code")
        contents = (_digests(commit["tables"]), _digests(commit["models"]))
        if commit["digest"] != digest.of("step", commit["key"], *contents, commit["metrics"]):
            self.problem(f"{name}: its digest does not follow from what it added")
        self.contents(name, commit)
        self.parent = commit["digest"]

    def contents(self, name: str, commit: Record) -> None:
        """Check the files of a step, then what they mean; the meaning of damaged files is not looked at."""
        damaged = self.files(commit["files"], name)
        for table, entry in commit["tables"].items():
            unnamed = [path for path in entry["files"] if path not in commit["files"]]
            if unnamed:
                self.problem(f"{name}: {unnamed[0]} is used but not among its files")
            elif not damaged:
                self.table(table, entry["files"], entry, f"{name}: table '{table}'")
        for role, model in commit["models"].items():
            self.models[model["path"]] = model["digest"]
            if not damaged and not self.quick and model["path"] not in self.found.pruned:
                self.weights(f"{name}: model '{role}'", model)

    def sealed(self, index: int, name: str, opened: str | None, commits: Sequence[Record | None]) -> None:
        """Check the seal against the steps on disk; the next round must then follow this one."""
        last, self.parent = self.parent, None
        record = self.record(f"{name}/sealed.json")
        if record is None:
            return
        self.found.rounds += 1
        self.found.head = self.parent = record["digest"]
        where = f"{name}/sealed.json"
        if opened is not None and record["parent"] != opened:
            self.problem(f"{where} does not follow the round before it")
        self.sealed_steps(name, record)
        if last is not None:
            if record["digest"] != digest.of("round", index, last, _digests(record["models"]), record["kept"]):
                self.problem(f"{where}: its digest does not follow from its steps and models")
            metrics = {key: value for commit in commits if commit for key, value in commit["metrics"].items()}
            if record["metrics"] != metrics:
                self.problem(f"{where}: its metrics are not those of its steps")
        for role, model in record["models"].items():
            if self.models.get(model["path"], model["digest"]) != model["digest"]:
                self.problem(f"{where}: model '{role}' is not the one that was committed at {model['path']}")

    def sealed_steps(self, name: str, record: Record) -> None:
        named = {f"{name}/{step['file']}": step["file_sha256"] for step in record["steps"]}
        present = self.names(f"{name}/[0-9][0-9]-*.json")
        for path in present:
            if path not in named:
                self.problem(f"{path} is not part of the round that was sealed")
            elif digest.file(self.folder / path) != named[path]:
                self.problem(f"{path} is not the commit that {name}/sealed.json names")
        for path in sorted(named.keys() - set(present)):
            self.problem(f"{path} is missing")

    # ---- contents ----

    def files(self, recorded: Mapping[str, Record], where: str) -> bool:
        """Turn missing, resized or changed files into problems, and return whether there are any. Pruned ones are passed over."""
        expected = {name: entry for name, entry in recorded.items() if not self._was_pruned(name)}
        self.found.files += len(expected)
        wrong = storage.damaged(expected, self.folder, rehash=not self.quick)
        self.found.problems += [f"{text} (named by {where})" for text in wrong]
        return bool(wrong)

    def _was_pruned(self, name: str) -> bool:
        return any(name.startswith(f"{path}/") for path in self.found.pruned)

    def table(self, table: str, files: Sequence[str], entry: Record, where: str) -> None:
        if self.quick:
            return
        frames = [pl.read_parquet(self.folder / file) for file in files]
        frame = pl.concat(frames) if frames else pl.DataFrame()
        if frame.height != entry["rows"]:
            self.problem(f"{where} has {frame.height} rows, {entry['rows']} were committed")
        elif digest.table(frame, KEYS[table]) != entry["digest"]:
            self.problem(f"{where} does not mean what was committed")

    def weights(self, where: str, model: Record) -> None:
        try:
            same = digest.weights(self.folder / model["path"]) == model["digest"]
        except (OSError, ValueError, KeyError) as error:
            self.problem(f"{where} at {model['path']} cannot be read: {error}")
            return
        if not same:
            self.problem(f"{where} at {model['path']} does not hold the weights that were committed")


def _text(record: Record) -> bytes:
    """Return the text that `storage.put_json` writes for a record."""
    return json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _digests(entries: Mapping[str, Record]) -> dict[str, str]:
    return {name: entry["digest"] for name, entry in entries.items()}
