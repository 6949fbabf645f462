"""Everything in one process, without Ray: to step through an engine or a trainer with a debugger.

With SELFKD_DEBUG=1 an error opens the debugger where it was raised. Slower to stop than the Ray backend (nothing can be killed
but the process itself) and it trains on one rank only; the numbers are the same.
"""

from __future__ import annotations

import os
import pdb
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend import lengths
from selfkd.backend.base import (
    AnswerProgress,
    Chunk,
    Logprob,
    OnAnswers,
    OnSteps,
    Questions,
    Reply,
    Sampling,
    Trained,
    TrainSpec,
    nobody_listens,
)
from selfkd.backend.engine.held_engine import AVERAGE, ENGINE, LOADER, READER, TRAINER, HeldEngine, Importable, resolve
from selfkd.backend.facts import of_trainer
from selfkd.backend.gentle_stop import stopped_gently
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.backend.model_files import engine_kind
from selfkd.backend.probe import Earlier
from selfkd.backend.reading import Read, Reading, parts_of
from selfkd.backend.trainer.loss_kinds import kind_of
from selfkd.core.accelerator import accelerator
from selfkd.core.facts import Facts
from selfkd.core.pool import Model
from selfkd.errors import UsageError


class LocalBackend:
    """One engine and one trainer rank, called directly. `generate` reports after each chunk, `logprobs` not at all."""

    name = "local"

    def __init__(
        self,
        machine: Machine,
        numerics: Mapping[str, Any] | None,
        log: Path,
        engine: Importable = ENGINE,
        trainer: Importable = TRAINER,
        loader: Importable = LOADER,
        reader: Importable = READER,
    ) -> None:
        if numerics is None:
            numerics = fixed_numerics(machine)
        if numerics["trainers"] > 1:
            what = f"the local backend trains on one rank, and {numerics['trainers']} are asked for"
            raise UsageError(what, "machine.trainers", "Use `backend: ray`, or `trainers: 1`.")
        _see_one_card()
        self._numerics, self._log, self._trainer, self._loader = dict(numerics), log, trainer, loader
        self._reader = reader
        self._engine = HeldEngine(engine, numerics, log / "engine.beat")
        self._kind = ""  # of the engine that came up last
        self._earlier: Earlier | None = None
        self._notes: dict[str, Any] = {}
        self._facts: dict[str, Facts] = {}

    def numerics(self) -> dict[str, Any]:
        return dict(self._numerics)

    def facts(self) -> dict[str, Facts]:
        return dict(self._facts)

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        with _debugged():
            notes: dict[str, Any] = resolve(self._loader)(source, out, dither, asked)
            return notes

    def generate(
        self, model: Model, chunks: Sequence[Chunk], sampling: Sampling, on_progress: OnAnswers = nobody_listens
    ) -> Iterator[Reply]:
        for done, chunk in enumerate(chunks, start=1):
            with _debugged():
                self._ensure(model)
                reply = self._engine.generate(model, chunk, sampling)
            on_progress(AnswerProgress(requests=0, tokens=0, chunks=done, waiting=len(chunks) - done))
            yield reply

    def logprobs(self, model: Model, rows: pl.DataFrame, on_progress: OnAnswers = nobody_listens) -> Iterator[Logprob]:
        with _debugged():
            self._ensure(model)
            scores = self._engine.logprobs(model, rows)
        yield from scores

    def read(
        self, model: Model, reading: Reading, rows: pl.DataFrame, on_progress: OnAnswers = nobody_listens
    ) -> Iterator[Read]:
        with _debugged():
            self._engine.sleep()
            reader = resolve(self._reader)(self._numerics, model, reading)
            self._facts["reader-0"] = reader.facts
        for done, part in enumerate(parts_of(rows)):
            with _debugged():
                found = reader.read(part)
            yield from found
            on_progress(AnswerProgress(requests=0, tokens=0, chunks=done + 1, waiting=0))

    def train(
        self,
        start: Model,
        reference: Model | None,
        rows: Sequence[Path],
        spec: TrainSpec,
        out: Path,
        on_progress: OnSteps = nobody_listens,
    ) -> Trained:
        with _debugged():
            if accelerator().on_cards:  # elsewhere an engine sleeps with its weights, and scores under them later
                self._earlier = self._engine.before_update(
                    start, rows, kind_of(spec.loss, spec.rows).rows == "pair", spec.max_length
                )
            self._engine.sleep()
            with stopped_gently(spec.saves) as listen:
                heard = listen(on_progress)
                trained: Trained = resolve(self._trainer)(start, reference, list(rows), spec, out, self._numerics, heard)
            self._facts["trainer-0"] = of_trainer()
            return trained

    def average(self, models: Sequence[tuple[Model, float]], out: Path) -> None:
        with _debugged():
            resolve(AVERAGE)(models, out)

    def lengths(self, model: Model, rows: pl.DataFrame) -> list[int]:
        return lengths.learned(model, rows)

    def swap_notes(self) -> dict[str, Any]:
        return dict(self._notes)

    def close(self) -> None:
        self._engine.close()

    def _ensure(self, model: Model) -> None:
        """Have the engine hold `model`; one of another kind ends first. On a card, this process keeps a part of that one's memory."""
        kind = engine_kind(Path(model.path), model.digest, self._numerics.get("dtype", ""))
        if self._kind != kind:
            self._engine.close()
            self._kind = kind
        if not self._engine.holds(model):
            _, self._notes, self._facts["engine-0"] = self._engine.ensure(model, self._earlier)


def _see_one_card() -> None:
    """Show one card to torch, which is imported later: TRL refuses a process that sees several."""
    found = accelerator()
    if len(found.cards) > 1:
        os.environ.update(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES=found.visible(1))


@contextmanager
def _debugged() -> Iterator[None]:
    """Open the debugger on an error if SELFKD_DEBUG=1, then raise the error again."""
    try:
        yield
    except Exception:
        if os.environ.get("SELFKD_DEBUG") == "1":
            traceback.print_exc()
            pdb.post_mortem(sys.exc_info()[2])
        raise
