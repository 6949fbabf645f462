"""What a round will cost, counted step by step from the fields alone: upper bounds, and None where a number is not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class Forecast:
    """Upper bounds of what a round holds so far. None is unknown, and anything times unknown is unknown.

    `sizes` are the prompts of each split; `context` is the most tokens of a sequence, `prompt_tokens` the mean of a prompt where it is
    known, `longest` the most tokens of an answer sampled so far. `aside` are streams that count only where they are named.
    """

    prompts: int | None
    sizes: Mapping[str, int | None] = field(default_factory=dict)
    context: int = 0
    prompt_tokens: int | None = None
    longest: int = 0
    streams: dict[str, int | None] = field(default_factory=dict)
    rows: dict[str, int | None] = field(default_factory=dict)
    aside: dict[str, int | None] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)  # of a row, where rows are rankings

    @property
    def row_tokens(self) -> int:
        """Return the tokens of one training sequence."""
        if self.prompt_tokens is None or not self.longest:
            return self.context
        return min(self.context, self.prompt_tokens + self.longest)

    def samples(self, stream: str | None = None) -> int | None:
        """Return how many samples a stream, or all of them together, may have."""
        chosen = [(self.aside | self.streams).get(stream)] if stream else list(self.streams.values())
        return None if any(count is None for count in chosen) else sum(count for count in chosen if count is not None)


@dataclass(frozen=True)
class Cost:
    """One step of one round. `made` tokens are generated, in so many `answers`; `learned` ones are trained on, `read` ones go forward once
    through the model `reader`.
    """

    step: str
    what: str = ""
    made: int | None = 0
    learned: int | None = 0
    answers: int | None = 0
    read: int | None = 0
    reader: str | None = None


def answers(step: str, count: int | None, longest: int) -> Cost:
    """Return the cost of `count` answers of at most `longest` tokens."""
    tokens = times(count, longest)
    return Cost(step, f"{figure(count)} answers, {figure(tokens)} tokens", made=tokens, answers=count)


def pairs_of(prompts: int | None, samples: int | None, most: int | None) -> int | None:
    """Return how many pairs there are where each prompt has as many answers, and at most so many pairs."""
    if prompts is None or samples is None:
        return None
    per_prompt = -(-samples // prompts) if prompts else 0
    return times(prompts, least(per_prompt * (per_prompt - 1) // 2, most) or 0)


def times(count: int | None, by: int) -> int | None:
    return None if count is None else count * by


def total(counts: Iterable[int | None]) -> int | None:
    """Return the sum, None where one of them is not known."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def least(*counts: int | None) -> int | None:
    """Return the smallest of those that are known."""
    return min((count for count in counts if count is not None), default=None)


def figure(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
