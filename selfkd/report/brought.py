"""Whether what `bring` steps brought is what was frozen: the table by its digest, and all that a step made of it, worked out again by the step itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import polars as pl

from selfkd.chain import commit as commits
from selfkd.chain import records
from selfkd.chain.data import meaning
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit, DataEntry, Info
from selfkd.core import digest, drawing
from selfkd.core.pool import KEYS, Addition, Pool, as_stored, read_light
from selfkd.steps.bring import NOT_ASKED, BringStep
from selfkd.steps.context import Context

UNSEEN = ("prompts", "drops")  # what a step adds of these rests on the prompts of its round


def frozen_problems(folder: Path, data: Mapping[str, DataEntry]) -> list[str]:
    """Return one sentence for each frozen table that does not mean what run.json says, or has other numbers of rows."""
    return [f"run.json: the answers of '{name}' {wrong}" for name, entry in data.items() if (wrong := _wrong(folder, entry))]


def _wrong(folder: Path, entry: DataEntry) -> str:
    frame = pl.read_parquet(folder / entry.path, glob=False)
    counts = (frame.height, int(frame["ours"].sum()), frame["drop"].count())
    if meaning(frame) != entry.digest:
        return "do not mean what was frozen"
    said = (entry.rows, entry.ours, entry.dropped)
    return "" if counts == said else f"are {counts} (all, to train prompts, dropped), and it says {said}"


@dataclass(frozen=True)
class _Again:
    """What a `bring` step asks of its round, for a second time; nothing is written."""

    seeds: tuple[Any, ...]
    index: int
    frame: pl.DataFrame

    def data(self, name: str) -> pl.DataFrame:
        return self.frame

    def seed(self, *names: Any) -> int:
        return digest.seed(*self.seeds, *names)

    def save(self, table: str, frame: pl.DataFrame) -> pl.DataFrame:
        return frame


def problems(paths: Paths, info: Info, commit: Commit, before: Sequence[Commit] | None) -> Iterator[str]:
    """Yield in what a step of this verb brought something else than what was frozen, or left something of it out.

    `before` are the steps of its round before it; None where damage hides them: then what rests on the prompts of the round is passed over.
    """
    names = [name for name in commit.code if name.startswith(BringStep.DATA)]
    if commit.verb != BringStep.verb or not names or names[0] not in info.data:
        return
    frozen = pl.read_parquet(paths.folder / info.data[names[0]].path, glob=False)
    step = BringStep.model_construct(**{name: value for name, value in commit.identity.items() if name != "verb"})
    pool = None if before is None else _pool(paths, info, commit, before)
    again = _Again((info.seed, commit.round, commit.step), commit.round, frozen)
    made = step.run(pool or Pool(), cast(Context, again))
    for table in sorted(KEYS.keys() & {*made.tables, *commit.tables}):
        if pool is not None or table not in UNSEEN:
            yield from _unlike(paths, commit, made, table)
    yield from _must_drop(paths, commit, frozen, step, again) if pool is None else ()


def _pool(paths: Paths, info: Info, commit: Commit, before: Sequence[Commit]) -> Pool | None:
    """Return the pool that the step saw; None where the prompts of its round were chosen by scores of others."""
    train = paths.folder / info.prompts["train"].file
    take, prompts = info.recipe["prompts"].get("take"), read_light("prompts", [train])
    if isinstance(take, dict) and take.get("by"):
        return None
    most = take["n"] if isinstance(take, dict) else take
    if most and commit.round:
        prompts = drawing.next_of(prompts, most, commit.round)
    tables = {"prompts": prompts}
    if commit.round:
        tables["drops"] = _long(paths).join(prompts, on="id", how="semi")
    pool = Pool(tables, {"prompts": (train,)})
    for one in before:
        pool += commits.pool_of(paths, one)
    return pool


def _long(paths: Paths) -> pl.DataFrame:
    """Return the drops of the load step: prompts that no round may ask."""
    first = records.read(paths.round(0).commits()[0], Commit, unchanged=False)
    return read_light("drops", [paths.folder / path for path in first.tables["drops"].files] if "drops" in first.tables else [])


def _unlike(paths: Paths, commit: Commit, made: Addition, table: str) -> Iterator[str]:
    """Yield one row that is here and is not what comes out again, or the other way round."""
    files = [paths.folder / path for path in commit.tables[table].files] if table in commit.tables else []
    here, due = as_stored(files) if files else made.whole(table).clear(), made.whole(table)
    if digest.table(here, KEYS[table]) == digest.table(due, KEYS[table]):
        return
    columns = [name for name in due.columns if name in here.columns]
    mine, its = ({repr(row): row for row in frame.select(columns).iter_rows(named=True)} for frame in (here, due))
    for one, other, said in ((mine, its, "is none that"), (its, mine, "is missing, or is another one than")):
        if strange := sorted(one.keys() - other.keys()):
            named = ", ".join(str(one[strange[0]][key]) for key in KEYS[table] if one[strange[0]].get(key) is not None)
            yield f"{table} {named} {said} the frozen answers come to"
            return


def _must_drop(paths: Paths, commit: Commit, frozen: pl.DataFrame, step: BringStep, again: _Again) -> Iterator[str]:
    """Yield an answer that may not be used and was not dropped, or one that was dropped for a reason that nobody froze."""
    files = [paths.folder / path for path in commit.tables["drops"].files] if "drops" in commit.tables else []
    dropped = dict(read_light("drops", files).select("id", "reason").iter_rows())
    for name, reason in step.of_round(frozen, again.index).select("sample", "drop").iter_rows():
        if dropped.get(name, NOT_ASKED) != (reason or NOT_ASKED) or (reason and name not in dropped):
            yield f"sample {name} is dropped as {dropped.get(name)!r}, and what was frozen says {reason!r}"
            return
