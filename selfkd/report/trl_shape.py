"""The samples or training rows of a run as one wide table, in the columns that TRL's trainers read, conversations as lists of messages.

Formats: https://huggingface.co/docs/trl/dataset_formats. SFT and kd: prompt, completion. DPO: prompt, chosen, rejected. KTO: prompt,
completion, label. Of ranks, TRL has no format: completions and their scores, the best first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import polars as pl

from selfkd.chain import contents
from selfkd.chain.records import Commit
from selfkd.chain.run import Run
from selfkd.core import views
from selfkd.errors import UsageError

WRITERS: dict[str, Callable[[pl.DataFrame, Path], object]] = {
    ".parquet": pl.DataFrame.write_parquet,
    ".jsonl": pl.DataFrame.write_ndjson,
}
MARKED = ("kept", "why")  # what became of a sample
BEFORE, BEHIND = ("id", "stream", "answer"), (*MARKED, "finish_reason", "tokens", "model")  # of a sample's scores
ABOUT = ("round", "id", "stream", "role", "weight", "samples")  # columns of a row that stand beside those that TRL reads


def samples(run: Run, index: int | None = None, where: str | None = None) -> pl.DataFrame:
    """Return the samples of all rounds, or of one: prompt, completion, answer, a column per score, kept and why, one row each.

    Held-out answers are no part of it. UsageError where there are none.
    """
    return _of_rounds(run, "samples", lambda number: _samples(run, number, where), index)


def _samples(run: Run, index: int, where: str | None) -> pl.DataFrame:
    found = contents.samples(run.paths, index, None, where)
    names = views.score_names(found.pool)
    scores = views.with_scores(found.rows.select("id"), found.pool)
    bare = found.rows.drop(name for name in names if name not in MARKED)
    frame = contents.with_prompts(run.paths, run.info, views.with_heavy(bare, found.pool, ["text"]), found.pool)
    frame = frame.select(
        pl.lit(index).alias("round"), pl.col("messages").alias("prompt"), _turn("text").alias("completion"), *BEFORE, *BEHIND
    )
    scores = scores.rename({name: _apart("score", name, frame.columns) for name in names})
    joined = frame.join(scores, on="id", how="left", maintain_order="left")
    return joined.select(*frame.columns[: -len(BEHIND)], *scores.columns[1:], *BEHIND)


def _apart(kind: str, name: str, taken: Collection[str]) -> str:
    """Return the name of a column, with its kind in front where the table has another one of that name."""
    return _apart(kind, f"{kind}_{name}", taken) if name in taken else name


def rows(run: Run, index: int | None = None, where: str | None = None) -> pl.DataFrame:
    """Return the training rows of all rounds, or of one, all of one kind; UsageError where they are of several, or there are none."""
    found = _of_rounds(run, "rows", lambda number: _rows(run, number, where), index)
    kinds = sorted(found["kind"].unique())
    if len(kinds) > 1:
        fix = f"Choose: --where \"kind = '{kinds[0]}'\", or --round"
        raise UsageError(f"rows are of several kinds ({', '.join(kinds)}), and a trainer reads one", "--rows", fix)
    return found.drop("kind")


def _rows(run: Run, index: int, where: str | None) -> pl.DataFrame:
    found = contents.training_rows(run.paths, index, None, where)
    frame = found.with_texts("rows").with_columns(pl.lit(index).alias("round"))
    kinds = sorted(frame["kind"].unique())
    if len(kinds) > 1:
        return frame.select("kind")  # which is refused
    learned = {
        "pair": [_turn("chosen").alias("chosen"), _turn("rejected").alias("rejected")],
        "label": [_turn("chosen").alias("completion"), _label(frame)],
        "rank": [pl.col("ranked").alias("completions")],
        "kd": [_turn("chosen").alias("completion"), pl.col("teacher_messages").alias("teacher_prompt")],
    }.get(kinds[0] if kinds else "sft", [_turn("chosen").alias("completion")])
    shown = frame.select("kind", *ABOUT, pl.col("messages").alias("prompt"), *learned)
    return shown.hstack(frame.select(_numbers(frame, shown.columns)))


def _turn(column: str) -> pl.Expr:
    """A text as the one message of an assistant."""
    return pl.concat_list(pl.struct(role=pl.lit("assistant"), content=pl.col(column)))


def _label(frame: pl.DataFrame) -> pl.Expr:
    """The label of a row: true and false where there are but 1 and 0, as KTO reads it, else the number."""
    either = frame["label"].drop_nulls().is_in([0.0, 1.0]).all()
    return pl.col("label").cast(pl.Boolean) if either else pl.col("label")


def _numbers(frame: pl.DataFrame, taken: Collection[str]) -> list[pl.Expr]:
    """The numbers of a row's own, a column each."""
    owned: list[str] = frame["columns"].explode().drop_nulls().struct.field("name").unique(maintain_order=True).to_list()
    return [
        pl.col("columns")
        .list.eval(pl.element().filter(pl.element().struct.field("name") == name).struct.field("value"))
        .list.first()
        .alias(_apart("column", name, taken))
        for name in owned
    ]


def _of_rounds(run: Run, table: str, read: Callable[[int], pl.DataFrame], index: int | None) -> pl.DataFrame:
    numbers = [names.index for names in run.paths.rounds() if index in (None, names.index)]
    frames = [read(number) for number in numbers if any(_in_pool(one, table) for one in run.made(number).values())]
    if not frames:
        place = "any round" if index is None else f"round {index}"
        raise UsageError(f"no {table} in {place}", str(run.folder), "See the rounds: selfkd status")
    return pl.concat([one for one in frames if one.height] or frames[:1], how="diagonal_relaxed")


def _in_pool(made: Commit, table: str) -> bool:
    return table in made.tables and not made.outside


def refuse(path: Path) -> None:
    """Raise UsageError for a suffix that is no format of a table, or where the file is there."""
    if path.suffix not in WRITERS:
        raise UsageError(f"'{path.suffix}' is no format of a table", str(path), f"Write one of {', '.join(WRITERS)}")
    if path.exists():
        raise UsageError("is there already", str(path), "Name a new file, or take that one away.")


def write(frame: pl.DataFrame, path: Path) -> None:
    """Write a table as its suffix says; a reader sees it whole or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    WRITERS[path.suffix](frame, draft)
    draft.rename(path)
