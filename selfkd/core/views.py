"""The tables that recipe expressions see, made from a pool: samples with their scores, prompts with their aggregates.

Expressions are Polars SQL. Row order is never left to a group-by: everything is sorted by id or by the hashed number `tiebreak`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

import polars as pl

from selfkd.core import of_prompts
from selfkd.core.of_prompts import FUNCTIONS, Call
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
    """`text` as one Polars SQL expression; RecipeError where it is none, or where something stands behind it.

    `prompt.level` and `mean(correct)` are columns of these names (core/of_prompts.py).
    """
    sql = of_prompts.words(text).sql
    try:
        parsed = pl.sql_expr(sql)
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
        pl.sql_expr(of_prompts.words(text).sql)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return False
    return True


def names_a_column(word: str) -> bool:
    """Whether an expression reads the word as the name of a column: `null`, `true` and `select` mean something else in SQL."""
    try:
        return parse(f"{word} = 1").meta.root_names() == [word]
    except RecipeError:
        return False


def expression(text: str, table: pl.DataFrame, kind: Kind, where: str = "", own: Iterable[str] = ()) -> pl.Expr:
    """`text` as a Polars SQL expression over `table`; RecipeError where it names no column of it or gives another kind of value.

    `own` are the columns of the prompts, as far as they are known: an error says how they are written.
    """
    parsed = parse(text, where, "a condition" if kind == "condition" else "an expression")
    unknown = [name for name in parsed.meta.root_names() if name not in table.columns]
    if unknown:
        raise _no_column(unknown[0], text, table, list(own), where)
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


def _no_column(name: str, text: str, table: pl.DataFrame, own: list[str], where: str) -> RecipeError:
    if call := next((one for one in of_prompts.calls_in(text) if one.column == name), None):
        what = f"'{call.column}' in '{text}' counts the samples of each prompt, and this is asked of none"
        return RecipeError(what, where, "Columns: " + ", ".join(table.columns))
    if name in own:
        what = f"no column '{name}' in '{text}': it is one of the prompts. Did you mean '{of_prompts.PREFIX}{name}'?"
        return RecipeError(what, where)
    if name.startswith(of_prompts.PREFIX):
        known = [f"{of_prompts.PREFIX}{one}" for one in (*of_prompts.FIXED, *own)]
        return RecipeError(
            f"no prompt has the column of '{name}' in '{text}'.{did_you_mean(name, known)}",
            where,
            "There are: " + ", ".join(known),
        )
    hint = did_you_mean(name, table.columns)
    shown = [column for column in table.columns if not column.startswith(of_prompts.PREFIX)]
    fix = f"Columns: {', '.join(shown)}; those of the prompts are written {of_prompts.PREFIX}NAME"
    return RecipeError(f"no column '{name}' in '{text}'.{hint}", where, fix)


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
    """The live samples as `texts` see them: scores as columns, and where they are named heavy columns, those of prompts, and calls."""
    return with_named(with_scores(live(pool, stream), pool), pool, *texts)


def with_named(samples: pl.DataFrame, pool: Pool, *texts: str | None) -> pl.DataFrame:
    """`samples` with what `texts` name beside their columns: heavy ones, those of their prompts, and calls, which are over these samples."""
    samples = _as_named(samples, pool, texts)
    return _with_calls(samples, samples, texts, "prompt")


def _as_named(samples: pl.DataFrame, pool: Pool, texts: Sequence[str | None]) -> pl.DataFrame:
    """`samples` with the heavy columns, and those of their prompts, that expressions name."""
    samples = with_heavy(samples, pool, sorted(named_in(*texts) - set(samples.columns)))
    return of_prompts.with_columns(samples, pool, of_prompts.columns_in(*texts), "prompt")


def _with_calls(table: pl.DataFrame, samples: pl.DataFrame, texts: Sequence[str | None], key: str) -> pl.DataFrame:
    """`table` with what the calls in expressions come to for each prompt, whose id stands in `key`, over these `samples`."""
    for call in of_prompts.calls_in(*texts):
        of_all = samples.group_by("prompt").agg(_value_of(call, samples).alias(call.column)).rename({"prompt": key})
        table = table.join(of_all, on=key, how="left", maintain_order="left")
        if call.function in ("count", of_prompts.DISTINCT):
            table = table.with_columns(pl.col(call.column).fill_null(0))
    return table


_TAKES: dict[str, Kind] = {"count": "value", of_prompts.DISTINCT: "value", "max": "order", "min": "order"}


def _value_of(call: Call, samples: pl.DataFrame) -> pl.Expr:
    if call.column == "count(*)":
        return pl.len()
    if of_prompts.words(call.inside).calls:
        raise RecipeError(
            f"'{call.column}' has another one inside, and it is one value per prompt already: leave one of them out"
        )
    return FUNCTIONS[call.function](expression(call.inside, samples, _TAKES.get(call.function, "number")))


SHOWN = ("text", "teacher_messages")  # heavy columns of a sample that a template may show


def with_shown(samples: pl.DataFrame, pool: Pool, fields: Collection[str]) -> pl.DataFrame:
    """`samples` with their texts, and with what they were an answer to where a template names it (`fields`)."""
    wanted = [name for name in SHOWN if name == "text" or name in fields]
    return with_heavy(samples, pool, [name for name in wanted if name not in samples.columns])


def named_in(*texts: str | None) -> set[str]:
    """Return the columns that expressions name; none of one that cannot be read, which is for `expression` to say."""
    found: set[str] = set()
    for one in of_prompts.needed(*texts):
        try:
            found |= set(pl.sql_expr(one.sql).meta.root_names())
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
            continue
    return found


def pair_view(pairs: pl.DataFrame, view: pl.DataFrame, pool: Pool, *texts: str | None) -> pl.DataFrame:
    """`pairs` (ids chosen and rejected) with the columns of both samples as `chosen_…` and `rejected_…`, heavy ones where a text names them.

    Calls are over `view`, all samples that the pairs were made of.
    """
    names = named_in(*texts)
    for side in SIDES:
        wanted = sorted(name.removeprefix(f"{side}_") for name in names if name.startswith(f"{side}_"))
        samples = view.filter(pl.col("id").is_in(pairs[side].implode()))
        samples = with_heavy(samples, pool, [name for name in wanted if name not in view.columns])
        own = samples.rename({name: f"{side}_{name}" for name in samples.columns}).rename({f"{side}_id": side})
        pairs = pairs.join(own, on=side, how="left", maintain_order="left")
    pairs = of_prompts.with_columns(pairs, pool, of_prompts.columns_in(*texts), "prompt")
    pairs = pairs.with_columns(pl.col(side).alias(f"{side}_id") for side in SIDES)
    inside = [call.inside for call in of_prompts.calls_in(*texts) if call.inside != "*"]
    return _with_calls(pairs, _as_named(view, pool, inside) if inside else view, texts, "prompt")


def prompt_view(pool: Pool, *texts: str | None) -> pl.DataFrame:
    """The live prompts with `n` (samples so far) and, per score, `<score>_max`, `<score>_mean` and `<score>_n`; and what `texts` name.

    Calls are over all samples so far, those too that were dropped.
    """
    scored = with_scores(answers(pool), pool)
    stats = [pl.len().alias("n")]
    for name in score_names(pool):
        column = pl.col(name)
        stats += [column.max().alias(f"{name}_max"), mean(name).alias(f"{name}_mean"), column.count().alias(f"{name}_n")]
    grouped = scored.group_by("prompt").agg(stats).rename({"prompt": "id"})
    counts = [pl.col(column).fill_null(0) for column in grouped.columns if column == "n" or column.endswith("_n")]
    prompts = live_prompts(pool).join(grouped, on="id", how="left").with_columns(counts).sort("id")
    prompts = of_prompts.with_columns(prompts, pool, of_prompts.columns_in(*texts), "id")
    inside = [call.inside for call in of_prompts.calls_in(*texts) if call.inside != "*"]
    return _with_calls(prompts, _as_named(scored, pool, inside), texts, "id").sort("id")


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
