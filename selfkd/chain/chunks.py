"""Answers in canonical chunks: cut from the sorted request list, named by content, used again if finished, asked again whole if not.

Replies depend on what else is in a batch, so a chunk is the unit of generation, of durability and of redoing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from selfkd.backend.base import AnswerProgress, Chunk, Reply, Sampling, made_by
from selfkd.core import digest, storage
from selfkd.core.pool import Model
from selfkd.errors import WeightsError

LOOSE_FACTOR = 16  # without `exact` a chunk is only the unit of redoing: larger ones keep a GPU's batch full


def cut(
    requests: pl.DataFrame, size: int, key: str, model: Model, sampling: Sampling, stream: str, folder: Path, tmp: Path
) -> list[Chunk]:
    """Return the chunks of `requests`, `size` each; a chunk's key names `key` (of what the step generates), the weights, the sampling and the requests."""
    words = [
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.max_tokens,
        list(sampling.stop),
        dict(sampling.extra),
    ]
    return [
        Chunk(digest.of("chunk", key, model.digest, words, stream, digest.table(part, ("id",))), stream, part, folder, tmp)
        for part in requests.iter_slices(size)
    ]


def finished(chunks: Iterable[Chunk], model: Model) -> dict[str, Path]:
    """Return {key: file} of the chunks that an earlier attempt finished.

    A file counts if its bytes are those its name says, and if the weights of `model` made it.
    """
    return {chunk.key: path for chunk in chunks if (path := _file_of(chunk, model))}


def _file_of(chunk: Chunk, model: Model) -> Path | None:
    for path in sorted(chunk.folder.glob(f"{chunk.prefix}*.parquet")):
        if digest.file(path)[:32] == path.name.split(".")[1] and made_by(path).weights == model.digest:
            return path
    return None


def named(chunk: Chunk, reply: Reply, model: Model, where: str) -> Path:
    """Give the answers of a chunk their name in the run, and return it; WeightsError where other weights gave them."""
    for weights in (reply.weights, made_by(reply.path).weights):
        if weights != model.digest:
            what = f"the engine answered with the weights {weights[:12] or 'of nobody'}, not with {model.digest[:12]}"
            raise WeightsError(what, where, "Nothing of this was kept. Repeat the command: these answers are asked for again.")
    return storage.adopt(reply.path, chunk.folder / f"{chunk.prefix}{reply.path.name}")


@dataclass
class Tally:
    """How far the answers of one step are, told to `progress` as they come."""

    progress: Callable[..., None]
    total: int
    answered: int
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, requests: int, tokens: int) -> None:
        """Count a chunk that is finished."""
        self.answered += requests
        self.tokens += tokens
        self.tell({"requests": 0, "tokens": 0, "chunks": 0, "waiting": 0})

    def tell(self, unfinished: AnswerProgress) -> None:
        """Tell how many answers there are, those of `unfinished` chunks included."""
        tokens = self.tokens + unfinished["tokens"]
        rate = tokens / max(1e-6, time.monotonic() - self.began)
        self.progress(self.answered + unfinished["requests"], self.total, "answers", tokens=tokens, rate=round(rate, 1))
