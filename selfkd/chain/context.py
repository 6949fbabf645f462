"""What a step may ask while it runs (`steps.context.Context`), answered from a run, a round and a backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import AnswerProgress, Backend, Chunk, Logprob, Questions, Sampling, Trained, TrainProgress, TrainSpec
from selfkd.chain import chunks
from selfkd.chain.attempt import Attempt
from selfkd.chain.chunks import LOOSE_FACTOR, Tally
from selfkd.chain.commit import Place
from selfkd.chain.run import Run
from selfkd.core import digest, storage, views
from selfkd.core.hardware import usable_cores
from selfkd.core.known_models import KnownModels
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Function, Model, Pool
from selfkd.core.views import Kind
from selfkd.errors import BackendError, WeightsError
from selfkd.prompts import templates
from selfkd.rewards.pool import spread
from selfkd.steps.context import Messages, Render, Row

Earlier = Callable[[int | None], Iterator[tuple[int, Pool]]]


@dataclass(frozen=True)
class StepContext:
    """One step's view of its round. `notes` collects what this run of the step cost; it stays outside every digest."""

    run: Run
    place: Place
    pool: Pool
    models: KnownModels
    backend: Backend
    attempt: Attempt
    rounds_before: Earlier
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def index(self) -> int:
        return self.place.index

    @property
    def where(self) -> str:
        return self.place.where

    @property
    def max_length(self) -> int:
        return self.run.recipe.context

    @property
    def _root(self) -> Path:
        return self.run.paths.folder

    def seed(self, *names: Any) -> int:
        return digest.seed(self.run.recipe.seed, self.index, self.place.step.name, *names)

    def model(self, reference: ModelRef) -> Model:
        return self.models.find(reference, self.pool.models, self.where)

    # ---- machines ----

    def load(self, source: Mapping[str, Any], dither: int | None, asked: Iterable[pl.DataFrame]) -> tuple[Path, dict[str, Any]]:
        out = storage.temporary(self.run.paths.tmp, "-model")
        files = []
        for part in asked:
            files.append(storage.temporary(self.run.paths.tmp, "-questions.parquet"))
            part.write_parquet(files[-1])
        return out, self.backend.load(source, out, dither, Questions(files, self.max_length))

    def generate(self, model: Model, requests: pl.DataFrame, sampling: Sampling, stream: str) -> list[Path]:
        size = self.run.recipe.chunk * (1 if self.run.numerics["exact"] else LOOSE_FACTOR)
        place, tmp = self.place, self.run.paths.tmp
        wanted = chunks.cut(requests, size, place.key, model, sampling, stream, place.data, tmp)
        done = chunks.finished(wanted)
        todo = [chunk for chunk in wanted if chunk.key not in done]
        tally = Tally(self.progress, requests.height, requests.height - sum(chunk.requests.height for chunk in todo))
        self.progress(tally.answered, tally.total, "answers")
        if todo:
            done |= self._answered(model, todo, sampling, tally)
        self.notes["tokens"] = self.notes.get("tokens", 0) + tally.tokens
        missing = [chunk for chunk in wanted if chunk.key not in done]
        if missing:
            what = f"{len(missing)} of {len(wanted)} chunks were not answered"
            raise BackendError(what, self.where, "Repeat the command to go on.")
        return [done[chunk.key] for chunk in wanted]

    def _answered(self, model: Model, todo: list[Chunk], sampling: Sampling, tally: Tally) -> dict[str, Path]:
        """Return {key: file} of chunks that the backend answers now, each with the weights that were asked for."""
        heights = {chunk.key: chunk.requests.height for chunk in todo}
        done: dict[str, Path] = {}
        for reply in self.backend.generate(model.at(self._root), todo, sampling, tally.tell):
            if reply.weights != model.digest:
                what = f"the engine holds weights {reply.weights[:12]}, not {model.digest[:12]}"
                raise WeightsError(what, self.where, "Repeat the command.")
            done[reply.key] = reply.path
            tally.add(heights[reply.key], reply.tokens)
        if swap := self.backend.swap_notes():
            self.notes["swap"] = swap
        return done

    def logprobs(self, model: Model, rows: pl.DataFrame) -> Iterator[Logprob]:
        scored = 0

        def tell(unfinished: AnswerProgress) -> None:
            self.progress(scored + unfinished["requests"], rows.height, "samples")

        for scored, score in enumerate(self.backend.logprobs(model.at(self._root), rows, tell), 1):  # noqa: B007 - told above
            yield score

    def train(self, start: Model, reference: Model | None, rows: pl.DataFrame, spec: TrainSpec) -> Trained:
        path = storage.temporary(self.run.paths.tmp, "-rows.parquet")
        rows.write_parquet(path)
        out = storage.temporary(self.run.paths.tmp, "-child")

        def tell(done: TrainProgress) -> None:
            self.progress(done["step"], done["steps"], "steps", loss=done["loss"])

        held = reference and reference.at(self._root)
        return self.backend.train(start.at(self._root), held, [path], spec, out, tell)

    def map(self, function: Function, batches: Iterable[list[Row]], timeout: float) -> Iterator[list[tuple[float | None, str]]]:
        yield from spread(function, batches, workers=usable_cores(), timeout=timeout)

    # ---- what the run holds ----

    def function(self, reference: str, params: Mapping[str, Any]) -> Function:
        return self.run.function(reference, params)

    def template(self, field: str, reference: str, of: Sequence[str] | None = None) -> Render:
        template = self.run.template(reference)

        def render(prompt: Row, messages: Messages, of: Row | None = None) -> Messages:
            seen = templates.visible_prompt(prompt["messages"], prompt["answer"], json.loads(prompt["meta"] or "{}"))
            return templates.with_last_message(messages, template.render(prompt=seen, of=of))

        return render

    def expression(self, field: str, text: str, table: pl.DataFrame, kind: Kind) -> pl.Expr:
        return views.expression(text, table, kind, f"{self.where} '{field}'")

    def earlier(self, window: int | None) -> Iterator[tuple[int, Pool]]:
        return self.rounds_before(window)

    def split(self, name: str) -> Pool:
        held, dropped = self.run.split(name), self.run.dropped_prompts()
        return Pool({"prompts": held.prompts.filter(~pl.col("id").is_in(dropped["id"].implode()))}, held.files)

    def save(self, table: str, frame: pl.DataFrame) -> Path:
        return storage.write_parquet(frame, self.place.data, self.run.paths.tmp)

    def progress(self, done: int, total: int, unit: str, **more: Any) -> None:
        self.attempt.event("progress", round=self.index, step=self.place.step.name, done=done, total=total, unit=unit, **more)
