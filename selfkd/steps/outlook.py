"""What the steps before a step will have made, judged from their fields alone: columns, streams, rows and metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from selfkd.core.wording import did_you_mean

NOTHING_YET = "there are no samples yet: a sample, gold or replay step comes first"


@dataclass
class Outlook:
    """What is there at one point of a round. `splits` and `context` are the recipe's; `replayable` is what a whole round makes.

    `rows` holds {(stream, role): kind}, `metrics` {metric: name of the step that measures it}.
    """

    splits: tuple[str, ...] = ()
    context: int = 0
    scores: list[str] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)
    rows: dict[tuple[str, str], str] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    replayable: Outlook | None = None

    def add_scores(self, names: Iterable[str]) -> None:
        self.scores += [name for name in dict.fromkeys(names) if name not in self.scores]

    def add_streams(self, names: Iterable[str]) -> None:
        self.streams += [name for name in dict.fromkeys(names) if name not in self.streams]

    def stream_problem(self, stream: str | None, needs_samples: bool) -> str:
        """Return why a step cannot work on `stream` (None: on whatever samples there are), or ''."""
        if stream and stream not in self.streams:
            known = ", ".join(self.streams) or "none yet"
            return f"no stream '{stream}' here.{did_you_mean(stream, self.streams)} Streams: {known}"
        return NOTHING_YET if needs_samples and not self.streams else ""

    def room_problem(self, max_tokens: int) -> str:
        """Return why answers of `max_tokens` leave no room for a prompt, or ''."""
        room = f"no room for a prompt: context is {self.context} tokens, prompt and answer together"
        return f"max_tokens {max_tokens} leaves {room}" if self.context and max_tokens >= self.context else ""
