"""A run on disk: what is frozen when it is created, which rounds are sealed, and where the head of its chain is.

With round.py the only module that knows a path. Nothing in a run folder is ever rewritten: commits are put if absent, data is
named by its hash, and what a crash leaves in tmp/ is garbage by definition.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.machine import NUMERIC, Machine, fixed_numerics
from selfkd.core import digest, storage
from selfkd.core.files import reference_parts
from selfkd.core.hardware import has_gpu
from selfkd.core.pool import KEYS, Function, Model, Pool, light
from selfkd.core.source_code import local_sources
from selfkd.errors import ChainError, GuardError, SelfkdError, UsageError
from selfkd.prompts import templates
from selfkd.prompts.overlap import overlap
from selfkd.prompts.read import read_prompts
from selfkd.recipe.load import frozen
from selfkd.recipe.schema import Recipe
from selfkd.rewards.find import find_function

FORMAT = 1


def _watch_nothing(event: dict[str, Any]) -> None:
    """The default observer: events still go to events.jsonl."""


class Run:
    """One chain. `open` creates it or goes on with it; `at` opens it with the recipe and the code frozen inside it."""

    def __init__(self, folder: Path, recipe: Recipe, machine: Machine, info: dict[str, Any]) -> None:
        self.folder, self.recipe, self.info = folder, recipe, info
        self.numerics: dict[str, Any] = info["numerics"]
        self.machine = replace(machine, **{name: self.numerics[name] for name in NUMERIC if name in self.numerics})
        self.code: dict[str, dict[str, str]] = _effective(folder, info)["code"]
        self.watch: Callable[[dict[str, Any]], None] = _watch_nothing
        self.tmp = folder / "tmp"
        self.attempt = 0
        self._splits: dict[str, Pool] = {}

    # ---- opening ----

    @classmethod
    def open(cls, recipe: Recipe, folder: Path, machine: Machine, amend: bool = False) -> Run:
        """Create the run, or go on with it if its recipe is the same; `amend` accepts changes to steps not made yet."""
        machine = replace(machine, max_model_len=recipe.context)
        if not (folder / "run.json").exists():
            _create(recipe, folder, machine)
        info = read_record(folder / "run.json")
        _accept(recipe, folder, info, amend)
        return cls(folder, recipe, machine, info)

    @classmethod
    def at(cls, folder: Path, machine: Machine | None = None) -> Run:
        """An existing run, with its own recipe; works on a folder that was moved. UsageError where there is none."""
        if not (folder / "run.json").is_file():
            raise UsageError("there is no run here (run.json is missing)", str(folder), "List the runs: selfkd status")
        info = read_record(folder / "run.json")
        recipe = frozen(_effective(folder, info)["recipe"], folder)
        known = {field.name for field in fields(Machine)}
        return cls(folder, recipe, machine or Machine(**{k: v for k, v in info["machine"].items() if k in known}), info)

    # ---- rounds ----

    def sealed(self) -> list[dict[str, Any]]:
        """The sealed rounds, oldest first, each checked to follow the one before it."""
        found: list[dict[str, Any]] = []
        parent = self.info["root"]
        while (path := self.round_folder(len(found)) / "sealed.json").exists():
            record = read_record(path)
            if record["parent"] != parent:
                raise ChainError(
                    "does not follow the round before it", self.name_of(path), f"See what is wrong: selfkd verify {self.folder}"
                )
            parent = record["digest"]
            found.append(record)
        return found

    def rounds_to_walk(self) -> Iterator[int]:
        while True:
            sealed = self.sealed()
            if len(sealed) > self.recipe.rounds or (sealed and sealed[-1]["stop"]):
                return
            yield len(sealed)

    def head(self, before: int | None = None) -> dict[str, Model]:
        """Models by role at the head of the chain: those of the newest round that was kept."""
        for record in reversed(self.sealed()[:before]):
            if record["kept"]:
                return {role: Model(role, model["path"], model["digest"]) for role, model in record["models"].items()}
        return {}

    # ---- what was frozen ----

    def split(self, name: str) -> Pool:
        """The prompts of a split, in their frozen order."""
        if name not in self.info["prompts"]:
            raise UsageError(f"the run has no split '{name}'", str(self.folder), "Splits: " + ", ".join(self.info["prompts"]))
        if name not in self._splits:
            path = self.folder / self.info["prompts"][name]["file"]
            self._splits[name] = Pool({"prompts": light("prompts", pl.read_parquet(path))}, {"prompts": (path,)})
        return self._splits[name]

    def function(self, reference: str, params: Mapping[str, Any]) -> Function:
        """A reward as frozen in the run: editing the file beside a running chain changes nothing in it."""
        entry = self.code[reference]
        return Function(reference_parts(reference)[1], self.folder / entry["path"], entry["digest"], params)

    def template(self, reference: str) -> templates.Template:
        """A template as frozen in the run; inline text stands for itself."""
        if reference in self.code:
            return templates.load(str((self.folder / self.code[reference]["path"]).resolve()), [])
        return templates.load(reference, [])

    # ---- paths and records ----

    def round_folder(self, index: int) -> Path:
        return self.folder / f"round-{index:03d}"

    def name_of(self, path: Path) -> str:
        return f"{self.folder.name}/{path.relative_to(self.folder)}"

    def begin_attempt(self) -> bool:
        """Make the log folder of this attempt; False where this process has one already."""
        if self.attempt:
            return False
        logs = storage.make_folder(self.folder / "logs")
        number = 1 + max((int(path.name.rsplit("-", 1)[1]) for path in logs.glob("attempt-*")), default=0)
        storage.make_folder(logs / f"attempt-{number:03d}")
        self.attempt = number
        self.event("attempt", host=platform.node(), pid=os.getpid())
        return True

    def check_head(self) -> None:
        """Re-hash the weights that this attempt starts from; a damaged checkpoint trains silently to other results."""
        for model in self.head().values():
            if digest.weights(self.folder / model.path) != model.digest:
                fix = "Restore it from a copy, or go on from an earlier round in a new run."
                raise ChainError(
                    "these weights were changed after they were committed", f"{self.folder.name}/{model.path}", fix
                )

    def log_folder(self) -> Path:
        return self.folder / "logs" / f"attempt-{self.attempt:03d}"

    def event(self, kind: str, **more: Any) -> None:
        """Tell the observer, and append one line to events.jsonl; a reader skips a torn last line."""
        event = {"t": round(time.time(), 3), "event": kind, **more}
        with (self.log_folder() / "events.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(event, default=str) + "\n")
        self.watch(event)


def read_record(path: Path) -> dict[str, Any]:
    """A JSON record of the run; ChainError where it is not JSON or was changed after it was written."""
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ChainError(f"is not readable: {error}", str(path), "Restore the file from a copy.") from error
    if not digest.intact(record):
        raise ChainError("was changed after it was written", str(path), "Restore the file from a copy.")
    return record


def _create(recipe: Recipe, folder: Path, machine: Machine) -> None:
    """Everything that is frozen, then run.json, which is what makes the run exist. A crash before it leaves only garbage."""
    for leftover in ("prompts", "code", "recipe.yaml", "recipe.resolved.yaml", "tmp"):
        if (folder / leftover).exists():
            storage.remove(folder / leftover)
    tmp = storage.make_folder(folder / "tmp")
    splits = _freeze_prompts(recipe, folder, tmp)
    code = _freeze_code(recipe, folder, tmp)
    storage.put(folder / "recipe.yaml", recipe.text.encode(), tmp)
    resolved = recipe.resolved()
    storage.put(folder / "recipe.resolved.yaml", recipe.resolved_text().encode(), tmp)
    exact = not has_gpu() if recipe.exact == "auto" else bool(recipe.exact)
    fixed = {**fixed_numerics(machine), "exact": exact}
    files = [path for name in ("prompts", "code") for path in sorted((folder / name).rglob("*")) if path.is_file()]
    files += [folder / "recipe.yaml", folder / "recipe.resolved.yaml"]
    info = {
        "format": FORMAT,
        "name": folder.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seed": recipe.seed,
        "root": digest.of("run", FORMAT, recipe.seed, recipe.context, {k: v["digest"] for k, v in splits.items()}),
        "rounds": recipe.rounds,
        "model": recipe.model_source(),
        "prompts": splits,
        "recipe": resolved,
        "code": code,
        "numerics": fixed,
        "machine": asdict(machine),
        "files": storage.file_hashes(files, folder),
    }
    storage.put_json(folder / "run.json", digest.with_self_digest(info), tmp)


def _freeze_prompts(recipe: Recipe, folder: Path, tmp: Path) -> dict[str, dict[str, Any]]:
    frames = {split: read_prompts(source, recipe.folders, split) for split, source in recipe.splits().items()}
    frames, dropped = _without_leaks(frames, recipe.overlap)
    splits = {}
    for split, frame in frames.items():
        path = storage.write_parquet(frame, folder / "prompts", tmp, f"{split}-")
        repeats = int(frame["id"].str.contains("-").sum())
        entry = {"file": path.relative_to(folder).as_posix(), "rows": frame.height, "repeats": repeats}
        splits[split] = {**entry, "digest": digest.table(frame, KEYS["prompts"]), "overlap": dropped.get(split, 0)}
    return splits


def _without_leaks(frames: dict[str, pl.DataFrame], policy: str) -> tuple[dict[str, pl.DataFrame], dict[str, int]]:
    """Train prompts that stand in dev or test too: refused, or taken out of train where the recipe says `overlap: drop`."""
    dropped: dict[str, int] = {}
    for split in ("dev", "test"):
        if split not in frames or "train" not in frames:
            continue
        found = overlap(frames["train"], frames[split])
        if found and policy == "refuse":
            raise GuardError(
                f"{len(found)} train prompts stand in '{split}' too, such as {found[0]}",
                "prompts",
                "Separate the splits, or write `overlap: drop` in the recipe to take them out of train.",
            )
        frames = {**frames, "train": frames["train"].filter(~pl.col("id").is_in(found))}
        dropped["train"] = dropped.get("train", 0) + len(found)
    return frames, dropped


def _freeze_code(recipe: Recipe, folder: Path, tmp: Path) -> dict[str, dict[str, str]]:
    """{reference: {path, digest}}: each reward with the local modules it imports, and each template file, copied into code/."""
    copied: dict[str, dict[str, str]] = {}
    functions, texts = recipe.references()
    for reference in functions:
        function = find_function(reference, recipe.folders)
        home = folder / "code" / function.digest[:12]
        for name, source in local_sources(function.path).items():
            storage.put(home / name, source.read_bytes(), tmp)
        copied[reference] = {"path": (home / function.path.name).relative_to(folder).as_posix(), "digest": function.digest}
    for reference in texts:
        if not _inline(reference):
            template = templates.load(reference, recipe.folders)
            path = folder / "code" / template.digest[:12] / Path(template.name).name
            storage.put(path, template.source.encode(), tmp)
            copied[reference] = {"path": path.relative_to(folder).as_posix(), "digest": template.digest}
    return copied


def _effective(folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """The recipe and code in force: those of the newest amendment, or the original ones."""
    amendments = sorted((folder / "amendments").glob("*.json"))
    return read_record(amendments[-1]) if amendments else info


def _accept(recipe: Recipe, folder: Path, info: dict[str, Any], amend: bool) -> None:
    """Go on only with the same recipe and code; more rounds are always welcome; other changes only as an amendment."""
    effective = _effective(folder, info)
    old, new = _flat(effective["recipe"]), _flat(json.loads(json.dumps(recipe.resolved())))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key) and key != "rounds")
    code = {reference: entry["digest"] for reference, entry in effective["code"].items()}
    now = _digests(recipe)
    edited = sorted(reference for reference in code.keys() | now.keys() if code.get(reference) != now.get(reference))
    grown = recipe.rounds != effective["recipe"]["rounds"]
    if not (changed or edited or grown):
        return
    if (changed or edited) and not amend:
        said = [f"{key}: {old.get(key)!r} was {_verb(key, old, new)} {new.get(key)!r}" for key in changed]
        said += [f"{reference} changed" for reference in edited]
        raise ChainError(
            "was made by a different recipe: " + "; ".join(said[:6]) + (f"; and {len(said) - 6} more" if len(said) > 6 else ""),
            str(folder),
            f"Keep the chain: restore it, or `selfkd resume {folder}`, which uses the recipe and code frozen in the run.\n"
            "Change only steps not made yet: repeat the command with --amend.   Start a new chain: --name X",
        )
    _amend(recipe, folder, changed + edited + (["rounds"] if grown else []))


def _verb(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return "changed to" if key in old and key in new else "removed, now" if key in old else "added as"


def _amend(recipe: Recipe, folder: Path, changed: list[str]) -> None:
    tmp = folder / "tmp"
    number = len(list((folder / "amendments").glob("*.json"))) + 1
    code = _freeze_code(recipe, folder, tmp)
    record = {
        "changed": changed,
        "recipe": recipe.resolved(),
        "code": code,
        "files": storage.file_hashes(sorted(path for path in (folder / "code").rglob("*") if path.is_file()), folder),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    storage.put_json(folder / "amendments" / f"{number:03d}.json", digest.with_self_digest(record), tmp)


def _digests(recipe: Recipe) -> dict[str, str]:
    functions, texts = recipe.references()
    found = {reference: find_function(reference, recipe.folders).digest for reference in functions}
    return found | {text: templates.load(text, recipe.folders).digest for text in texts if not _inline(text)}


def _inline(template: str) -> bool:
    """Text in the recipe itself: it stands in the step's words, and needs no file."""
    return any(mark in template for mark in templates.INLINE)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{dotted.path: value} of nested mappings and lists, so that a difference can be named."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    found: dict[str, Any] = {}
    for key, inner in pairs:
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found or {name: value}


def clean_tmp(folder: Path) -> None:
    """tmp/ is garbage by definition; called under the lease, when no other driver can be writing."""
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    storage.make_folder(folder / "tmp")


__all__ = ["Run", "SelfkdError", "clean_tmp", "read_record"]
