"""What a score step has a model read of each answer, and what becomes of what it says. Asks nobody; a failure is a reason.

A model that scores sees prompt and answer, or what templates make of them. What it says is a number per text, or one per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from selfkd.backend.base import Logprob
from selfkd.backend.reading import TEXTS, Read
from selfkd.core import views
from selfkd.core.pool import Pool, shape
from selfkd.errors import UsageError
from selfkd.steps.ask import ring
from selfkd.steps.context import Messages, Render, Row

Outcome = tuple[float | None, str]
NOTHING = "there are no tokens to score"
NOTHING_BEFORE = "nothing stands before its first token: the model sees an empty prompt"
NO_GOLD = "the prompt has no gold answer to show"
OTHER_BEGINNING = "the answer does not begin with what `given` says"
SIGNS = ("0", "1")  # stand for a gold answer that is not there, to see whether a template shows it, or something made of it
STEPS: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda values: values[-1],
    "mean": lambda values: math.fsum(values) / len(values),
}


@dataclass(frozen=True)
class Words:
    """The templates of a step, ready to use: what the model sees in place of the last user message, and what texts are made of."""

    template: Render | None = None
    target: Render | None = None
    given: Render | None = None
    text: Render | None = None
    second: Render | None = None

    def messages(self, prompt: Row, of: Row) -> Messages:
        messages = list(prompt["messages"])
        return self.template(prompt, messages, of=of) if self.template else messages


@dataclass
class Texts:
    """What is to be read, as rows of a table; `why` says of each text that cannot be made what kept it from that."""

    rows: list[Row] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, named: Iterable[tuple[str, Any]], make: Callable[[str, Any], Row]) -> Texts:
        """Make a row of each (id, what it is made of); a template may not fit one, and a gold answer may not be there."""
        texts = cls()
        for name, one in named:
            try:
                texts.rows.append(make(name, one))
            except UsageError as error:
                texts.why[name] = str(error)
        return texts


def written(render: Render, prompt: Row, of: Row, **more: Any) -> str:
    """Return what a template makes of a sample; UsageError where it shows a gold answer and the prompt has none."""
    if prompt["answer"] is None and len({_text(render, {**prompt, "answer": sign}, of, **more) for sign in SIGNS}) > 1:
        raise UsageError(NO_GOLD)
    return _text(render, prompt, of, **more)


def _text(render: Render, prompt: Row, of: Row, **more: Any) -> str:
    return str(render(prompt, [{"role": "user", "content": ""}], of=of, **more)[-1]["content"])


# ---- which answers ----


def answers(unscored: pl.DataFrame, pool: Pool) -> tuple[list[Row], dict[str, Row]]:
    """Return samples with their texts and scores, and their prompts by id, as templates are given both."""
    found = views.with_heavy(views.with_scores(unscored, pool), pool, ["text", "token_ids"])
    asked = pool.prompts.filter(pl.col("id").is_in(found["prompt"].unique().implode()))
    prompts = views.with_heavy(asked, pool, ["messages", "meta"], "prompts").unique("id", keep="first")
    return list(found.iter_rows(named=True)), {row["id"]: row for row in prompts.iter_rows(named=True)}


# ---- log-probabilities ----


def to_score(samples: Sequence[Row], prompts: Mapping[str, Row], words: Words, sums: str) -> Texts:
    """Return rows of which a model is asked for the log-probability: of the answer, or of what `target` makes of it."""
    return Texts.of(_by_id(samples), lambda _, of: _to_score(prompts[of["prompt"]], of, words, sums))


def _by_id(samples: Sequence[Row]) -> list[tuple[str, Row]]:
    return [(of["id"], of) for of in samples]


def _to_score(prompt: Row, of: Row, words: Words, sums: str) -> Row:
    own = words.target is None
    text = of["text"] if words.target is None else written(words.target, prompt, of)
    given = written(words.given, prompt, of) if words.given else ""
    if not text.startswith(given):
        raise UsageError(OTHER_BEGINNING)
    return {
        "id": of["id"],
        "messages": words.messages(prompt, of),
        "text": text,
        "token_ids": of["token_ids"] if own else None,
        "finish_reason": of["finish_reason"] if own else "length",  # a text of others has no end that somebody drew
        "given": given,
        "sums": sums,
    }


SCORED = {name: kind for name, kind in TEXTS.items() if name != "second"} | {"given": pl.String, "sums": pl.String}


def of_logprob(found: Logprob, per_token: bool, context: int) -> Outcome:
    """Return a log-probability as a score: the sum over tokens, or per token; None with the reason where there is none."""
    _, value, tokens = found
    if not math.isfinite(value):
        if math.isnan(value) and tokens > context:
            return None, f"it has {tokens:,} tokens with its prompt, and the context holds {context:,}"
        return None, NOTHING_BEFORE if math.isnan(value) and not tokens else f"log-probability {value}"
    if not tokens:
        return None, NOTHING
    return (value / tokens if per_token else value), ""


# ---- texts that are read ----


def conversations(samples: Sequence[Row], prompts: Mapping[str, Row], words: Words) -> Texts:
    """Return texts that are a prompt and an answer each; or, with templates of their own, one text or two."""
    return Texts.of(_by_id(samples), lambda _, of: _conversation(prompts[of["prompt"]], of, words))


def _conversation(prompt: Row, of: Row, words: Words) -> Row:
    if words.text:
        second = written(words.second, prompt, of) if words.second else None
        return _row(of["id"], written(words.text, prompt, of), second)
    ids, finished = of["token_ids"], of["finish_reason"]
    return {
        **_row(of["id"], of["text"], None),
        "messages": words.messages(prompt, of),
        "token_ids": ids,
        "finish_reason": finished,
    }


def _row(name: str, text: str, second: str | None) -> Row:
    return {"id": name, "messages": None, "text": text, "second": second, "token_ids": None, "finish_reason": None}


def of_read(found: Read, reduce: str) -> Outcome:
    """Return what was read as a score: the one value, or what its steps come to."""
    return (None, found.why) if found.why else (STEPS[reduce](found.values), "")


# ---- two answers to a prompt ----


def to_compare(samples: Iterable[Row], known: set[tuple[str, str]], most: int | None) -> Iterator[tuple[Row, Row]]:
    """Yield the answers of each prompt two by two that were not compared yet, at most so many pairs of a prompt."""
    for rows in by_prompt(samples).values():
        yield from ((one, other) for one, other in ring(rows, most) if (one["id"], other["id"]) not in known)


def by_prompt(samples: Iterable[Row]) -> dict[str, list[Row]]:
    """Return {prompt: its answers}, each in the order of the hashed number that breaks ties."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(samples, key=lambda one: (one["prompt"], one["tiebreak"], one["id"])):
        groups.setdefault(row["prompt"], []).append(row)
    return groups


def both_orders(pairs: Sequence[tuple[Row, Row]], prompts: Mapping[str, Row], words: Words) -> Texts:
    """Return two texts per pair, one in each order; the id of each is its number."""
    turned = [order for one, other in pairs for order in ((one, other), (other, one))]
    return Texts.of(
        ((str(at), order) for at, order in enumerate(turned)), lambda name, order: _compared(name, order, prompts, words)
    )


def _compared(name: str, order: tuple[Row, Row], prompts: Mapping[str, Row], words: Words) -> Row:
    assert words.text and words.second
    first, second = order
    prompt = prompts[first["prompt"]]
    return _row(name, *(written(one, prompt, first, other=second) for one in (words.text, words.second)))


def verdict(there: Outcome, back: Outcome) -> Outcome:
    """Return the chance that the first of two is better, the mean of what both orders say; None where one of them says nothing.

    >>> verdict((0.75, ""), (0.5, ""))
    (0.625, '')
    """
    if there[0] is None or back[0] is None:
        return None, there[1] or back[1]
    return (there[0] + 1.0 - back[0]) / 2, ""


def score_rows(ids: list[str], name: str, outcomes: list[tuple[float | None, str]]) -> pl.DataFrame:
    values, whys = zip(*outcomes, strict=True) if outcomes else ((), ())
    frame = pl.DataFrame(
        {"sample": ids, "value": values, "why": [str(why) for why in whys]},
        schema={"sample": pl.String, "value": pl.Float64, "why": pl.String},
    )
    why = pl.when(pl.col("why") == "").then(None).otherwise(pl.col("why"))
    return shape("scores", frame.with_columns(why.alias("why"), name=pl.lit(name), draw=pl.lit(0), weight=pl.lit(1.0)))
