"""Whether what `bring` steps brought is what was frozen: the table by its digest, and every sample by its prompt, text and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl

from selfkd.chain.data import meaning
from selfkd.chain.records import Commit, DataEntry
from selfkd.core.pool import scan
from selfkd.steps.bring import BringStep

TEXTS = ["prompt", "text"]


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


def problems(folder: Path, commit: Commit, data: Mapping[str, DataEntry]) -> Iterator[str]:
    """Yield in what a step of this verb brought something else than what was frozen."""
    names = [name for name in commit.code if name.startswith(BringStep.DATA)]
    if commit.verb != BringStep.verb or not names or names[0] not in data:
        return
    frozen = pl.read_parquet(folder / data[names[0]].path, glob=False).rename({"completion": "text"})
    files = {name: [folder / path for path in table.files] for name, table in commit.tables.items()}
    samples = scan("samples", files.get("samples", ())).select("id", *TEXTS).collect()
    strange = samples.join(frozen, on=TEXTS, how="anti")
    if strange.height:
        yield f"sample {strange['id'][0]} is no answer that was frozen"
    scores = scan("scores", files.get("scores", ())).collect()
    for name in [name for name in scores["name"].unique() if name in frozen.columns]:
        found = scores.filter(pl.col("name") == name).select("value", id="sample").join(samples, on="id")
        other = found.join(frozen, left_on=[*TEXTS, "value"], right_on=[*TEXTS, name], how="anti", nulls_equal=True)
        if other.height:
            yield f"the score '{name}' of sample {other['id'][0]} is not that which was frozen"
