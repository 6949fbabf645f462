"""What the steps before a step will have made, judged from their fields alone: columns, streams, rows and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from selfkd.core import views
from selfkd.core.pool import SCHEMAS, Pool
from selfkd.core.wording import did_you_mean

NOTHING_YET = "there are no samples yet: a sample, gold or replay step comes first"


@cache
def _columns(scores: tuple[str, ...]) -> dict[str, list[str]]:
    return views.columns(Pool(scores_named=scores))


@dataclass
class Outlook:
    """What is there at one point of a round. `splits`, `context` and `take` are the recipe's; `replayable` is what a whole round makes, `opening` what the steps of `before` make.

    `pool` has empty tables with every column that there will be. `rows` holds {(stream, role): kind}, `row_columns`
    the columns that all of those rows have, `metrics`
    {metric: name of the step that measures it}, `origins` {score: what gives it, in words}; `replayed` names the steps that bring
    samples of earlier rounds, `brought` those that add prompts of their own. `compared` are the scores that compare two samples. `aside` are streams that a step sees only by their name, `answered` says how many samples of a prompt a
    stream has at most, where that is known. `as_prompted` are streams whose prompts were asked in their own words, `told` says
    {(stream, role) of rows of kind kd: whether a teacher sees more than the student}, `trained` are the roles that a step trained before.
    """

    splits: tuple[str, ...] = ()
    context: int = 0
    take: int | None = None
    pool: Pool = field(default_factory=Pool)
    origins: dict[str, str] = field(default_factory=dict)
    streams: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    answered: dict[str, int | None] = field(default_factory=dict)
    rows: dict[tuple[str, str], str] = field(default_factory=dict)
    row_columns: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    replayed: list[str] = field(default_factory=list)
    as_prompted: set[str] = field(default_factory=set)
    told: dict[tuple[str, str], bool] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    brought: list[str] = field(default_factory=list)
    all_rounds: list[str] = field(default_factory=list)  # names of steps that replay every round
    adapted: set[str] = field(default_factory=set)  # roles that a step trains as adapters
    replayable: Outlook | None = None
    opening: Outlook | None = None

    @property
    def scores(self) -> list[str]:
        return views.score_names(self.pool)

    def columns(self) -> dict[str, list[str]]:
        """Return the columns that expressions may use here, by table."""
        return _columns(self.pool.scores_named)

    def add_scores(self, origins: Mapping[str, str]) -> None:
        """Note scores, {name: what gives it}; none that would hide a column, which is refused."""
        self.pool += Pool(scores_named=tuple(name for name in origins if name not in SCHEMAS["samples"]))
        self.origins = {**origins, **self.origins}

    def taken(self, origins: Mapping[str, str]) -> Iterator[str]:
        """Yield of each score, {name: what gives it}, that is given by something else already."""
        for name, origin in origins.items():
            if self.origins.get(name, origin) != origin:
                yield f"the score '{name}' is that of {self.origins[name]} already"

    def add_streams(self, names: Iterable[str], most: int | None = None) -> None:
        """Note streams, to which a step adds so many samples of a prompt at `most`; None where nobody knows."""
        for name in dict.fromkeys(names):
            before = self.answered.get(name) if name in self.streams else 0
            self.answered[name] = None if most is None or before is None else before + most
            self.streams += [name] if name not in self.streams else []

    def asked_otherwise(self, stream: str | None) -> bool:
        """Whether some sample of a stream, or of any, may be an answer to other words than its prompt's own."""
        return not set([stream] if stream else self.streams) <= self.as_prompted

    def add_aside(self, names: Iterable[str]) -> None:
        self.aside += [name for name in dict.fromkeys(names) if name not in self.aside]

    def most_answers(self, stream: str | None) -> int | None:
        """Return how many samples a prompt has at most in a stream, or in all of them; None where that is not known."""
        names = [stream] if stream else self.streams
        known = [self.answered.get(name) for name in names]
        return None if None in known else sum(count for count in known if count is not None)

    def stream_problem(self, stream: str | None, needs_samples: bool) -> str:
        """Return why a step cannot work on `stream` (None: on whatever samples there are), or ''."""
        there = [*self.streams, *self.aside]
        if stream and stream not in there:
            known = ", ".join(there) or "none yet"
            return f"no stream '{stream}' here.{did_you_mean(stream, there)} Streams: {known}"
        return NOTHING_YET if needs_samples and not (self.streams or stream) else ""

    def room_problem(self, max_tokens: int) -> str:
        """Return why answers of `max_tokens` leave no room for a prompt, or ''."""
        room = f"no room for a prompt: context is {self.context} tokens, prompt and answer together"
        return f"max_tokens {max_tokens} leaves {room}" if self.context and max_tokens >= self.context else ""
