"""Rows of a round for a reader: what was asked, what was answered, what it scored, whether it was kept and if not, why.

Reads commits and tables of a run folder; knows nothing of how they were made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from selfkd.core import views
from selfkd.core.pool import Pool, light
from selfkd.errors import ChainError, UsageError
from selfkd.prompts.templates import text_of
from selfkd.report import status

CUT = 2000  # characters of one text; a reward loop's thousandth line tells nobody more than its hundredth


@dataclass(frozen=True)
class Shown:
    """Rows ready to print: how many matched, in how many, and the first of them with their texts."""

    title: str
    total: int
    matched: int
    rows: list[dict[str, Any]]
    scores: Sequence[str] = ()


def samples(folder: Path, round: int | None = None, step: str | None = None, where: str | None = None, n: int = 5) -> Shown:
    """The first `n` samples, by prompt, of a round (default: the newest with samples), one step of it, or those `where` holds.

    `where` sees every column of the sample table, the scores, and `kept` and `why` (which step dropped it, and its reason).
    """
    index, commits = _round(folder, round, "samples", step)
    made = [commit for commit in commits if "samples" in commit["tables"] and (step is None or commit["step"] == step)]
    outside = all(commit["outside"] for commit in made)
    pool = _pool(folder, made if outside else [commit for commit in commits if not commit["outside"]])
    view = views.with_scores(_light(folder, "samples", made) if step else pool.samples, pool)
    view = _marked(view, pool, outside)
    matched = _matching(view, pool, where, "samples")
    first = views.with_heavy(matched.sort("prompt", "number", "id").head(n), pool, ["text", "asked"])
    rows = _with_prompts(folder, first, pool)
    scores = views.score_names(pool)
    return Shown(_title(index, step, where), view.height, matched.height, rows, scores)


def training_rows(
    folder: Path, round: int | None = None, step: str | None = None, where: str | None = None, n: int = 5
) -> Shown:
    """The rows a model was trained on; `where` sees the columns of the row table (kind, stream, role, weight, chosen, …)."""
    index, commits = _round(folder, round, "rows", step)
    made = [commit for commit in commits if "rows" in commit["tables"] and (step is None or commit["step"] == step)]
    pool = _pool(folder, made)
    view = pool.rows.sort("id")
    matched = _matching(view, pool, where, "rows")
    first = views.with_heavy(matched.head(n), pool, ["messages", "chosen", "rejected"], "rows")
    return Shown(_title(index, step, where, "training rows"), view.height, matched.height, first.to_dicts())


def _round(folder: Path, round: int | None, table: str, step: str | None) -> tuple[int, list[dict[str, Any]]]:
    """The commits of the round asked for, or of the newest one that holds such a table; UsageError says what there is."""
    status.run_json(folder)
    known = {int(path.name.rsplit("-", 1)[1]): status.step_commits(path) for path in status.round_folders(folder)}
    if round is not None and round not in known:
        listed = "Rounds: " + ", ".join(map(str, known)) if known else "No round has begun."
        raise UsageError(f"there is no round {round}", str(folder), listed)
    candidates = [round] if round is not None else sorted(known, reverse=True)
    inside = [
        index for index in candidates if any(_holds(commit, table, step) and not commit["outside"] for commit in known[index])
    ]
    any_ = [index for index in candidates if any(_holds(commit, table, step) for commit in known[index])]
    if not any_:
        steps = sorted({commit["step"] for index in candidates for commit in known[index] if table in commit["tables"]})
        fix = f"Steps with {table}: {', '.join(steps)}" if steps else "Nothing of that kind was made yet: selfkd status"
        what = f"no {table} in {f'round {round}' if round is not None else 'any round'}" + (f", step '{step}'" if step else "")
        raise UsageError(what, str(folder), fix)
    chosen = (inside or any_)[0]
    return chosen, known[chosen]


def _holds(commit: Mapping[str, Any], table: str, step: str | None) -> bool:
    return table in commit["tables"] and (step is None or commit["step"] == step)


def _pool(folder: Path, commits: Sequence[Mapping[str, Any]]) -> Pool:
    """What these commits added, light columns in memory; tables whose files are gone are an error that names one."""
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
    """`kept` (null for a held-out answer), and `why`: the first step that dropped the sample or its prompt, with the reason."""
    drops = pool.drops.with_columns(why=pl.format("{}: {}", "step", "reason"))
    own = drops.filter(pl.col("stream").is_not_null()).group_by("id", maintain_order=True).agg(pl.col("why").first())
    prompts = drops.filter(pl.col("stream").is_null()).group_by("id", maintain_order=True).agg(prompt_why=pl.col("why").first())
    marked = view.join(own, on="id", how="left").join(prompts.rename({"id": "prompt"}), on="prompt", how="left")
    marked = marked.with_columns(why=pl.coalesce("why", "prompt_why")).drop("prompt_why")
    return marked.with_columns(kept=pl.lit(None, pl.Boolean) if outside else pl.col("why").is_null())


def _matching(view: pl.DataFrame, pool: Pool, where: str | None, table: str) -> pl.DataFrame:
    """Rows for which `where` holds; heavy columns are read only if it names them."""
    if not where:
        return view
    heavy = [name for name in Pool().scan(table).collect_schema().names() if name not in view.columns]
    parsed = views.expression(where, [*view.columns, *heavy], "--where")
    named = [name for name in parsed.meta.root_names() if name in heavy]
    with_texts = views.with_heavy(view, pool, named, table)
    return with_texts.filter(parsed).select(view.columns)


def _with_prompts(folder: Path, rows: pl.DataFrame, pool: Pool) -> list[dict[str, Any]]:
    """Each row as a dict with the `messages` and `answer` of its prompt, wherever that prompt was frozen or made."""
    frozen = [folder / split["file"] for split in status.run_json(folder)["prompts"].values()]
    sources = [pl.scan_parquet(path) for path in (*frozen, *pool.files.get("prompts", ())) if path.is_file()]
    wanted = rows["prompt"].unique().to_list()
    found = [source.filter(pl.col("id").is_in(wanted)).select("id", "messages", "answer").collect() for source in sources]
    known = {row["id"]: row for frame in found for row in frame.iter_rows(named=True)}
    return [{**known.get(row["prompt"], {}), **row} for row in rows.iter_rows(named=True)]


def _title(index: int, step: str | None, where: str | None, noun: str = "samples") -> str:
    return f"round {index}" + (f" · {step}" if step else "") + f" · {noun}" + (f" where {where}" if where else "")


# ---------------------------------------------------------------------------------------------------------------- printing


def show(shown: Shown, to: Console) -> None:
    """One panel per row, with a head line that says how many there are in all."""
    to.print(Text(f"{shown.title}: {shown.matched} of {shown.total}, showing {len(shown.rows)}", "bold"))
    for row in shown.rows:
        to.print(_row_panel(row) if "kind" in row else _sample_panel(row, shown.scores))


def _sample_panel(row: Mapping[str, Any], scores: Sequence[str]) -> Panel:
    parts: list[Any] = [_field("prompt", _last_user(row.get("messages")))]
    if row.get("asked") and row.get("messages") and row["asked"] != row["messages"]:
        parts.append(_field("asked", _told(row["asked"])))  # the teacher was told more than the student
    if row.get("answer") is not None:
        parts.append(_field("answer", row["answer"]))
    parts += [Rule(style="dim"), Text(_cut(row["text"]))]
    values = "   ".join(f"{name} {_number(row.get(name))}" for name in scores)
    verdict = _verdict(row)
    length = f"{row['tokens']} tokens, {'cut at the limit' if row['finish'] == 'length' else row['finish']}"
    foot = Text(f"{values}   " if values else "").append(verdict).append(f"   {length}   {row['model']}", "dim")
    return Panel(
        Group(*parts, Rule(style="dim"), foot), title=f"{row['stream']} {row['id']}", title_align="left", border_style="dim"
    )


def _verdict(row: Mapping[str, Any]) -> Text:
    if row["kept"] is None:
        return Text("held out")
    return Text("kept", "green") if row["kept"] else Text(f"dropped by {row['why']}", "yellow")


def _row_panel(row: Mapping[str, Any]) -> Panel:
    parts: list[Any] = [_field(message["role"], message["content"]) for message in row["messages"] or ()]
    parts += [Rule(style="dim"), _field("chosen" if row["rejected"] is not None else "completion", row["chosen"])]
    if row["rejected"] is not None:
        parts.append(_field("rejected", row["rejected"]))
    ended = "" if row["chosen_ended"] else "   not ended: no end token to learn"
    foot = f"{row['role']}   weight {_number(row['weight'])}   from {', '.join(row['samples'] or ()) or 'no sample'}{ended}"
    parts += [Rule(style="dim"), Text(foot, "dim")]
    return Panel(Group(*parts), title=f"{row['kind']} {row['id']}", title_align="left", border_style="dim")


def _field(name: str, text: Any) -> Text:
    return Text(f"{name}: ", "dim").append(Text(_cut(str(text)), ""))


def _last_user(messages: Sequence[Mapping[str, str]] | None) -> str:
    return text_of(messages or ()) or json.dumps(messages, ensure_ascii=False)


def _told(asked: Sequence[Mapping[str, str]]) -> str:
    """All that a teacher saw: its one message, or every turn with its role."""
    return _last_user(asked) if len(asked) == 1 else "\n".join(f"[{turn['role']}] {turn['content']}" for turn in asked)


def _cut(text: str | None) -> str:
    if text is None:
        return ""
    return text if len(text) <= CUT else f"{text[:CUT]} … ({len(text) - CUT} more characters)"


def _number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.4g}"
