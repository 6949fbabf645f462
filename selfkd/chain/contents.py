"""What a run holds, as frames for a notebook: metrics, samples with their scores and verdicts, training rows.

Reads commits and tables of a run folder, also while a driver writes; knows nothing of how they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from selfkd.chain import agreement, filtering, records
from selfkd.chain.measured import recorded
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit, Info, Seal
from selfkd.core import of_prompts, views
from selfkd.core.pool import HEAVY, Pool, read_light, scan
from selfkd.errors import ChainError, UsageError


@dataclass(frozen=True)
class Rows:
    """Rows of one round: its number, how many rows there are, those that `where` holds for, and the pool their texts are in."""

    index: int
    total: int
    rows: pl.DataFrame
    pool: Pool

    def with_texts(self, table: str) -> pl.DataFrame:
        """Return the rows with their heavy columns."""
        return views.with_heavy(self.rows, self.pool, HEAVY[table], table)


def metrics(sealed: Sequence[Seal]) -> pl.DataFrame:
    """Return one row per sealed round: `round`, `accepted`, a column per metric, and `_low` and `_high` of each that has an interval.

    What a filter is worth by a gold score `right` that it does not see stands in `right_precision`, `right_gap`, `right_relative_gap`, and
    `right_auroc_NAME` of each score that chooses; how far engine and trainer lay apart in `train_engine_apart_mean`, `_p99` and `_floor`.

    Null where a round did not measure it, or where nothing could be said of it.
    """
    rows = [
        {"round": seal.round, "accepted": seal.accepted, **seal.metrics, **_bounds(seal), **_filter(seal), **_apart(seal)}
        for seal in sealed
    ]
    return pl.DataFrame(rows, infer_schema_length=None)


def _bounds(seal: Seal) -> dict[str, float]:
    found = {one.name: one.interval for one in (recorded(seal.notes) or {}).values() if one.interval}
    return {f"{name}_{side}": bound for name, between in found.items() for side, bound in asdict(between).items()}


def _filter(seal: Seal) -> dict[str, float | None]:
    return {name: value for one in filtering.recorded(seal.notes) for name, value in one.figures().items()}


def _apart(seal: Seal) -> dict[str, float]:
    return agreement.figures(seal.notes.get("engine_apart", {}))


def samples(paths: Paths, index: int | None = None, step: str | None = None, where: str | None = None) -> Rows:
    """Return the samples, by prompt, of a round (default: the newest that has samples), of one step of it, or those `where` holds for.

    `where` sees every column of the sample table, the scores, `kept` and `why` (which step dropped it, and its reason), and as in a recipe
    `prompt.NAME` and numbers over the prompt's samples, dropped ones too.
    """
    number, commits = _round_with(paths, index, "samples", step)
    made = [one for one in commits if _holds(one, "samples", step)]
    outside = all(one.outside for one in made)
    pool = _pool(paths, made if outside else [one for one in commits if not one.outside])
    view = views.with_scores(_light(paths, "samples", made) if step else pool.samples, pool)
    view = _marked(view, pool, outside)
    rows = _matching(view, _with_frozen(paths, pool), where, "samples") if where else view
    return Rows(number, view.height, rows.sort("prompt", "number", "id"), pool)


def scores(paths: Paths, index: int | None = None, step: str | None = None) -> pl.DataFrame:
    """Return every score of a round (default: the newest that has some), a row per draw: sample, name, value, and why it has none.

    `versus` is the other answer of a verdict; `step` says which step gave it.
    """
    number, commits = _round_with(paths, index, "scores", step)
    held = [one for one in commits if _holds(one, "scores", step)]
    made = [
        one for one in held if not one.outside
    ] or held  # those of held-out answers where there are no others, or by their step
    parts = [_light(paths, "scores", [one]).with_columns(step=pl.lit(one.step), round=pl.lit(number)) for one in made]
    return pl.concat(parts).sort("step", "sample", "name", "draw")


def training_rows(paths: Paths, index: int | None = None, step: str | None = None, where: str | None = None) -> Rows:
    """Return the rows a model was trained on; `where` sees the columns of the row table (kind, stream, role, weight, chosen, …)."""
    number, commits = _round_with(paths, index, "rows", step)
    pool = _pool(paths, [one for one in commits if _holds(one, "rows", step)])
    view = pool.rows.sort("id")
    return Rows(number, view.height, _matching(view, pool, where, "rows"), pool)


# ---- which round ----


def _round_with(paths: Paths, index: int | None, table: str, step: str | None) -> tuple[int, list[Commit]]:
    """Return the round asked for, or the newest one that holds such a table, with its commits; UsageError says what there is."""
    rounds = paths.rounds()
    known = {
        names.index: [records.read(path, Commit) for path in names.commits()]
        for names in rounds
        if index in (None, names.index)
    }
    if index is not None and index not in known:
        listed = "Rounds: " + ", ".join(str(names.index) for names in rounds) if rounds else "No round has begun."
        raise UsageError(f"there is no round {index}", str(paths.folder), listed)
    candidates = sorted(known, reverse=True)

    def with_table(wanted: Callable[[Commit], bool]) -> list[int]:
        return [number for number in candidates if any(_holds(one, table, step) and wanted(one) for one in known[number])]

    # What is in the pool comes before held-out answers, whichever round those are of.
    found = with_table(lambda one: not one.outside) or with_table(lambda one: True)
    if not found:
        raise _nothing(paths, index, table, step, [one for number in candidates for one in known[number]])
    return found[0], known[found[0]]


def _nothing(paths: Paths, index: int | None, table: str, step: str | None, commits: Sequence[Commit]) -> UsageError:
    steps = sorted({one.step for one in commits if table in one.tables})
    fix = f"Steps with {table}: {', '.join(steps)}" if steps else "Nothing of that kind was made yet: selfkd status"
    place = f"round {index}" if index is not None else "any round"
    return UsageError(f"no {table} in {place}" + (f", step '{step}'" if step else ""), str(paths.folder), fix)


def _holds(made: Commit, table: str, step: str | None) -> bool:
    return table in made.tables and (step is None or made.step == step)


# ---- tables ----


def _pool(paths: Paths, commits: Sequence[Commit]) -> Pool:
    """Return what these commits added, held-out answers too; ChainError names a table file that is gone."""
    files: dict[str, tuple[Path, ...]] = {}
    for made in commits:
        for name, table in made.tables.items():
            files[name] = (*files.get(name, ()), *(paths.folder / path for path in table.files))
    missing = [path for found in files.values() for path in found if not path.is_file()]
    if missing:
        raise ChainError("is missing", str(missing[0]), f"See all damage: selfkd verify {paths.folder}")
    return Pool({name: _light(paths, name, commits) for name in files}, files)


def _light(paths: Paths, table: str, commits: Sequence[Commit]) -> pl.DataFrame:
    files = [paths.folder / path for made in commits if table in made.tables for path in made.tables[table].files]
    return read_light(table, files)


def _marked(view: pl.DataFrame, pool: Pool, outside: bool) -> pl.DataFrame:
    """Add `kept` (null for a held-out answer and for a judgment), and `why`: the first step that dropped the sample or its prompt, with the reason."""
    drops = pool.drops.with_columns(why=pl.format("{}: {}", "step", "reason"))
    own = drops.filter(pl.col("stream").is_not_null()).group_by("id", maintain_order=True).agg(pl.col("why").first())
    prompts = drops.filter(pl.col("stream").is_null()).group_by("id", maintain_order=True).agg(prompt_why=pl.col("why").first())
    marked = view.join(own, on="id", how="left").join(prompts.rename({"id": "prompt"}), on="prompt", how="left")
    marked = marked.with_columns(why=pl.coalesce("why", "prompt_why")).drop("prompt_why")
    kept = pl.when(pl.col("aside").fill_null(False)).then(None).otherwise(pl.col("why").is_null())
    return marked.with_columns(kept=pl.lit(None, pl.Boolean) if outside else kept)


def _matching(view: pl.DataFrame, pool: Pool, where: str | None, table: str) -> pl.DataFrame:
    """Return the rows for which `where` holds; heavy columns are read only if it names them. Samples know the columns of their prompts."""
    if not where:
        return view
    if table == "rows" and (named := of_prompts.columns_in(where)):
        what = f"'{of_prompts.PREFIX}{min(named)}' in '{where}': a training row may be made of several prompts, or of none"
        raise UsageError(what, "where", "Samples know their prompts: leave out --training-rows.")
    wide = views.with_named(view, pool, where) if table == "samples" else view
    heavy = [name for name in HEAVY[table] if name not in wide.columns]
    own = (of_prompts.known_kinds(pool) or {}) if of_prompts.columns_in(where) else {}
    parsed = views.expression(where, views.with_heavy(wide.clear(), Pool(), heavy, table), "condition", "where", own)
    named_heavy = [name for name in parsed.meta.root_names() if name in heavy]
    return views.with_heavy(wide, pool, named_heavy, table).filter(parsed).select(view.columns)


def _with_frozen(paths: Paths, pool: Pool) -> Pool:
    """Return the pool with the prompts of all splits, as they were frozen."""
    info = records.read(paths.info, Info, unchanged=False)
    frozen = [paths.folder / split.file for split in info.prompts.values()]
    files = tuple(path for path in (*frozen, *pool.files.get("prompts", ())) if path.is_file())
    return Pool(pool.tables, {**pool.files, "prompts": files})


def with_prompts(paths: Paths, info: Info, rows: pl.DataFrame, pool: Pool) -> pl.DataFrame:
    """Add the `messages` and `answer` of each row's prompt, wherever that prompt was frozen or made."""
    frozen = [paths.folder / split.file for split in info.prompts.values()]
    files = [path for path in (*frozen, *pool.files.get("prompts", ())) if path.is_file()]
    wanted = rows["prompt"].unique().implode()
    prompts = scan("prompts", files).select("id", "messages", "answer").filter(pl.col("id").is_in(wanted)).collect()
    unique = prompts.unique("id", keep="last", maintain_order=True).rename({"id": "prompt"})
    return rows.join(unique, on="prompt", how="left", maintain_order="left")
