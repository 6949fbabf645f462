"""Everything in one process, without Ray: to step through an engine or a trainer with a debugger.

With SELFKD_DEBUG=1 an error opens the debugger where it was raised. Slower to stop than the Ray backend (nothing can be killed
but the process itself) and it trains on one rank only; the numbers are the same.
"""

from __future__ import annotations

import os
import pdb
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import Chunk, Reply, Sampling, Trained, TrainSpec
from selfkd.backend.engine.held_engine import ENGINE, LOADER, TRAINER, Generator, resolve
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.core.pool import Model
from selfkd.errors import UsageError

Target = str | Callable[..., Any]


class LocalBackend:
    name = "local"

    def __init__(
        self,
        machine: Machine,
        numerics: Mapping[str, Any] | None,
        log: Path,
        engine: Target = ENGINE,
        trainer: Target = TRAINER,
        loader: Target = LOADER,
    ) -> None:
        if numerics is None:
            numerics = fixed_numerics(machine)
        if numerics["trainers"] > 1:
            what = f"the local backend trains on one rank, and {numerics['trainers']} are asked for"
            raise UsageError(what, "machine.trainers", "Use `backend: ray`, or `trainers: 1`.")
        self._numerics, self._log, self._trainer, self._loader = dict(numerics), log, trainer, loader
        self._generator = Generator(engine, numerics, log / "engine.beat")
        self._notes: dict[str, Any] = {}
        self.progress: Callable[[dict[str, Any]], None] = lambda numbers: None

    def numerics(self) -> dict[str, Any]:
        return dict(self._numerics)

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None) -> dict[str, Any]:
        with _debugged():
            return resolve(self._loader)(source, out, dither)

    def generate(self, model: Model, chunks: Sequence[Chunk], sampling: Sampling, on_progress: Any = None) -> Iterator[Reply]:
        self.progress = on_progress or (lambda n: None)
        for done, chunk in enumerate(chunks, start=1):
            with _debugged():
                self._ensure(model)
                reply = self._generator.generate(model, chunk, sampling)
            self.progress({"requests": 0, "tokens": 0, "chunks": done, "waiting": len(chunks) - done})
            yield reply

    def logprobs(self, model: Model, rows: pl.DataFrame, on_progress: Any = None) -> Iterator[tuple[str, float, int]]:
        self.progress = on_progress or (lambda n: None)
        with _debugged():
            self._ensure(model)
            scores = self._generator.logprobs(model, rows)
        yield from scores

    def train(
        self, start: Model, reference: Model | None, rows: Sequence[Path], spec: TrainSpec, out: Path, on_progress: Any = None
    ) -> Trained:
        self.progress = on_progress or (lambda n: None)
        with _debugged():
            self._generator.sleep()
            return resolve(self._trainer)(start, reference, list(rows), spec, out, self._numerics, report=self.progress)

    def swap_notes(self) -> dict[str, Any]:
        return dict(self._notes)

    def close(self) -> None:
        self._generator.close()

    def _ensure(self, model: Model) -> None:
        if not self._generator.holds(model):
            self._notes = self._generator.ensure(model)[1]


@contextmanager
def _debugged() -> Iterator[None]:
    """Opens the debugger on an error if SELFKD_DEBUG=1; the error goes on its way afterwards."""
    try:
        yield
    except Exception:
        if os.environ.get("SELFKD_DEBUG") == "1":
            traceback.print_exc()
            pdb.post_mortem(sys.exc_info()[2])
        raise
