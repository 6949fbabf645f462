"""What `bring` steps bring, read and frozen when a run is created: matched with its prompts, and kept from what is held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import polars as pl

from selfkd.chain.paths import Paths
from selfkd.chain.records import DataEntry, SplitEntry
from selfkd.core import digest, storage
from selfkd.core.files import locate
from selfkd.errors import UsageError
from selfkd.prompts.read import source_words
from selfkd.recipe.brought import answers_of
from selfkd.recipe.lines import LISTS
from selfkd.recipe.schema import Recipe
from selfkd.steps.bring import BringStep


def steps_of(recipe: Recipe) -> Iterator[BringStep]:
    """Yield the steps of a recipe that bring answers."""
    for step in (line.at(1) for part in LISTS for line in getattr(recipe, part)):
        if isinstance(step, BringStep):
            yield step


def freeze(recipe: Recipe, paths: Paths, prompts: Mapping[str, SplitEntry]) -> dict[str, DataEntry]:
    """Write the answers of each `bring` step, matched with the prompts as they were frozen; {its name for them: entry}."""
    splits = {split: pl.read_parquet(paths.folder / entry.file, glob=False) for split, entry in prompts.items()}
    return {step.data(): _frozen(step, recipe, paths, splits) for step in steps_of(recipe)}


def _frozen(step: BringStep, recipe: Recipe, paths: Paths, splits: Mapping[str, pl.DataFrame]) -> DataEntry:
    try:
        frame = answers_of(step, recipe, splits)
    except UsageError as error:
        raise UsageError(error.what, f"{step.name}: {error.where}", error.fix) from error
    path = storage.write_parquet(frame, paths.data, paths.tmp, f"{step.name}-")
    return DataEntry(
        path=paths.relative(path),
        digest=meaning(frame),
        rows=frame.height,
        ours=int(frame["ours"].sum()),
        dropped=frame["drop"].count(),
        reading=step.reading(),
        read_sha256=_file_digest(step, recipe),
        licence=step.licence,
    )


def meaning(frame: pl.DataFrame) -> str:
    """Return the digest of frozen answers."""
    return digest.table(frame, ("id",))


def unread(recipe: Recipe, known: Mapping[str, DataEntry]) -> str:
    """Return the name of a step whose data was not read when the run was created, or by other words; ''."""
    for step in steps_of(recipe):
        if step.data() not in known or digest.as_json(step.reading()) != digest.as_json(known[step.data()].reading):
            return step.name
    return ""


def edited(recipe: Recipe, known: Mapping[str, DataEntry]) -> list[str]:
    """Return one sentence for each file of answers that was changed since the run was created: the run keeps those it has."""
    said = "was changed since the run was created, which keeps the answers it was created with. For others: --name X"
    return [
        f"{step.name}: {source_words(step.from_)['file']} {said}"
        for step in steps_of(recipe)
        if step.data() in known
        and (was := known[step.data()].read_sha256)
        and (found := _file_digest(step, recipe))
        and found != was
    ]


def _file_digest(step: BringStep, recipe: Recipe) -> str:
    words = source_words(step.from_)
    try:
        return digest.file(locate(words["file"], recipe.folders)) if "file" in words else ""
    except UsageError:
        return ""
