"""An engine, a trainer and a loader that do what a prompt or a spec tells them, for tests of Ray's actors and of what is around them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from selfkd.backend.base import REQUESTS, Chunk, Completion, OnSteps, Reply, Sampling, Trained, TrainSpec, write_chunk
from selfkd.backend.probe import Earlier
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import UsageError, WeightsError

OLD, NEW = Model("policy", "old", "0" * 64), Model("policy", "new", "1" * 64)
NUMERICS = {"threads": 1, "trainers": 1, "tensor_parallel": 1}


@dataclass
class Odd:
    """A configuration like vLLM's own: what is wrong with it is an error of pydantic that holds all arguments, and does not pickle."""

    heads: int
    cards: int

    @model_validator(mode="after")
    def divides(self) -> Odd:
        raise ValueError(f"{self.heads} attention heads must be divisible by {self.cards}")


class Toy:
    """An engine: it answers with its weights, and does what the first message of a request says."""

    def __init__(self, numerics: dict[str, Any], model: Model) -> None:
        self.numerics, self.model, self.weights, self.facts = numerics, model, "", {"torch": "toy"}

    def swap(self, model: Model) -> dict[str, Any]:
        if model.path == "broken":
            raise WeightsError("the probe differs", model.path, "Repeat the command.")
        if model.path == "crash":
            os._exit(1)
        if model.path == "odd":
            Odd(9, 2)
        before, self.model, self.weights = self.weights, model, model.digest
        return {"seconds": 0.1, "proved": True, "survived": 0.9 if before else None}

    def generate(
        self,
        chunk: Chunk,
        sampling: Sampling,
        on_tokens: Callable[[int, int], None] | None = None,
        following: Chunk | None = None,
    ) -> Reply:
        if following:
            (chunk.tmp / f"told-{following.key}").touch()
        for row in chunk.requests.iter_rows(named=True):
            self._obey(row["teacher_messages"][0]["content"], chunk.tmp)
            if on_tokens:
                on_tokens(1, 7)
        texts = [f"{self.weights[:4]} {seed} {len(chunk.requests)}" for seed in chunk.requests["seed"]]
        completions = [Completion(text, [1, 2], "stop", -1.0) for text in texts]
        path = write_chunk(chunk, self.model, completions, self.weights, self.facts)
        lie = "lie" in chunk.requests["teacher_messages"].list.first().struct.field("content").to_list()
        return Reply(chunk.key, path, "f" * 64 if lie else self.weights, 2 * len(texts), 0.1)

    def _obey(self, order: str, tmp: Path) -> None:
        word, *number = order.split()
        if word == "sleep":
            time.sleep(float(number[0]))
        if word == "meet":
            _meet(tmp)
        if word == "fail":
            raise RuntimeError("CUDA error: an illegal memory access")
        if word == "refuse":
            raise UsageError("prompt 7 is too long", "prompts", "Drop it.")
        if word in ("die", "hang") or (word in ("die-once", "hang-once") and _first(tmp / word)):
            os.kill(os.getpid(), signal.SIGKILL) if word.startswith("die") else time.sleep(600)

    def logprobs(self, rows: pl.DataFrame) -> list[tuple[str, float, int]]:
        for messages in rows["messages"] if "messages" in rows.columns else ():
            self._obey(messages[0]["content"], Path())
        return [(name, -float(len(self.weights)), 3) for name in rows["id"]]

    def close(self) -> None:
        self.weights = ""


class Sleeper(Toy):
    """An engine that marks in `numerics["marks"]` that it sleeps, with the cards that it sees; the model `restless` dies
    of falling asleep, and `stuck` never does."""

    def __init__(self, numerics: dict[str, Any], model: Model) -> None:
        super().__init__(numerics, model)
        self.facts = {"cards": os.environ["CUDA_VISIBLE_DEVICES"], "pid": os.getpid()}
        self._mark = Path(numerics["marks"]) / self.facts["cards"]

    def sleep(self) -> None:
        if self.model.path == "restless":
            os._exit(1)
        if self.model.path == "stuck":
            time.sleep(600)
        self._mark.touch()

    def before_update(self, rows: list[Path], pairs: bool, max_length: int) -> Earlier:
        return Earlier(self.weights, {(1, 2): [-1.0]})

    def wake(self, model: Model, earlier: Earlier | None = None) -> dict[str, Any]:
        self._mark.unlink()
        return {**self.swap(model), "proved": f"scored under {earlier.weights[:4]}" if earlier else "nothing was scored"}


class Sitter:
    """An actor that says where it sits: on which cards, and how nice it is."""

    def __init__(self, cards: str | None = None) -> None:
        self.cards = os.environ.get("CUDA_VISIBLE_DEVICES", "") if cards is None else cards

    def where(self) -> tuple[str, int]:
        return self.cards, os.nice(0)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _meet(tmp: Path, seconds: float = 120.0) -> None:
    """Wait until two processes are here, so that no engine answers for both however late the other one starts."""
    (tmp / f"here-{os.getpid()}").touch()
    until = time.monotonic() + seconds
    while len(list(tmp.glob("here-*"))) < 2:
        assert time.monotonic() < until, "nobody else came"
        time.sleep(0.02)


def _first(mark: Path) -> bool:
    """True for the one process that comes first."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def learn(
    start: Model, reference: Model | None, rows: list[Path], spec: TrainSpec, out: Path, numerics: Any, on_progress: OnSteps
) -> Trained:
    """A trainer that does what `spec.trl` says."""
    on_progress({"step": 1, "steps": 1, "loss": 0.5, "tokens": 9, "seconds": 0.1})
    if spec.trl.get("hang") or (spec.trl.get("hang-once") and _first(out.with_suffix(".hung"))):
        on_progress({"step": 1, "steps": 2, "loss": 0.5, "tokens": 9, "seconds": 0.1})
        time.sleep(600)
    if spec.trl.get("bug"):
        raise KeyError("completion")
    if spec.trl.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    _write(out, {"parent": start.digest, "name": out.name})
    asleep = sorted(path.name for path in Path(numerics["marks"]).iterdir()) if "marks" in numerics else None
    seen = {"cards": os.environ.get("CUDA_VISIBLE_DEVICES"), "asleep": asleep}
    return Trained(out, {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"], **seen}, {})


def learn_together(
    start: Model, reference: Model | None, rows: list[Path], spec: TrainSpec, out: Path, numerics: Any, on_progress: OnSteps
) -> Trained:
    """A trainer whose ranks add up their numbers; rank 1 does before what `spec.trl` says, and leaves the others waiting."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    on_progress({"step": 1, "steps": 1, "loss": 0.5, "tokens": 9, "seconds": 0.1})
    if rank == 1 and (spec.trl.get("die") or (spec.trl.get("die-once") and _first(out.with_suffix(".died")))):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and spec.trl.get("refuse"):
        raise UsageError("row 7 is too long", "rows", "Drop it.")
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    variables = {name: os.environ[name] for name in names}
    return Trained(out, {"sum": int(total), "rank": rank, "pid": os.getpid(), "variables": variables}, {})


def fetch(source: dict[str, Any], out: Path, dither: int | None, asked: Any = None) -> dict[str, Any]:
    if "hub" in source:
        raise UsageError(f"no network to reach {source['hub']}", "model", "Give a local folder.")
    _write(out, {"parent": None})
    return {"dither": dither, "pid": os.getpid(), "context": asked.context if asked else None}


def _write(out: Path, weights: dict[str, Any]) -> None:
    out.mkdir(parents=True)
    (out / "weights.json").write_text(json.dumps(weights))


def chunks_of(tmp: Path, *orders: str) -> list[Chunk]:
    """One chunk of two requests per order."""
    return [chunk_of(tmp, [order, "answer"], number) for number, order in enumerate(orders)]


def chunk_of(tmp: Path, contents: list[str], number: int = 0) -> Chunk:
    rows = [
        {
            "id": f"{number}-{k}",
            "prompt": f"p{k}",
            "number": k,
            "seed": 100 * number + k,
            "tiebreak": 0.5,
            "teacher_messages": [{"role": "user", "content": text}],
        }
        for k, text in enumerate(contents)
    ]
    requests = pl.DataFrame(rows, schema=REQUESTS)
    (tmp / "tmp").mkdir(exist_ok=True)
    return Chunk(digest.of(number, contents), "samples", requests, tmp / "data", tmp / "tmp")


def texts(reply: Reply) -> list[str]:
    return pl.read_parquet(reply.path)["text"].to_list()


def links(folder: Path) -> list[str]:
    """What the links of a folder point to, as in /proc/PID/fd; nothing where it may not be read."""
    try:
        return [os.readlink(path) for path in folder.iterdir()]
    except OSError:
        return []
