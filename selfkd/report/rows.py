"""Rows of a round, found for a reader: what was asked, what was answered, what it scored, whether it was kept and if not, why.

Reads commits and tables of a run folder. Knows neither how they were made nor how they are printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from selfkd.core import views
from selfkd.core.pool import Pool, empty, light
from selfkd.errors import ChainError, UsageError
from selfkd.report import status


@dataclass(frozen=True)
class Found:
    """The first rows that matched, with their texts: `matched` of `total` rows did. `title` says what was looked for."""

    table: Literal["samples", "rows"]
    title: str
    total: int
    matched: int
    first: pl.DataFrame
    scores: Sequence[str] = ()  # those of its columns that are scores


def samples(folder: Path, index: int | None = None, step: str | None = None, where: str | None = None, n: int = 5) -> Found:
    """Find samples of round `index` (None: the newest with samples), by prompt; only those of one step, or where `where` holds.

    `where` sees every column of the sample table, the scores, and `kept` and `why` (which step dropped it, and its reason).
    """
    index, commits = _round(folder, index, "samples", step)
    made = [commit for commit in commits if _holds(commit, "samples", step)]
    outside = all(commit["outside"] for commit in made)
    pool = _pool(folder, made if outside else [commit for commit in commits if not commit["outside"]])
    view = views.with_scores(_light(folder, "samples", made) if step else pool.samples, pool)
    view = _marked(view, pool, outside)
    matched = _matching(view, pool, where, "samples")
    first = views.with_heavy(matched.sort("prompt", "number", "id").head(n), pool, ["text", "asked"])
    return Found(
        table="samples",
        title=_title(index, step, where, "samples"),
        total=view.height,
        matched=matched.height,
        first=_with_prompts(folder, first, pool),
        scores=views.score_names(pool),
    )


def training_rows(
    folder: Path, index: int | None = None, step: str | None = None, where: str | None = None, n: int = 5
) -> Found:
    """Find the rows a model was trained on; `where` sees the columns of the row table (kind, stream, role, weight, chosen, …)."""
    index, commits = _round(folder, index, "rows", step)
    pool = _pool(folder, [commit for commit in commits if _holds(commit, "rows", step)])
    view = pool.rows.sort("id")
    matched = _matching(view, pool, where, "rows")
    return Found(
        table="rows",
        title=_title(index, step, where, "training rows"),
        total=view.height,
        matched=matched.height,
        first=views.with_heavy(matched.head(n), pool, ["messages", "chosen", "rejected"], "rows"),
    )


def _round(folder: Path, index: int | None, table: str, step: str | None) -> tuple[int, list[dict[str, Any]]]:
    """Return the round asked for, or the newest one that holds such a table, and its commits; raise UsageError with what there is.

    Tables inside the pool go before those outside it: without `step`, the samples of a measurement are shown only where no
    round has others.
    """
    status.run_json(folder)
    known = {int(path.name.rsplit("-", 1)[1]): status.step_commits(path) for path in status.round_folders(folder)}
    if index is not None and index not in known:
        listed = "Rounds: " + ", ".join(map(str, known)) if known else "No round has begun."
        raise UsageError(f"there is no round {index}", str(folder), listed)
    candidates = [index] if index is not None else sorted(known, reverse=True)
    holding = {at: [commit for commit in known[at] if _holds(commit, table, step)] for at in candidates}
    in_pool = [at for at in candidates if any(not commit["outside"] for commit in holding[at])]
    anywhere = [at for at in candidates if holding[at]]
    if not anywhere:
        raise _nothing(folder, index, table, step, [commit for at in candidates for commit in known[at]])
    newest = in_pool[0] if in_pool else anywhere[0]
    return newest, known[newest]


def _nothing(folder: Path, index: int | None, table: str, step: str | None, commits: Sequence[Mapping[str, Any]]) -> UsageError:
    """Return the error that names the steps which do hold such a table."""
    place = "any round" if index is None else f"round {index}"
    steps = sorted({commit["step"] for commit in commits if table in commit["tables"]})
    fix = f"Steps with {table}: {', '.join(steps)}" if steps else "Nothing of that kind was made yet: selfkd status"
    return UsageError(f"no {table} in {place}" + (f", step '{step}'" if step else ""), str(folder), fix)


def _holds(commit: Mapping[str, Any], table: str, step: str | None) -> bool:
    return table in commit["tables"] and (step is None or commit["step"] == step)


def _pool(folder: Path, commits: Sequence[Mapping[str, Any]]) -> Pool:
    """Return what these commits added, light columns in memory; raise ChainError where a file of theirs is gone."""
    files: dict[str, tuple[Path, ...]] = {}
    for commit in commits:
        for name, table in commit["tables"].items():
            files[name] = (*files.get(name, ()), *(folder / path for path in table["files"]))
    missing = [path for paths in files.values() for path in paths if not path.is_file()]
    if missing:
        raise ChainError("is missing", str(missing[0]), f"See all damage: selfkd verify {folder}")
    return Pool({name: _light(folder, name, commits) for name in files}, files)


def _light(folder: Path, table: str, commits: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    paths = [folder / path for commit in commits for path in commit["tables"].get(table, {}).get("files", ())]
    scans = [pl.scan_parquet(path) for path in paths]
    frames = [scan.select(light(table, pl.DataFrame(schema=scan.collect_schema())).columns).collect() for scan in scans]
    return pl.concat(frames) if frames else getattr(Pool(), table)


def _marked(view: pl.DataFrame, pool: Pool, outside: bool) -> pl.DataFrame:
    """Add `kept` (null for a held-out answer), and `why`: the first step that dropped the sample or its prompt, with its reason."""
    drops = pool.drops.with_columns(why=pl.format("{}: {}", "step", "reason"))
    own = drops.filter(pl.col("stream").is_not_null()).group_by("id", maintain_order=True).agg(pl.col("why").first())
    prompts = drops.filter(pl.col("stream").is_null()).group_by("id", maintain_order=True).agg(prompt_why=pl.col("why").first())
    marked = view.join(own, on="id", how="left").join(prompts.rename({"id": "prompt"}), on="prompt", how="left")
    marked = marked.with_columns(why=pl.coalesce("why", "prompt_why")).drop("prompt_why")
    return marked.with_columns(kept=pl.lit(None, pl.Boolean) if outside else pl.col("why").is_null())


def _matching(view: pl.DataFrame, pool: Pool, where: str | None, table: str) -> pl.DataFrame:
    """Return the rows for which `where` holds; heavy columns are read only if it names them."""
    if not where:
        return view
    heavy = [name for name in Pool().scan(table).collect_schema().names() if name not in view.columns]
    parsed = views.expression(where, [*view.columns, *heavy], "--where")
    named = [name for name in parsed.meta.root_names() if name in heavy]
    with_texts = views.with_heavy(view, pool, named, table)
    return with_texts.filter(parsed).select(view.columns)


def _with_prompts(folder: Path, rows: pl.DataFrame, pool: Pool) -> pl.DataFrame:
    """Add the `messages` and `answer` of each row's prompt, wherever that prompt was frozen or made."""
    frozen = [folder / split["file"] for split in status.run_json(folder)["prompts"].values()]
    sources = [pl.scan_parquet(path) for path in (*frozen, *pool.files.get("prompts", ())) if path.is_file()]
    columns, wanted = ("id", "messages", "answer"), rows["prompt"].unique().to_list()
    found = [source.select(columns).filter(pl.col("id").is_in(wanted)).collect() for source in sources]
    prompts = pl.concat([empty("prompts").select(columns), *found]).unique("id", keep="last")
    return rows.join(prompts.rename({"id": "prompt"}), on="prompt", how="left", maintain_order="left")


def _title(index: int, step: str | None, where: str | None, noun: str) -> str:
    return f"round {index}" + (f" · {step}" if step else "") + f" · {noun}" + (f" where {where}" if where else "")
