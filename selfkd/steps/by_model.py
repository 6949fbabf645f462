"""How a score step is scored by a model: one of the chain's own, by its log-probabilities, or one that reads and writes nothing.

Which words belong to which kind of model is a table here; what is shown to it, and what its numbers come to, is in model_texts.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import polars as pl

from selfkd.backend.reading import TEXTS, Kind, Reading
from selfkd.core import views
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Model, Pool, shape
from selfkd.steps.context import Context, Row
from selfkd.steps.judged import score_row
from selfkd.steps.model_texts import (
    SCORED,
    Outcome,
    Texts,
    Words,
    answers,
    both_orders,
    conversations,
    of_logprob,
    of_read,
    score_rows,
    to_compare,
    to_score,
    verdict,
)

# What gives a score: one of these fields. Those of a role of the chain, and those of a model of others, by the default name of the score.
BY_ROLE = {"logprob": "logprob_of", "entropy": "entropy", "certainty": "certainty"}
BY_SCORER: dict[str, tuple[Kind, str]] = {
    "classifier": ("label", "rating"),
    "pairwise": ("pair", "wins"),
    "per_step": ("steps", "steps"),
}
SOURCES = ("reward", *BY_ROLE, *BY_SCORER, "elo", "shuffled", "value")
# Which of them a field belongs to, of those that not all of them have.
OWNERS = {
    "template": ("logprob", "entropy", "certainty", "classifier", "per_step"),
    **dict.fromkeys(("target", "given"), ("logprob",)),
    **dict.fromkeys(("text", "second"), ("classifier", "pairwise")),
    "label": tuple(BY_SCORER),
    "pairs": ("pairwise",),
    **dict.fromkeys(("step", "mark", "good", "bad"), ("per_step",)),
    "reduce": ("logprob", "per_step"),
    **dict.fromkeys(("params", "timeout"), ("reward",)),
}
REDUCES = {"logprob": ("sum", "mean", "probability"), "per_step": ("min", "product", "last", "mean")}


class Scoring(Protocol):
    """What a score step says of its model; its templates are read by their names."""

    @property
    def source(self) -> str: ...

    @property
    def of(self) -> str | None: ...

    @property
    def label(self) -> str | int | None: ...

    @property
    def pairs(self) -> int | None: ...

    @property
    def step(self) -> str | None: ...

    @property
    def mark(self) -> str | None: ...

    @property
    def good(self) -> str | None: ...

    @property
    def bad(self) -> str | None: ...

    @property
    def reduce(self) -> str | None: ...

    def scores(self) -> list[str]: ...

    def models(self) -> dict[str, ModelRef]: ...

    def unscored(self, pool: Pool, name: str) -> pl.DataFrame: ...

    def check(self, done: int, failed: int, total: int, outcomes: Sequence[Outcome], context: Context) -> None: ...


def by_model(step: Scoring, pool: Pool, context: Context) -> pl.DataFrame:
    """Return the score rows that a model gives the live samples that have none yet."""
    ways = {"logprob": _by_logprob, "pairwise": _by_pairs}
    return ways.get(step.source, _by_reading)(step, pool, context)


def _by_logprob(step: Scoring, pool: Pool, context: Context) -> pl.DataFrame:
    unscored, model = step.unscored(pool, step.scores()[0]), context.model(step.models()["logprob"])
    words, texts = _words(step, unscored, pool, context), Texts()
    if step.reduce == "probability" or words != Words():
        texts = to_score(*answers(unscored, pool), words, "probability" if step.reduce == "probability" else "")
        rows = pl.DataFrame(texts.rows, schema=SCORED)
    else:
        samples = views.with_heavy(unscored, pool, ["text", "token_ids"])
        messages = views.with_heavy(pool.prompts, pool, ["messages"], "prompts").select(prompt="id", messages="messages")
        rows = samples.join(messages, on="prompt", how="left", maintain_order="left")
    per_token = (step.reduce or "sum") != "sum"
    found = ((one[0], of_logprob(one, per_token, context.max_length)) for one in context.logprobs(model, rows))
    return _scored(step, unscored, texts.why, found, context)


def _words(step: Scoring, unscored: pl.DataFrame, pool: Pool, context: Context) -> Words:
    """Return the templates of this step, ready to use; those of pairwise have defaults, and must show both answers."""
    of = views.with_heavy(views.with_scores(unscored, pool), pool, ["text", "token_ids"]).columns
    compares = step.source == "pairwise"
    own = {"text": "{{ of.text }}", "second": "{{ other.text }}"} if compares else {}
    shows = {"text": {"of": "the answer that comes first"}, "second": {"other": "the one that it is compared with"}}
    named = {name: getattr(step, name) or own.get(name) for name in ("template", "target", "given", "text", "second")}
    return Words(
        **{
            name: context.template(name, reference, of, shows.get(name) if compares else None)
            for name, reference in named.items()
            if reference
        }
    )


def reading_of(step: Scoring, context: int = 0) -> Reading:
    """Return how a model is to read for a step; `context` is what one of the chain's own takes."""
    kind = BY_SCORER[step.source][0] if step.source in BY_SCORER else step.source
    separator = step.step or "\n"
    words = {"separator": separator, "mark": step.mark or separator, "good": step.good or "", "bad": step.bad or ""}
    return Reading(kind, step.label, **words, context=0 if step.source in BY_SCORER else context)  # type: ignore[arg-type]


def _reader(step: Scoring, reading: Reading, context: Context) -> Model:
    if step.source in BY_SCORER:
        return context.scorer(step.source, getattr(step, step.source), reading)
    return context.model(step.models()[step.source])


def _by_reading(step: Scoring, pool: Pool, context: Context) -> pl.DataFrame:
    unscored, reading = step.unscored(pool, step.scores()[0]), reading_of(step, context.max_length)
    model, words = _reader(step, reading, context), _words(step, unscored, pool, context)
    texts = conversations(*answers(unscored, pool), words)
    found = context.read(model, reading, pl.DataFrame(texts.rows, schema=TEXTS)) if texts.rows else iter(())
    read = ((one.id, of_read(one, step.reduce or "min")) for one in found)
    return _scored(step, unscored, texts.why, read, context)


def _by_pairs(step: Scoring, pool: Pool, context: Context) -> pl.DataFrame:
    """Return two rows per comparison, one for each of its answers: its chance to be the better one, by what both orders say."""
    name, reading = step.scores()[0], reading_of(step, context.max_length)
    live = views.live(pool, step.of)
    model, words = _reader(step, reading, context), _words(step, live, pool, context)
    there = pool.scores.filter((pl.col("name") == name) & pl.col("versus").is_not_null())
    samples, prompts = answers(live, pool)
    pairs = list(to_compare(samples, set(there.select("sample", "versus").iter_rows()), step.pairs))
    texts = both_orders(pairs, prompts, words)
    rows = pl.DataFrame(texts.rows, schema=TEXTS)
    found = context.read(model, reading, rows) if texts.rows else iter(())
    read = {one.id: of_read(one, "last") for one in found} | {name: (None, why) for name, why in texts.why.items()}
    verdicts = [verdict(read[str(2 * at)], read[str(2 * at + 1)]) for at in range(len(pairs))]
    step.check(len(pairs), sum(value is None for value, _ in verdicts), len(pairs), verdicts, context)
    scored = [side for pair, one in zip(pairs, verdicts, strict=True) for side in _sides(pair, name, one)]
    return shape("scores", scored)


def _scored(
    step: Scoring, unscored: pl.DataFrame, why: Mapping[str, str], found: Iterable[tuple[str, Outcome]], context: Context
) -> pl.DataFrame:
    """Return the score rows of all samples, those that could not be asked about included, in their order."""
    outcomes: dict[str, Outcome] = {sample: (None, reason) for sample, reason in why.items()}
    failed, first = len(why), next(iter(why.values()), "")
    for sample, outcome in found:
        outcomes[sample] = outcome
        if outcome[0] is None:
            failed, first = failed + 1, first or outcome[1]
            step.check(len(outcomes), failed, unscored.height, [(None, first)], context)
    step.check(len(outcomes), failed, unscored.height, [(None, first)], context)
    known = [sample for sample in unscored["id"] if sample in outcomes]
    return score_rows(known, step.scores()[0], [outcomes[sample] for sample in known])


def _sides(pair: tuple[Row, Row], name: str, verdict: Outcome) -> Iterator[Row]:
    """Yield the score rows of both answers of a comparison."""
    (one, other), (value, why) = pair, verdict
    yield score_row(one["id"], name, value, why, versus=other["id"])
    yield score_row(other["id"], name, None if value is None else 1.0 - value, why, versus=one["id"])
