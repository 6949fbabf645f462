"""What a step may ask of the round that runs it. The one door from a verb to machines, files and earlier rounds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from selfkd.backend.base import Logprob, Sampling, Trained, TrainSpec
from selfkd.backend.reading import Read, Reading
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Function, Model, Part, Pool
from selfkd.core.views import Kind
from selfkd.steps.check import Check

Messages = list[dict[str, str]]
Row = dict[str, Any]


class Render(Protocol):
    """A template, ready to use: `messages` with the last user message replaced by what the template makes of the row `prompt`.

    `of` is the sample that the template works on, if it works on one; `more` is what else it is given, by name.
    """

    def __call__(self, prompt: Row, messages: Messages, of: Row | None = None, **more: Any) -> Messages: ...


class Context(Protocol):
    """A step's view of its round. It never learns a path of the run, nor which machine answers.

    `index` is the number of the round, `where` the place that error messages name, `max_length` the recipe's `context` in tokens.
    `engine_casts`: whether the engine rounds fp32 weights to 16 bits, so that small updates of undithered ones vanish.
    """

    @property
    def index(self) -> int: ...

    @property
    def where(self) -> str: ...

    @property
    def max_length(self) -> int: ...

    @property
    def engine_casts(self) -> bool: ...

    def seed(self, *names: Any) -> int:
        """Return 63 bits hashed from the run's seed, the round, the step and `names`."""

    def model(self, reference: ModelRef) -> Model:
        """Return the model that a reference names at this point; ChainError where there is none."""

    def there(self, reference: ModelRef) -> bool:
        """Return whether a model of that name was made up to this point."""

    def load(
        self,
        source: Mapping[str, Any],
        dither: int | None,
        asked: Iterable[pl.DataFrame],
        shapes: Iterable[pl.DataFrame] = (),
        chat: Mapping[str, Any] | None = None,
    ) -> tuple[Path, dict[str, Any]]:
        """Bring the chain's first model in; `dither` is a seed or None, `chat` what its template is given. Returns its folder and notes.

        The note `long` says which of the questions `asked` (columns QUESTIONS) do not fit, `refused` which of them, or of the `shapes` of
        questions about samples, the chat template refuses; without a tokenizer there is neither.
        """

    def places(self, split: str, ids: Collection[str]) -> dict[str, str]:
        """Return {prompt: file and line} of prompts of a split, as far as their source still says them."""

    def say(self, text: str) -> None:
        """Tell whoever watches something that they should know, once."""

    def generate(
        self, model: Model, requests: pl.DataFrame, sampling: Sampling, stream: str, about_samples: bool = False
    ) -> list[Path]:
        """Answer `requests` in canonical chunks; finished chunks of an earlier attempt are used. Returns files of table `samples`.

        One that the context does not hold ends the run. Where it is `about_samples`, whose length nobody knew before, it has the
        finish_reason TOO_LONG instead if the recipe says `long: drop`.
        """

    def logprobs(self, model: Model, rows: pl.DataFrame) -> Iterator[Logprob]:
        """Yield (id, summed log-probability, tokens) of each row's text after its messages, under `model`."""

    def read(self, model: Model, reading: Reading, rows: pl.DataFrame) -> Iterator[Read]:
        """Yield what a model reads of each text (columns TEXTS), in their order."""

    def lengths(self, model: Model, rows: pl.DataFrame) -> list[int]:
        """Return how many tokens of its answers a loss would learn of each training row, with the tokenizer of `model`."""

    def average(self, models: Sequence[tuple[Model, float]]) -> Path:
        """Return the folder of the weighted average of full weights, whose shares are divided by their sum."""

    def train(
        self, start: Model, reference: Model | None, rows: pl.DataFrame, spec: TrainSpec, check: Check | None = None
    ) -> Trained:
        """Update `start` on training rows, held against `reference` if there is one.

        With `check` it is measured on its way by a measure step of the recipe, and the model that this picks is returned.
        """

    def map(
        self, function: Function, batches: Iterable[list[Row]], samples: Iterable[str], timeout: float
    ) -> Iterator[list[tuple[float | None, str]]]:
        """Yield reward outcomes batch by batch: (value, why), the value None where it could not be scored ('abstained': would not be).

        `samples` are the ids of the samples that the rows are of, in their order.
        """

    def scorer(self, field: str, reference: str, reading: Reading) -> Model:
        """Return a model that only scores, as frozen in the run; it is to be read as `reading` says."""

    def apply(
        self, reference: str, params: Mapping[str, Any], tables: Mapping[str, pl.DataFrame], timeout: float
    ) -> dict[str, pl.DataFrame]:
        """Return the tables that a function, as frozen in the run, makes of these; RewardError where it is not a pure function of them."""

    def function(self, reference: str, params: Mapping[str, Any]) -> Function:
        """Return a reward as frozen in the run."""

    def loss(self, reference: str, params: Mapping[str, Any]) -> Function:
        """Return a loss that is a function, as frozen in the run; the trainer runs it."""

    def template(
        self, field: str, reference: str, of: Sequence[str] | None = None, shows: Mapping[str, str] | None = None
    ) -> Render:
        """Return a template as frozen in the run, ready to render; `of` are the columns of the samples that it will be given.

        `shows` is all that it must show beside the prompt, {name: what that is}: of a sample, its text. It is given what `shows` names.
        """

    def sample_fields(self, reference: str) -> Collection[str]:
        """Return the fields of samples that a template names: heavy ones are read for it alone."""

    def expression(self, field: str, text: str, table: pl.DataFrame, kind: Kind) -> pl.Expr:
        """Return a field's SQL over the columns of `table`; RecipeError where it does not fit them or gives another kind of value."""

    def earlier(self, window: int | None) -> Iterator[tuple[int, Pool]]:
        """Yield (round, a pool of what it made) of earlier rounds that were accepted, newest first, at most `window` rounds back; 0: round 0, by its steps `before`.

        What such a round replayed itself was made by a round before it, so a window of rounds stays one.
        """

    def split(self, name: str) -> Pool:
        """Return the prompts of a split, without those that the load step left out."""

    def data(self, name: str) -> pl.DataFrame:
        """Return what was read for a step under this name when the run was created (prompts/brought.py says which columns)."""

    def save(self, table: str, frame: pl.DataFrame) -> Part:
        """Write one immutable part of a table now, so that a large table never has to be whole in memory."""

    def progress(self, done: int, total: int, unit: str, **more: Any) -> None:
        """Tell whoever watches how far this step is."""
