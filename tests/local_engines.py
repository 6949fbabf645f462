"""A real engine and a real trainer in this process, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
from tiny import WORDS
from toys import chunk_of

from selfkd.backend.base import Sampling
from selfkd.backend.engine.held_engine import ENGINES
from selfkd.backend.local import LocalBackend
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.core.pool import Model


def machine(generator: str, dtype: str = "float32") -> Machine:
    sizes = {"threads": 1, "kv_cache_gb": 0.05, "max_model_len": 256, "max_num_seqs": 16}
    return Machine(**{"backend": "local", "generator": generator, "dtype": dtype, **sizes})


@contextmanager
def backend(folder: Path, generator: str, dtype: str = "float32") -> Iterator[LocalBackend]:
    chosen = machine(generator, dtype)
    local = LocalBackend(chosen, fixed_numerics(chosen), folder / "log", ENGINES[generator])
    try:
        yield local
    finally:
        local.close()


def asked(local: LocalBackend, model: Model, folder: Path) -> pl.DataFrame:
    chunk = chunk_of(folder, WORDS * 2)
    (reply,) = local.generate(model, [chunk], Sampling(max_tokens=24, extra={"logprobs": 0}))
    assert reply.weights == model.digest
    return pl.read_parquet(reply.path).rename({"teacher_messages": "messages"}).sort("id")


def scored(local: LocalBackend, model: Model, answers: pl.DataFrame) -> np.ndarray:
    """What the engine says of the answers, by id."""
    return np.array([value for _, value, _ in sorted(local.logprobs(model, answers))])
