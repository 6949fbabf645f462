"""The tables that recipe expressions see, made from a pool: samples with their scores, prompts with their aggregates.

Expressions are Polars SQL. Row order is never left to a group-by: everything is sorted by id or by the hashed number `tiebreak`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import polars as pl

from selfkd.core.pool import HEAVY, Pool
from selfkd.core.wording import did_you_mean, first_line
from selfkd.errors import RecipeError

SIDES = ("chosen", "rejected")  # of a pair; each has the columns of its sample, under this prefix
Kind = Literal["condition", "number", "order", "value"]

# What an expression of each kind must give: whether a type will do, and how an error says it.
_WANTED: dict[Kind, tuple[Callable[[pl.DataType], bool], str]] = {
    "condition": (lambda kind: kind == pl.Boolean, "true or false: compare it with something, such as tokens < 100"),
    "number": (lambda kind: kind.is_numeric() or kind == pl.Boolean, "a number"),
    "order": (lambda kind: not kind.is_nested() and kind != pl.Null, "a number or a text to order by"),
    "value": (lambda kind: kind != pl.Null, "a value"),
}


# What may be missing at the end of an expression, as an error says it.
_ENDS = {" 1": "something", ")": "a ')'", " 1)": "something and a ')'", "'": "a quote (')"}
_UNREAD = re.compile(r"unable to parse .* as Expr$", re.DOTALL)
_PREFIX = re.compile(r"^(sql parser error: |invalid expression )")


def parse(text: str, where: str = "", what: str = "an expression") -> pl.Expr:
    """`text` as one Polars SQL expression; RecipeError where it is none, or where something stands behind it."""
    try:
        parsed = pl.sql_expr(text)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise RecipeError(f"'{text}' is not {what} that SQL can read{_why_unread(text, error)}", where) from None
    if parsed.meta.has_multiple_outputs():
        raise RecipeError(f"'{text}' names several columns at once", where, "Name one column.")
    if not parsed.meta.eq(parsed.meta.undo_aliases()):  # SQL reads `a = 1 b = 2`'s first word behind a value as its new name
        name = parsed.meta.output_name()
        raise RecipeError(f"'{text}' is followed by '{name}', which says nothing", where, "Is an AND or OR missing?")
    return parsed


def _why_unread(text: str, error: BaseException) -> str:
    """Return what is wrong with an expression and where, as far as that is known; Polars says of most only that it cannot be read."""
    if missing := next((said for more, said in _ENDS.items() if _reads(text + more)), ""):
        return f": {missing} is missing at its end"
    if _UNREAD.search(str(error)):
        return ""
    return f": {_PREFIX.sub('', first_line(error)).strip('()')}"


def _reads(text: str) -> bool:
    try:
        pl.sql_expr(text)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return False
    return True


def names_a_column(word: str) -> bool:
    """Whether an expression reads the word as the name of a column: `null`, `true` and `select` mean something else in SQL."""
    try:
        return parse(f"{word} = 1").meta.root_names() == [word]
    except RecipeError:
        return False


def expression(text: str, table: pl.DataFrame, kind: Kind, where: str = "") -> pl.Expr:
    """`text` as a Polars SQL expression over `table`; RecipeError where it names no column of it or gives another kind of value."""
    parsed = parse(text, where, "a condition" if kind == "condition" else "an expression")
    unknown = [name for name in parsed.meta.root_names() if name not in table.columns]
    if unknown:
        hint = did_you_mean(unknown[0], table.columns)
        raise RecipeError(f"no column '{unknown[0]}' in '{text}'.{hint}", where, "Columns: " + ", ".join(table.columns))
    try:
        given = table.clear().select(parsed).dtypes[0]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise RecipeError(f"'{text}' cannot be computed: {first_line(error)}", where) from None
    if kind == "condition" and given == pl.Null:
        return parsed.cast(pl.Boolean)  # never true
    fits, wanted = _WANTED[kind]
    if not fits(given):
        raise RecipeError(f"'{text}' gives {_in_words(given)}, where {wanted.partition(':')[0]} is wanted", where, _fix(wanted))
    return parsed


def _fix(wanted: str) -> str:
    advice = wanted.partition(": ")[2]
    return advice[:1].upper() + advice[1:] + "." if advice else ""


def _in_words(kind: pl.DataType) -> str:
    if kind.is_numeric():
        return "a number"
    return {pl.String: "a text", pl.Boolean: "true or false", pl.Null: "nothing"}.get(type(kind), "a list or a structure")


def answers(pool: Pool, stream: str | None = None) -> pl.DataFrame:
    """The samples of a stream; without one, all but those that are aside: judgments are samples, and no answers."""
    return pool.samples.filter(~pl.col("aside").fill_null(False) if stream is None else pl.col("stream") == stream)


def live(pool: Pool, stream: str | None = None) -> pl.DataFrame:
    """Samples (light columns, sorted by id) that no step dropped, whose prompt no step dropped; of one stream, or all `answers`."""
    samples = answers(pool, stream)
    gone = pool.drops.filter(pl.col("stream").is_not_null()).select("id")
    prompts = pool.drops.filter(pl.col("stream").is_null()).select(prompt="id")
    return samples.join(gone, on="id", how="anti").join(prompts, on="prompt", how="anti").sort("id")


def live_prompts(pool: Pool) -> pl.DataFrame:
    gone = pool.drops.filter(pl.col("stream").is_null()).select("id")
    return pool.prompts.join(gone, on="id", how="anti").sort("id")


def score_names(pool: Pool) -> list[str]:
    """Return the names of all scores that were given, also of those that no sample has."""
    return sorted({*pool.scores["name"].unique(), *pool.scores_named})


def with_scores(samples: pl.DataFrame, pool: Pool) -> pl.DataFrame:
    """One column per score, the weighted mean of its draws; null where a sample has none that counts, or could not be scored."""
    for name in score_names(pool):
        values = pool.scores.filter((pl.col("name") == name) & pl.col("value").is_not_null())
        if values["sample"].n_unique() < values.height or (values["weight"] != 1.0).any():
            values = values.group_by("sample").agg(_weighted_mean(values)).filter(pl.col("value").is_not_nan())
        samples = samples.join(values.select(pl.col("value").alias(name), id="sample"), on="id", how="left")
    return samples.sort("id")


def _weighted_mean(values: pl.DataFrame) -> pl.Expr:
    """The mean of `value` by `weight`; not a number where nothing has weight. Equal weights are a plain mean, digit by digit."""
    if not (values["weight"] != 1.0).any():
        return mean("value")
    whole = (pl.col("value") * pl.col("weight")).sort().sum() / pl.col("weight").sort().sum()
    return whole.clip(pl.col("value").min(), pl.col("value").max()).alias("value")  # rounding must not leave the range


def mean(column: str) -> pl.Expr:
    """The mean of a group's values, added up in their order: left to itself, its last digit depends on the number of threads."""
    return pl.col(column).sort().mean()


def with_heavy(samples: pl.DataFrame, pool: Pool, names: Sequence[str], table: str = "samples") -> pl.DataFrame:
    """`samples` (or prompts) with heavy columns read from disk for just these rows, in the same order."""
    wanted = [name for name in names if name in HEAVY[table]]
    if not wanted:
        return samples
    found = pool.scan(table).select("id", *wanted).filter(pl.col("id").is_in(samples["id"].implode())).collect()
    return samples.join(found, on="id", how="left", maintain_order="left")


def sample_view(pool: Pool, stream: str | None, *texts: str | None) -> pl.DataFrame:
    """The live samples as expressions see them: scores as columns, and a heavy column where one of `texts` names it."""
    return with_heavy(with_scores(live(pool, stream), pool), pool, sorted(named_in(*texts)))


SHOWN = ("text", "teacher_messages")  # heavy columns of a sample that a template may show


def with_shown(samples: pl.DataFrame, pool: Pool, fields: Collection[str]) -> pl.DataFrame:
    """`samples` with their texts, and with what they were an answer to where a template names it (`fields`)."""
    wanted = [name for name in SHOWN if name == "text" or name in fields]
    return with_heavy(samples, pool, [name for name in wanted if name not in samples.columns])


def named_in(*texts: str | None) -> set[str]:
    """Return the columns that expressions name; none of one that cannot be read, which is for `expression` to say."""
    found: set[str] = set()
    for text in texts:
        try:
            found |= set(pl.sql_expr(text).meta.root_names()) if text else set()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
            continue
    return found


def pair_view(pairs: pl.DataFrame, view: pl.DataFrame, pool: Pool, *texts: str | None) -> pl.DataFrame:
    """`pairs` (ids chosen and rejected) with the columns of both samples as `chosen_…` and `rejected_…`, heavy ones where a text names them."""
    names = named_in(*texts)
    for side in SIDES:
        wanted = sorted(name.removeprefix(f"{side}_") for name in names if name.startswith(f"{side}_"))
        samples = view.filter(pl.col("id").is_in(pairs[side].implode()))
        samples = with_heavy(samples, pool, [name for name in wanted if name not in view.columns])
        own = samples.rename({name: f"{side}_{name}" for name in samples.columns}).rename({f"{side}_id": side})
        pairs = pairs.join(own, on=side, how="left", maintain_order="left")
    return pairs.with_columns(pl.col(side).alias(f"{side}_id") for side in SIDES)


def prompt_view(pool: Pool) -> pl.DataFrame:
    """The live prompts with `n` (samples so far) and, per score, `<score>_max`, `<score>_mean` and `<score>_n`."""
    scored = with_scores(answers(pool), pool)
    stats = [pl.len().alias("n")]
    for name in score_names(pool):
        column = pl.col(name)
        stats += [column.max().alias(f"{name}_max"), mean(name).alias(f"{name}_mean"), column.count().alias(f"{name}_n")]
    grouped = scored.group_by("prompt").agg(stats).rename({"prompt": "id"})
    counts = [pl.col(column).fill_null(0) for column in grouped.columns if column == "n" or column.endswith("_n")]
    return live_prompts(pool).join(grouped, on="id", how="left").with_columns(counts).sort("id")


def columns(pool: Pool) -> dict[str, list[str]]:
    """Return the columns that expressions may use over this pool, by table: samples, prompts and pairs."""
    samples = [*sample_view(pool, None).columns, *HEAVY["samples"]]
    pairs = [f"{side}_{name}" for side in SIDES for name in samples]
    return {"samples": samples, "prompts": prompt_view(pool).columns, "pairs": pairs}


def funnel(pool: Pool) -> list[tuple[str, int]]:
    """What became of the samples: (stage or reason, count), from made to kept."""
    rows = [("prompts", pool.prompts.height), ("samples", answers(pool).height)]
    aside = pool.samples.filter(pl.col("aside").fill_null(False)).select("id")
    dropped = pool.drops.join(aside, on="id", how="anti").group_by("step", "reason").len().sort("step", "reason")
    rows += [(f"dropped by {step}: {reason}", count) for step, reason, count in dropped.iter_rows()]
    return [*rows, ("kept", live(pool).height)]


def funnel_text(pool: Pool) -> str:
    stages = funnel(pool)
    width = max(len(stage) for stage, _ in stages)
    return "\n".join(f"{stage.ljust(width)}  {count}" for stage, count in stages)
