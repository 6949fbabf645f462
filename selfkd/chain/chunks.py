"""Answers in chunks: cut from the sorted request list, named by content, used again if finished, asked again whole if not.

Replies depend on what else is in a batch, so a chunk is the unit of generation, of durability and of redoing. Where a run is exact
its size is the recipe's. Else it follows the number of engines when the step began, and is recorded: whoever goes on cuts alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from selfkd.backend.base import AnswerProgress, Chunk, Reply, Sampling, made_by
from selfkd.chain import records
from selfkd.chain.records import Cut
from selfkd.core import digest, storage
from selfkd.core.pool import Model
from selfkd.errors import WeightsError

SHARES = 4  # chunks per engine without `exact`: engines of different speed end together, and a kill costs a fraction
FEWEST = 64  # requests of such a chunk where each engine has one: smaller ones are all tail
LOOSE_FACTOR = 16  # times the recipe's `chunk`: the largest ones, and the only size before cuts were recorded


@dataclass(frozen=True)
class Asked:
    """All that is asked at one place of a run. `key` is of what the step generates; answers lie in `folder`.

    `drop_long` is in no key: a chunk with a request that is too long has no answers where that ends the run.
    """

    requests: pl.DataFrame
    key: str
    model: Model
    sampling: Sampling
    stream: str
    folder: Path
    tmp: Path
    drop_long: bool = False

    def name(self, part: pl.DataFrame) -> str:
        """Return the key of a part of the requests: it names `key`, the weights, the sampling and the requests themselves."""
        drawn = self.sampling
        words = [drawn.temperature, drawn.top_p, drawn.top_k, drawn.max_tokens, list(drawn.stop), dict(drawn.extra)]
        return digest.of("chunk", self.key, self.model.digest, words, self.stream, digest.table(part, ("id",)))

    def cut(self, size: int) -> list[Chunk]:
        """Return the requests in chunks of `size`."""
        parts = self.requests.iter_slices(size)
        return [Chunk(self.name(part), self.stream, part, self.folder, self.tmp, self.drop_long) for part in parts]


def recorded_size(asked: Asked, engines: int, usual: int, path: Callable[[str], Path]) -> int:
    """Return the size of chunks that was recorded when this was first asked, at `path(key)`; record it where nobody did.

    A run that was begun before sizes were recorded goes on with the size it had.
    """
    key, most = asked.name(asked.requests), LOOSE_FACTOR * usual
    record = path(key)
    if not record.exists():
        begun = asked.folder.is_dir() and finished(asked.cut(most), asked.model)
        size = most if begun else loose_size(asked.requests.height, engines, most)
        records.write(record, Cut(key=key, requests=asked.requests.height, engines=engines, size=size), asked.tmp)
    return records.read(record, Cut).size


def loose_size(requests: int, engines: int, most: int) -> int:
    """Return how many requests make a chunk so that `engines` have SHARES of them each, none of them idle."""
    share, whole = math.ceil(requests / (SHARES * engines)), math.ceil(requests / engines)
    return max(1, min(most, max(share, min(FEWEST, whole))))


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
