"""One engine and the model it must hold, in the process that runs it; `local` calls it, `ray` puts it into an actor.

Knows neither Ray nor vLLM: the engine is named (`module:Class`) and imported where it is used.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import Chunk, Logprob, Reply, Sampling
from selfkd.backend.probe import Earlier
from selfkd.backend.reported import reported
from selfkd.core.facts import Facts
from selfkd.core.pool import Model
from selfkd.errors import GuardError, UsageError, WeightsError

Importable = str | Callable[..., Any]  # `module:name`, imported where it is used, or the thing itself
ENGINE = "selfkd.backend.engine.vllm:Engine"
ENGINES = {"vllm": ENGINE, "transformers": "selfkd.backend.engine.transformers_engine:Engine"}  # by `generator` of the numerics
TRAINER = "selfkd.backend.trainer.update:train_rank"
READER = "selfkd.backend.engine.reader:Reader"
LOADER = "selfkd.backend.engine.root_model:load_model"
AVERAGE = "selfkd.backend.engine.averaged:average"
REPORT_IT = "Nothing of this was kept. Repeat the command; if it happens again, report it with the log."
LOG_LEVEL = ("VLLM_LOGGING_LEVEL", "INFO")  # of an engine with a file of its own: memory, KV blocks and kernels are found there
EARLY_IMPORTS = {
    ENGINE: ("vllm",),
    ENGINES["transformers"]: ("torch", "transformers"),
}  # what a target imports later by itself, and which takes seconds


def resolve(target: Importable) -> Callable[..., Any]:
    """Return what `module:name` names; a callable is returned as it is."""
    if not isinstance(target, str):
        return target
    module, name = target.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def preload(target: Importable) -> float:
    """Import what `target` will need, while something else runs; return the seconds it took."""
    started = time.perf_counter()
    resolve(target)
    for module in EARLY_IMPORTS.get(target, ()) if isinstance(target, str) else ():
        importlib.import_module(module)
    return time.perf_counter() - started


def redirect(log: Path) -> None:
    """Send all that this process prints, C libraries included, to the end of `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


@contextmanager
def traced(log: Path | None = None) -> Iterator[None]:
    """Print the traceback of an error before it leaves this process, so that the log here has it.

    With a `log` this is a process of its own, and what leaves it are words: another one may not be able to read the error.
    """
    start = log.stat().st_size if log and log.exists() else 0
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        if log is None:
            raise
        raise reported(error, log, start) from None


class Beat:
    """Three numbers in a small file: how far the chunk in flight is, read by the driver while this process is busy.

    Steps say that the engine works, also where it makes few tokens or tells of none until an answer is whole.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self.put(0, 0)

    def put(self, requests: int, tokens: int, steps: int = 0) -> None:
        os.pwrite(self._handle, f"{requests:010d} {tokens:015d} {steps:015d}\n".encode(), 0)

    @staticmethod
    def read(path: Path) -> tuple[int, int, int]:
        """Return (requests finished, tokens, steps of the engine) of the chunk in flight; zeros where nothing was written yet."""
        try:
            requests, tokens, steps = path.read_text().split()
        except (OSError, ValueError):
            return 0, 0, 0
        return int(requests), int(tokens), int(steps)


class HeldEngine:
    """An engine that answers only with the weights it was asked for: `ensure` first, and every call checks again.

    A call wakes a sleeping engine with the weights it wants: a driver may take the result of an earlier `ensure` for news.
    """

    def __init__(self, engine: Importable, numerics: Mapping[str, Any], beat: Path, log: Path | None = None) -> None:
        if log is not None:
            redirect(log)
            os.environ.setdefault(*LOG_LEVEL)
            print(f"generator, process {os.getpid()}")
        self._target, self._numerics, self._beat = engine, dict(numerics), Beat(beat)
        self._log = log
        self._engine: Any = None
        self._asleep = False

    def preload(self) -> float:
        with traced(self._log):
            return preload(self._target)

    def ensure(self, model: Model, earlier: Earlier | None = None) -> tuple[str, dict[str, Any], Facts]:
        """Start the engine, wake it or swap its weights, so that it holds `model`; `earlier` helps to prove it.

        Return (weights, notes of the swap, what the engine computes with).
        """
        started, known = time.perf_counter(), {"earlier": earlier} if earlier else {}
        kind = "start" if self._engine is None else "wake" if self._asleep else "swap"
        with traced(self._log):
            if self._engine is None:
                self._engine = resolve(self._target)(self._numerics, model)
            notes = self._engine.wake(model, **known) if self._asleep else self._engine.swap(model, **known)
            self._asleep = False
        notes = {**notes, "kind": kind, "total_seconds": round(time.perf_counter() - started, 3)}
        return self._engine.weights, notes, self._engine.facts

    def generate(self, model: Model, chunk: Chunk, sampling: Sampling, following: Chunk | None = None) -> Reply:
        """Answer a chunk. An engine that can may begin with the chunk `following`, which it is then asked next, with the same sampling."""
        with traced(self._log):
            self._must_hold(model)
            self._beat.put(0, 0)
            may_begin = "following" in inspect.signature(self._engine.generate).parameters
            ahead = {"following": following} if following and may_begin else {}
            reply: Reply = self._engine.generate(chunk, sampling, self._beat.put, **ahead)
            must_match(reply, model)
            return reply

    def logprobs(self, model: Model, rows: pl.DataFrame) -> list[Logprob]:
        with traced(self._log):
            self._must_hold(model)
            self._beat.put(0, 0)  # else the driver would count the last chunk's answers again
            scores: list[Logprob] = self._engine.logprobs(rows)
            return scores

    def before_update(self, start: Model, rows: Sequence[Path], pairs: bool, max_length: int) -> Earlier | None:
        """Return what the engine scores now of what an update of `start` keeps as evidence; None where it does not hold `start`."""
        with traced(self._log), suppress(GuardError, UsageError):  # of rows: the trainer refuses them too, and says so
            if self.holds(start):
                found: Earlier = self._engine.before_update(rows, pairs, max_length)
                return found
        return None

    def sleep(self) -> None:
        """Free the GPU for the trainer; the next `ensure` wakes the engine with whatever model is current then."""
        with traced(self._log):
            if self._engine is not None and not self._asleep:
                self._engine.sleep()
                self._asleep = True

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine, self._asleep = None, False

    def holds(self, model: Model) -> bool:
        return self._weights() == model.digest

    def _weights(self) -> str:
        return "" if self._engine is None or self._asleep else str(self._engine.weights)

    def _must_hold(self, model: Model) -> None:
        if self._asleep:
            self.ensure(model)
        if not self.holds(model):
            what = f"the engine holds {self._weights()[:12] or 'no weights'}, and {model} was asked for"
            raise WeightsError(what, "engine", REPORT_IT)


def must_match(reply: Reply, model: Model) -> None:
    """Raise WeightsError for a reply of other weights; checked where a reply is made and again where it arrives."""
    if reply.weights != model.digest:
        what = f"chunk {reply.key[:12]} was answered by weights {reply.weights[:12] or 'unknown'}, not by {model}"
        raise WeightsError(what, "engine", REPORT_IT)
