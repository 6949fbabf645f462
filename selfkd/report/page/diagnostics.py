"""The diagnostics of a run by round, each with what it means, and those that this run cannot say with the reason: never a zero in their place.

Figures that a record has are taken from there. What is worked out here is a count or a mean over tables that are there anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from selfkd.chain import contents
from selfkd.chain.measured import Measured
from selfkd.chain.records import Commit
from selfkd.core import views
from selfkd.errors import SelfkdError
from selfkd.report.page.noted import Diagnostic, Group, Values, of_engine, of_filter
from selfkd.report.page.opened import Opened
from selfkd.report.tables import percent_of
from selfkd.steps.measure import CHANGES, COUNTS

AT_BASE = "policy@base"


@dataclass(frozen=True)
class Drawn:
    """What the answers of a round come to that no record says: means over samples, and over prompts."""

    coverage: float | None
    distinct: float | None
    surprisal: float | None
    kl: float | None
    scores: Mapping[str, float | None]


def groups(run: Opened) -> list[Group]:
    """Return all diagnostics, those that are missing too."""
    drawn = {index: one for index in run.commits if (one := _drawn(run, index))}
    found = [
        Group("Is it better?", [*_measured(run), *_further(run)]),
        Group("What does it learn from?", [*_kept(run, drawn), *of_filter(run.rounds)]),
        Group("Is it still as varied?", [*_varied(run, drawn)]),
        Group("Has it moved away?", [*_moved(run, drawn)]),
        Group("Can the score be believed?", [*_believed(run, drawn)]),
        Group("How was it trained?", [*_trained(run), *of_engine(run.seals)]),
    ]
    return [one for one in found if one.diagnostics]


# ---- what is read once per round ----


def _drawn(run: Opened, index: int) -> Drawn | None:
    if not any("samples" in one.tables and not one.outside for one in run.commits[index]):
        return None
    try:
        found = contents.samples(run.paths, index)
    except SelfkdError:  # `verify` names a table that is gone
        return None
    rows = found.rows.filter(pl.col("kept").is_not_null())
    if not rows.height:
        return None
    texts = views.with_heavy(rows.select("id", "prompt", "stream"), found.pool, ["text"])
    names = [name for name in views.score_names(found.pool) if name in rows.columns]
    return Drawn(
        coverage=_number(rows.group_by("prompt").agg(pl.col("kept").any()).select(pl.col("kept").mean())),
        distinct=_distinct(texts),
        surprisal=_per_token(rows, -pl.col("logprob"), "logprob"),
        kl=_kl(rows, run.commits[index]),
        scores={name: _number(rows.filter(pl.col(name).is_finite()).select(pl.col(name).mean())) for name in names},
    )


def _number(one: pl.DataFrame) -> float | None:
    value = one.item() if one.height else None
    return None if value is None else float(value)


def _distinct(texts: pl.DataFrame) -> float | None:
    """Return the mean over prompts, of those that were asked more than once in a stream, of the share of answers that differ."""
    asked = texts.group_by("prompt", "stream").agg(n=pl.len(), different=pl.col("text").n_unique()).filter(pl.col("n") > 1)
    return _number(asked.select(((pl.col("different") - 1) / (pl.col("n") - 1)).sort().mean()))


def _per_token(rows: pl.DataFrame, value: pl.Expr, *known: str) -> float | None:
    counted = rows.filter(pl.all_horizontal(pl.col(name).is_finite() for name in known) & (pl.col("tokens") > 0))
    return _number(counted.select(value.sort().sum() / pl.col("tokens").sum())) if counted.height else None


def _kl(rows: pl.DataFrame, commits: Sequence[Commit]) -> float | None:
    """Return the mean per token of log p(model) - log p(base) on the model's own answers; None where no step scored them by the base."""
    for one in (one.identity for one in commits if one.verb == "score"):
        plain = not any(one.get(name) for name in ("template", "target", "given")) and one.get("reduce") in (None, "sum")
        name = one.get("as") or "logprob_of"
        if one.get("logprob") == AT_BASE and plain and name in rows.columns:
            return _per_token(rows, pl.col("logprob") - pl.col(str(name)), "logprob", str(name))
    return None


# ---- the groups ----


def _measured(run: Opened) -> Iterator[Diagnostic]:
    names = list(dict.fromkeys(name for one in run.rounds for name in one.measured))
    for name in names:
        found = {one.index: one.measured[name] for one in run.rounds if name in one.measured}
        first = next(iter(found.values()))
        yield Diagnostic(
            name=first.name,
            means=_score_means(first),
            values={index: one.value for index, one in found.items()},
            percent=percent_of(list(found.values())),
            bounds={index: (one.interval.low, one.interval.high) for index, one in found.items() if one.interval},
        )
    if not names:
        yield Diagnostic(
            "accuracy",
            "The mean score on held-out prompts.",
            {},
            "nothing was measured: write a `measure` step and a dev split",
        )
    if not any("_pass_" in name for name in names):
        yield Diagnostic(
            "pass@k",
            "The chance that at least one of k answers is right.",
            {},
            "not asked for: measure: {n: 16, pass_at: 4, temperature: 0.8}",
        )
    if not any("_maj_" in name for name in names):
        yield Diagnostic(
            "vote share against accuracy",
            "How right the commonest of several answers is. Where the vote grows surer and the accuracy does not, the model agrees with itself on mistakes.",
            {},
            "no measurement votes: measure: {n: 8, key: reward/agree.py:answer, temperature: 0.8}",
        )


def _score_means(one: Measured) -> str:
    what = f"The mean of '{one.score}' over the prompts of {one.split}; a prompt counts once, however often it is asked. The band is a 95 % interval over prompts."
    if "_pass_" in one.score:
        return (
            f"{what} pass@k is the chance that at least one of k answers is right, without bias: 1 - C(n - right, k) / C(n, k)."
        )
    if "_maj_" in one.score:
        return f"{what} maj@k is the score of what most of k answers say; answers that tie share the draw. Where the vote grows surer and this does not, the model agrees with itself on mistakes."
    return what


def _further(run: Opened) -> Iterator[Diagnostic]:
    """Yield the metrics of measure steps that are neither scores nor counted elsewhere on the page."""
    shown = {measured.name for one in run.rounds for measured in one.measured.values()} | {
        name for one in run.rounds for name in one.told
    }
    names = dict.fromkeys(name for seal in run.seals for name in seal.metrics)
    for name in (one for one in names if one not in shown and not one.endswith(ELSEWHERE)):
        values = {seal.round: seal.metrics[name] for seal in run.seals if name in seal.metrics}
        means = (
            PARSED
            if name.endswith("/parsed")
            else f"What a step measured under this name in the split {name.partition('/')[0]}."
        )
        yield Diagnostic(name, means, values, percent=_share(values))


ELSEWHERE = (
    *(f"/{name}" for name in COUNTS),
    "_scored",
    *(f"_{name}" for name in CHANGES),
)  # how metrics end that stand elsewhere
PARSED = "The share of answers from which their statement could be read. A gain here alone is one of form."


def _kept(run: Opened, drawn: Mapping[int, Drawn]) -> Iterator[Diagnostic]:
    shares = {one.index: one.kept / one.samples for one in run.rounds if one.samples and one.kept is not None}
    none = "no round has drawn samples yet"
    yield Diagnostic(
        "kept share",
        "Samples that no step dropped, of all that were made: what the filter lets through.",
        shares,
        none,
        percent=True,
    )
    yield Diagnostic(
        "coverage",
        "Prompts of which at least one sample was kept, of all that were asked. The rest teach nothing: where coverage falls, the model learns from ever easier prompts.",
        {index: one.coverage for index, one in drawn.items()},
        none,
        percent=True,
    )


def _varied(run: Opened, drawn: Mapping[int, Drawn]) -> Iterator[Diagnostic]:
    yield Diagnostic(
        "diversity",
        "Of the answers to one prompt, the share that differ from the others: 1 where all do, 0 where all are the same text; the mean over prompts. Its fall comes before that of pass@k.",
        {index: one.distinct for index, one in drawn.items()},
        "each prompt was asked once: sample: {n: 4}",
        percent=True,
    )
    entropy = _mean_of(run, drawn, "entropy")
    yield Diagnostic(
        "token entropy" if entropy else "token entropy, from samples",
        "How undecided the model is about the next token, in nats, the mean over what it wrote"
        + (
            "."
            if entropy
            else ": minus the log-probability of what was drawn, which is the entropy where temperature is 1 and nothing is cut off."
        )
        + " Near 0 there is nothing left to choose from.",
        entropy or {index: one.surprisal for index, one in drawn.items()},
        "no log-probabilities were kept: sample: {vllm: {logprobs: 0}}, or score: {entropy: policy}",
    )


def _mean_of(run: Opened, drawn: Mapping[int, Drawn], source: str) -> dict[int, float | None]:
    """Return the means of the score that a step gets from `source`, by round."""
    asked = [
        one.identity for commits in run.commits.values() for one in commits if one.verb == "score" and one.identity.get(source)
    ]
    name = next((str(one.get("as") or source) for one in asked), "")
    return {index: one.scores[name] for index, one in drawn.items() if name in one.scores}


def _moved(run: Opened, drawn: Mapping[int, Drawn]) -> Iterator[Diagnostic]:
    yield Diagnostic(
        "KL to the base",
        "How much likelier the model finds its own answers than the base does: the mean per token of log p(model) - log p(base), in nats.",
        {index: one.kl for index, one in drawn.items()},
        "the base was not asked: sample: {vllm: {logprobs: 0}} and score: {logprob: policy@base}",
    )
    yield Diagnostic(
        "length ratio",
        "Tokens of a held-out answer, against those of the base. Above 1 a judge may be pleased by length alone; a fall may mean that reasoning goes.",
        _length_ratio(run),
        "needs a measurement of the base and of a round",
    )
    yield Diagnostic(
        "cut at the limit",
        "Held-out answers that ended at `max_tokens` and not by themselves.",
        _of_split(run, "cut"),
        "nothing was measured",
        percent=True,
    )


def _of_split(run: Opened, name: str) -> dict[int, float | None]:
    split = run.metric.partition("/")[0]
    return {seal.round: seal.metrics[f"{split}/{name}"] for seal in run.seals if f"{split}/{name}" in seal.metrics}


def _length_ratio(run: Opened) -> dict[int, float | None]:
    tokens, samples = _of_split(run, "tokens"), _of_split(run, "samples")
    means = {index: tokens[index] / samples[index] for index in tokens if samples.get(index) and tokens[index] is not None}  # type: ignore[operator]
    return {index: value / means[0] for index, value in means.items()} if means.get(0) and len(means) > 1 else {}


def _believed(run: Opened, drawn: Mapping[int, Drawn]) -> Iterator[Diagnostic]:
    for name in dict.fromkeys(name for one in drawn.values() for name in one.scores):
        values = {index: one.scores.get(name) for index, one in drawn.items()}
        yield Diagnostic(
            f"{name} of samples",
            "The mean of this score over the samples of a round, before any is dropped: what the filter sees.",
            values,
            percent=_share(values),
        )
        yield _proxy(run, name, values)
    told = dict.fromkeys(name for one in run.rounds for name in one.told if name.rpartition("/")[2] in JUDGED)
    for name in told:
        yield Diagnostic(
            name.replace("/", ": "),
            JUDGED[name.rpartition("/")[2]],
            {one.index: one.told[name] for one in run.rounds if name in one.told},
        )
    if not told:
        yield Diagnostic(
            "judge: agreement, order and canaries",
            "Whether a judge says the same when two answers change places, and is not pleased by empty or injected ones.",
            {},
            "no model judges in this recipe",
        )


def _share(values: Values) -> bool:
    return all(0 <= value <= 1 for value in values.values() if value is not None)


def _proxy(run: Opened, name: str, values: Values) -> Diagnostic:
    """Return how far the score that chooses has risen beyond the one that is believed, since the first round that has both."""
    gold = {index: one.value for index, one in run.main.items() if not one.differently}
    both = [index for index, value in sorted(values.items()) if value is not None and gold.get(index) is not None]
    first = both[0] if both else 0
    apart = {index: (values[index] - values[first]) - (gold[index] - gold[first]) for index in both}  # type: ignore[operator]
    return Diagnostic(
        f"{name} against {run.metric or 'gold'}",
        f"How far '{name}' of the samples has risen since round {first}, less how far {run.metric or 'what is measured'} has: above 0 and rising, the filter is pleased by what does not help.",
        apart if len(both) > 1 else {},
        "needs two rounds that were both sampled and measured",
    )


JUDGED = {
    "unread": "Judgments that could not be read, of all: they count as no opinion.",
    "length": "The correlation, within prompts, of a mark with the length of what was marked: above 0 the judge likes what is long.",
    "at_highest": "Marks that are the highest one: near 1 the judge no longer tells answers apart.",
    "follows_order": "Of pairs judged in both orders, those whose verdict followed the place and not the answer: 0 is consistent.",
    "first_wins": "How often what is shown first wins: 0.5 is no preference for a place.",
    "canary_empty": "What an empty answer gets: it should lose.",
    "canary_opener": "What an answer of an opening phrase alone gets: it should lose.",
    "canary_injected": "What an answer gets that tells the judge its verdict: it should lose.",
}


def _trained(run: Opened) -> Iterator[Diagnostic]:
    for key, (name, means) in NOTED.items():
        values = {index: found for index, commits in sorted(run.commits.items()) if (found := _noted(commits, key)) is not None}
        if values:
            yield Diagnostic(name, means, values)
    swaps = {one.index: one.survived for one in run.rounds if one.survived is not None}
    yield Diagnostic(
        "update that survives",
        "The share of an update that reaches the engine's weights, in their number format; above 100 % where rounding adds to it.",
        swaps,
        "no swap of weights was measured",
        percent=True,
    )
    told = dict.fromkeys(name for one in run.rounds for name in one.told if name.rpartition("/")[2] not in JUDGED)
    for name in told:
        yield Diagnostic(
            name.replace("/", ": "),
            "What this step said of itself.",
            {one.index: one.told[name] for one in run.rounds if name in one.told},
        )


NOTED: Mapping[str, tuple[str, str]] = {
    "rows": ("training rows", "Rows that the round's update learned from."),
    "loss_last": (
        "loss at the end",
        "The training loss of the last step of an update. It says how well rows were learned, not whether they were worth it.",
    ),
    "update_ratio": ("size of the update", "The norm of what the update changed, over the norm of the weights."),
}


def _noted(commits: Sequence[Commit], key: str) -> float | None:
    found: list[Any] = [one.notes["train"][key] for one in commits if key in one.notes.get("train", {})]
    return float(found[-1]) if found and isinstance(found[-1], int | float) else None
