"""Creating a run: prompts, code and recipe are copied into its folder, and run.json, which makes it exist, comes last."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.machine import Machine
from selfkd.chain import data, records, resolved
from selfkd.chain.numerics import asked
from selfkd.chain.paths import Paths
from selfkd.chain.records import CodeEntry, Info, SplitEntry
from selfkd.chain.scorers import freeze_scorer
from selfkd.core import digest, storage
from selfkd.core.files import locate
from selfkd.core.lease import Lease
from selfkd.core.local_code import local_code
from selfkd.core.pool import KEYS
from selfkd.errors import GuardError, UsageError
from selfkd.prompts import templates
from selfkd.prompts.overlap import duplicates, leaks
from selfkd.prompts.read import read_prompts, source_words
from selfkd.recipe import checks
from selfkd.recipe.lines import LISTS
from selfkd.recipe.losses import MEMORY_GB as LOSS_MEMORY_GB
from selfkd.recipe.schema import Recipe
from selfkd.rewards.find import find_function
from selfkd.rewards.pool import MEMORY_GB, loaded


def create(recipe: Recipe, paths: Paths, machine: Machine) -> None:
    """Freeze everything, then commit run.json. A crash before that leaves only garbage, which the next creation removes.

    Under the lease, so that a second creator never takes the first one's files for such garbage: it gets BusyError, or the
    finished run. The lease is a link, so a file system that cannot link says so here, before anything is generated.
    """
    with Lease(paths.leases, paths.tmp):
        if not paths.info.exists():
            _freeze_all(recipe, paths, machine)


def begin_anew(recipe: Recipe, paths: Paths, machine: Machine, changed: Callable[[], Sequence[str]]) -> Sequence[str]:
    """Create a run in which nothing was committed once more, if `changed` says that its recipe is another now; return what changed.

    It is no chain yet, so nothing is lost but an attempt, whose log stays. run.json goes first: a crash from then on leaves what a
    crash in `create` leaves. Under the lease, and judged there: another process may have begun it, or have begun it anew.
    """
    with Lease(paths.leases, paths.tmp):
        said = changed() if paths.info.exists() and not paths.holds_a_chain else []
        if said:
            storage.retract(paths.info)
        if not paths.info.exists():
            _freeze_all(recipe, paths, machine)
        return said


def _freeze_all(recipe: Recipe, paths: Paths, machine: Machine) -> None:
    storage.sweep(paths.folder)
    for leftover in (*paths.frozen, *paths.attempted):
        if leftover.exists():
            storage.remove(leftover)
    storage.make_folder(paths.tmp)
    prompts = freeze_prompts(recipe, paths)
    brought = data.freeze(recipe, paths, prompts)
    code = freeze_code(recipe, paths, {}, machine.backend == "fake")
    prove_code(recipe, code, paths, machine.environment)
    storage.put(paths.recipe, recipe.text.encode(), paths.tmp)
    storage.put(paths.resolved, resolved.text(recipe, prompts, code, brought).encode(), paths.tmp)
    frozen = (paths.prompts, paths.code, paths.data)
    files = [*(file for folder in frozen for file in storage.files_in(folder)), paths.recipe, paths.resolved]
    info = Info(
        format=records.FORMAT,
        name=paths.folder.name,
        created=now(),
        seed=recipe.seed,
        root=records.root_digest(recipe.seed, recipe.context, prompts),
        rounds=recipe.rounds,
        model=recipe.model_source(),
        prompts=prompts,
        recipe=recipe.resolved(),
        code=code,
        numerics=asked(recipe, machine),
        numerics_fixed=False,
        machine=machine.words(),
        files=storage.file_hashes(files, paths.folder),
        data=brought,
    )
    records.write(paths.info, info, paths.tmp)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ---- prompts ----


def freeze_prompts(recipe: Recipe, paths: Paths) -> dict[str, SplitEntry]:
    """Write the prompts of each split; those that are held out elsewhere too are refused or taken out, as the recipe says."""
    frames = {split: read_prompts(source, recipe.folders, split) for split, source in recipe.splits().items()}
    checks.refuse(recipe, frames)
    frames, dropped = _without_leaks(frames, recipe)
    read = {split: _file_digest(source, recipe) for split, source in recipe.splits().items()}
    return {split: _frozen_split(split, frame, read[split], dropped.get(split, 0), paths) for split, frame in frames.items()}


def _frozen_split(split: str, frame: pl.DataFrame, read: str, dropped: int, paths: Paths) -> SplitEntry:
    path = storage.write_parquet(frame, paths.prompts, paths.tmp, f"{split}-")
    return SplitEntry(
        file=paths.relative(path),
        rows=frame.height,
        digest=digest.table(frame, KEYS["prompts"]),
        repeats=duplicates(frame),
        overlap=dropped,
        read_sha256=read,
    )


def edited_prompts(recipe: Recipe, prompts: Mapping[str, SplitEntry]) -> list[str]:
    """Return one sentence for each file of prompts that was changed since the run was created: the run keeps those it has."""
    said = "was changed since the run was created, which keeps the prompts it was created with. For others: --name X"
    return [
        f"prompts.{split}: {source_words(source)['file']} {said}"
        for split, source in recipe.splits().items()
        if split in prompts and (was := prompts[split].read_sha256) and (found := _file_digest(source, recipe)) and found != was
    ]


def _file_digest(source: Any, recipe: Recipe) -> str:
    """Return the hash of the file that a split is read from; '' where it is read from elsewhere, or the file is gone."""
    words = source_words(source)
    try:
        return digest.file(locate(words["file"], recipe.folders)) if "file" in words else ""
    except UsageError:
        return ""


def _without_leaks(frames: dict[str, pl.DataFrame], recipe: Recipe) -> tuple[dict[str, pl.DataFrame], dict[str, int]]:
    """Return the splits, and how many prompts were taken out of each because another split holds them out (`overlap: drop`)."""
    heights = {split: frame.height for split, frame in frames.items()}
    for split, held_out, shared in leaks(frames, recipe.transductive):
        if recipe.overlap == "refuse":
            what = f"{len(shared)} {split} prompts stand in '{held_out}' too, such as {shared[0]}"
            fix = f"Separate the splits, or write `overlap: drop` in the recipe to take them out of {split}."
            raise GuardError(what, "prompts", fix)
        frames[split] = frames[split].filter(~pl.col("id").is_in(shared))
        if not frames[split].height:
            raise GuardError(f"every {split} prompt stands in '{held_out}' too", "prompts", "Separate the splits.")
    return frames, {split: heights[split] - frame.height for split, frame in frames.items()}


# ---- code ----


def freeze_code(
    recipe: Recipe, paths: Paths, known: Mapping[str, CodeEntry], stand_in: bool, kept: Collection[str] = ()
) -> dict[str, CodeEntry]:
    """Copy each reward, with the local files it needs, each template file, and each model that scores into code/; {reference: entry}.

    A model that is `known` lies there already: a run keeps those that it has. With `stand_in` only their names are kept. Code that is
    `kept` stays as it is known, whatever lies beside the recipe.
    """
    code = {reference: _freeze(function, paths) for reference, function in _named_code(recipe, kept)}
    code |= {reference: known[reference] for reference in kept}
    scorers = {one: known[one] if one in known else freeze_scorer(one, recipe, paths, stand_in) for one in recipe.scorers()}
    return code | scorers


def _freeze(named: Any, paths: Paths) -> CodeEntry:
    """Copy a function's files, or a template's, into a folder of their own: named by what they mean, and by what they say.

    Two files of one code may differ in comments, as may one file before and after an edit; each has its place.
    """
    if isinstance(named, templates.Template):
        contents, main = {Path(named.name).name: named.source.encode()}, Path(named.name).name
    else:
        code = local_code(named.path)
        contents, main = {name: source.read_bytes() for name, source in code.files.items()}, code.main_name
    said = digest.of({name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
    home = paths.code / f"{named.digest[:12]}-{said[:12]}"
    for name, content in contents.items():
        storage.put(home / name, content, paths.tmp)
    return CodeEntry(path=paths.relative(home / main), digest=named.digest)


def prove_code(
    recipe: Recipe, code: Mapping[str, CodeEntry], paths: Paths, environment: Iterable[str], kept: Collection[str] = ()
) -> None:
    """Have each reward loaded from its frozen copy alone, but for those that are `kept`; UsageError where it needs what was not copied.

    The workers that load it wait for the first samples, so this costs a run nothing that it would not pay later.
    """
    for step in (line.at(1) for part in LISTS for line in getattr(recipe, part)):
        for reference in (one for one in step.functions() if one not in kept):
            function = replace(
                find_function(reference, recipe.folders), params=getattr(step, "params", {}), environment=tuple(environment)
            )
            memory = LOSS_MEMORY_GB if reference in step.losses() else MEMORY_GB
            try:
                loaded(replace(function, path=paths.folder / code[reference].path), memory)
            except UsageError:
                loaded(function, memory)  # the same copy, made of the file beside the recipe, which is the one to name
                raise


def code_digests(recipe: Recipe, known: Mapping[str, CodeEntry], kept: Collection[str] = ()) -> dict[str, str]:
    """Return {reference: digest} of the code and templates as they are beside the recipe now, and of the models that score.

    Of those, as they are `known`: nobody is asked for them again. One that is not known yet has no digest. So is code that is `kept`.
    """
    code = {reference: named.digest for reference, named in _named_code(recipe, kept)}
    code |= {reference: known[reference].digest for reference in kept}
    return code | {one: known[one].digest if one in known else "" for one in recipe.scorers()}


def _named_code(recipe: Recipe, kept: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (reference, function or template) of what is not `kept`; text in the recipe itself is in a step's identity, and needs no file."""
    functions, texts = recipe.references()
    for reference in (one for one in functions if one not in kept):
        yield reference, find_function(reference, recipe.folders)
    for reference in (one for one in texts if one not in kept):
        if not templates.is_inline(reference):
            yield reference, templates.load(reference, recipe.folders)
