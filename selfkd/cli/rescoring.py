"""What `selfkd score` does, from its arguments to an exit code. A docstring here is the text of `selfkd help score`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from selfkd.chain.paths import find_run
from selfkd.cli import answers
from selfkd.cli.commands import RUNS

if TYPE_CHECKING:
    from selfkd.report.rescore import Rescored


def score(run: Path, function: str, name: str | None, index: int | None, n: int, as_json: bool = False) -> int:
    """Score the stored samples of a round by another function, and show what would have been kept. Nothing is written.

    The steps behind the score are walked again over the round's own tables; no model is asked.
    """
    from selfkd.chain.run import Run
    from selfkd.report.rescore import rescore
    from selfkd.rewards.find import find_function

    opened, found = Run.at(find_run(run, RUNS)), find_function(function, [Path.cwd()])
    result = rescore(opened, found, name or found.name, index)
    if as_json:
        about = {part: getattr(result, part) for part in ("name", "function", "index")}
        means = {column: result.mean(column) for column in ("was", "now")}
        return answers.told("score", {**about, "mean": means, "rows": result.rows.to_dicts()})
    print("\n".join(_told(result)))
    _show(opened, result, n)
    return 0


def _told(found: Rescored) -> Iterator[str]:
    """Yield the lines of the comparison: means, what is kept, how many samples changed, and how many could not be scored."""
    import polars as pl

    was, now = (_number(found.mean(column)) for column in ("was", "now"))
    kept = [int(found.rows[column].sum()) for column in ("kept_was", "kept_now")]
    yield f"round {found.index}, '{found.name}' by {found.function} instead: {found.rows.height} samples"
    yield f"  mean     {was:>8}  →  {now}"
    yield f"  kept     {kept[0]:>8}  →  {kept[1]}"
    yield f"  changed  {found.changed.height:>8} values, {found.moved.height} verdicts"
    if found.as_it_was:
        yield f"  not run again: {', '.join(found.as_it_was)}; what was made there of the scores is as it was"
    failed = found.rows.filter(pl.col("now").is_null())
    if failed.height:
        yield f"  unscored {failed.height:>8}   first: {failed['why'][0]}"


def _show(opened: object, found: Rescored, n: int) -> None:
    """Print the first samples whose verdict would be another."""
    import polars as pl

    from selfkd.chain.run import Run
    from selfkd.report import rows
    from selfkd.report.panels import print_rows
    from selfkd.report.tables import console

    assert isinstance(opened, Run)
    for title, kept in (("kept, and would not be", True), ("would be kept, and was not", False)):
        moved = found.moved.filter(pl.col("kept_was") == kept)
        if moved.height:
            print(f"\n{moved.height} {title}:")
            ids = ", ".join(f"'{one}'" for one in moved["id"].head(n))
            print_rows(rows.samples(opened.folder, found.index, None, f"id IN ({ids})", n), console())


def _number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.3g}"
