"""What may be asked of machines: the protocol of a backend, and the data that goes in and comes out.

Ray, vLLM and TRL live behind this file: nothing here imports torch, ray, vllm or trl, and nothing here knows a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, Protocol, TypedDict

import polars as pl

from selfkd.backend.reading import Read, Reading
from selfkd.core import digest, storage
from selfkd.core.facts import Facts
from selfkd.core.pool import IDS, LOGPROBS, MESSAGES, Function, Model, shape

REPORT_SECONDS = 1.0  # between two reports of progress
TOO_LONG = "too long"  # finish_reason of a request that was not asked, because the context does not hold it with its answer
REQUESTS: dict[str, Any] = {
    "id": pl.String,
    "prompt": pl.String,
    "number": pl.Int32,
    "parents": pl.List(pl.String),
    "seed": pl.Int64,
    "tiebreak": pl.Float64,
    "teacher_messages": MESSAGES,
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
    whole if it was interrupted. `key` names it by content. Its answers wait in `tmp` until it is proved which weights gave
    them; then they lie in `folder` as one immutable file named `prefix` + the hash of its bytes.
    `drop_long`: a request that the context does not hold with its answer is answered by `NOT_ASKED`, and does not end the run.
    A column `begun` says how the answers begin, where they do: the engine goes on from there.
    """

    key: str
    stream: str
    requests: pl.DataFrame
    folder: Path
    tmp: Path
    drop_long: bool = False

    @property
    def begun(self) -> list[str]:
        """Return how the answer to each request begins."""
        return self.requests["begun"].to_list() if "begun" in self.requests.columns else [""] * self.requests.height

    @property
    def prefix(self) -> str:
        """Return how the name of this chunk's file begins: half of the key, which is still unique."""
        return f"{self.key[:32]}."


@dataclass(frozen=True)
class Completion:
    """One answer. `token_ids` are as sampled, with the end token if the model wrote one, and end where the text ends.

    `finish_reason` is 'stop' where the answer ended by itself or at a stop string. `logprob` is the sum over `token_ids`; None where
    it was not asked for, or where a stop string began inside a token, so that the last ids were never drawn. `logprobs` are its parts.
    """

    text: str
    token_ids: Sequence[int]
    finish_reason: str
    logprob: float | None
    logprobs: Sequence[float] | None = None


NOT_ASKED = Completion("", (), TOO_LONG, None)


@dataclass(frozen=True)
class Reply:
    """A finished chunk: where its file waits, and the digest of the weights that the engine proved to hold."""

    key: str
    path: Path
    weights: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Questions:
    """All that a run will ask: files with the columns QUESTIONS, and the `context` that a prompt and its answer share, in tokens.

    `place` is how an error names the prompt, `step` who asks it, `room` the most tokens of its answer. `shapes` are files of what is
    asked about samples: only its roles are known yet. `words` are the recipe's `chat`, `now` is when the run was created.
    """

    files: Sequence[Path]
    context: int
    shapes: Sequence[Path] = ()
    words: Mapping[str, Any] = field(default_factory=dict)
    now: str = ""


QUESTIONS: dict[str, Any] = {
    "id": pl.String,
    "split": pl.String,
    "place": pl.String,
    "step": pl.String,
    "room": pl.Int32,
    "messages": MESSAGES,
}


class LongPrompt(TypedDict):
    """A prompt that does not fit: its own tokens, and those that it may have."""

    id: str
    split: str
    place: str
    tokens: int
    limit: int


# Id of a row, sum over the log-probabilities of its answer, tokens summed over. NaN where it could not be scored: then tokens are those of
# prompt and answer together where the context does not hold them, and 0 where nothing stands before the first one.
Logprob = tuple[str, float, int]


class Maker(NamedTuple):
    """Who made a file of answers: the digest of the weights, and that of the facts of the engine's process."""

    weights: str
    facts: str


def made_by(path: Path) -> Maker:
    """Return what a file of answers says of its maker; empty texts where it says nothing."""
    said = pl.read_parquet_metadata(path)
    return Maker(said.get("weights", ""), said.get("facts", ""))


def write_chunk(chunk: Chunk, model: Model, completions: Sequence[Completion], weights: str, facts: Facts) -> Path:
    """Write the samples of a chunk as one file in its `tmp`; called by whoever generated them, in its own process.

    The file says inside which weights and which facts made it. Whoever asked compares them, and only then gives it its name.
    An answer that was begun is whole there, its beginning included: nobody drew that, so it has no ids and no log-probability.
    """
    begun = [begin if one.finish_reason != TOO_LONG else "" for begin, one in zip(chunk.begun, completions, strict=True)]
    texts = [begin + completion.text for begin, completion in zip(begun, completions, strict=True)]
    ids = [None if begin else list(completion.token_ids) for begin, completion in zip(begun, completions, strict=True)]
    counts = [len(completion.token_ids) for completion in completions]
    logprobs = [None if begin else completion.logprob for begin, completion in zip(begun, completions, strict=True)]
    of_tokens = [None if begin else one.logprobs and list(one.logprobs) for begin, one in zip(begun, completions, strict=True)]
    frame = chunk.requests.with_columns(
        pl.lit(chunk.stream).alias("stream"),
        pl.lit(str(model)).alias("model"),
        pl.Series("finish_reason", [completion.finish_reason for completion in completions], pl.String),
        pl.Series("logprob", logprobs, pl.Float64),
        pl.Series("text", texts, pl.String),
        pl.Series("chars", [len(text) for text in texts], pl.Int32),
        pl.Series("tokens", counts, pl.Int32),
        pl.Series("token_ids", ids, pl.List(pl.Int32)),
        pl.Series("token_logprobs", of_tokens, LOGPROBS),
    )
    about = Maker(weights, digest.of(facts))._asdict()
    return storage.write_parquet(shape("samples", frame), chunk.tmp / "answers", chunk.tmp, about=about)


@dataclass(frozen=True)
class Saves:
    """Where an update in progress keeps its checkpoints, and every how many minutes it makes one; 0 is never.

    `key` names the update by content: a checkpoint of another one is not used.
    """

    folder: Path
    key: str
    minutes: float = 10.0


@dataclass(frozen=True)
class OptimiserState:
    """Where the state of an optimiser lies that another update left, and the digest of what it is."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class LoraSpec:
    """How an adapter is made (Hu et al. 2021, arXiv 2106.09685): W + scale · B·A, B and A of rank `r`, scale alpha / r (`rslora`: alpha / √r).

    `targets` end the names of the modules that it changes; empty is every linear layer of the blocks. `goes_on`: with the adapter that
    the start is, if it is one; else what the start is, an adapter included, lies still beneath a new one. `quantise`: nf4 where what lies
    still lies there in 4 bits.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    serve: str = "auto"
    goes_on: bool = False
    quantise: str = ""


@dataclass(frozen=True)
class DivergenceSpec:
    """How far a student's next-token distribution is from its teacher's, p the teacher's and q the student's.

    `kind`: forward is KL(p, q), reverse KL(q, p), jsd beta * KL(p, m) + (1 - beta) * KL(q, m) with m = beta * p + (1 - beta) * q
    (Agarwal et al. 2023, arXiv 2306.13649). Both logits are divided by `temperature`. `top_k`: only the teacher's likeliest so many
    tokens, and one bucket for all others; 0 is all. A token counts at most `clip`, an entry of the vocabulary at one token at most
    `clip_entry`; 0 is no limit. Of an answer the tokens from `skip` on count, and at most `first` of it are read; 0 is all.
    """

    kind: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    clip: float = 0.0
    clip_entry: float = 0.0
    skip: int = 0
    first: int = 0


@dataclass(frozen=True)
class TrainSpec:
    """One update. `trl` passes checked options through to TRL's config; lengths are in tokens.

    `loss` names a row of trainer.loss_kinds.LOSSES, or a function of a file. For a loss on pairs, `beta` is the strength of the tie to the reference
    model, and `nll` adds that multiple of the chosen answer's length-normalised negative log-likelihood (IRPO, arXiv 2404.19733).
    `precision` 'auto' is that of the run's numerics. With `lora` all weights stay as they are, and an adapter learns. `saves` says
    where it goes on from, if it was stopped before; None makes no checkpoints. `state` is what its optimiser begins with (None:
    nothing), and with `keeps_state` it leaves its own. `until` is the optimiser step at which it hands out the model as it is then, with a
    checkpoint from which the rest goes on; None: its last one. `function` gives each row of the kind `rows` its value, where the loss is a
    function, and `average` says over what the values of an optimiser step are averaged. `divergence` is measured from a teacher, which then
    stands in the place of the reference model; None there is the model that learns itself, as it is at each step. `sampled` is a file that
    says how likely the rows' answers were to the engine that sampled them (columns SAMPLED): it decides nothing.
    """

    loss: str
    seed: int
    beta: float = 0.1
    nll: float = 0.0
    max_length: int = 1024
    precision: str = "fp32"
    trl: Mapping[str, Any] = field(default_factory=dict)
    saves: Saves | None = None
    lora: LoraSpec | None = None
    state: OptimiserState | None = None
    keeps_state: bool = False
    until: int | None = None
    function: Function | None = None
    rows: str = ""
    average: str = "rows"
    divergence: DivergenceSpec | None = None
    sampled: Path | None = None


# The log-probability of each token of a row's answer under the engine that drew it, with the weights that training starts from.
SAMPLED: dict[str, Any] = {"row": pl.String, "ids": IDS, "logprobs": LOGPROBS}


@dataclass(frozen=True)
class Trained:
    """What a trainer leaves: a folder under tmp/ holding fp32 weights, or an adapter of its start's, its numbers, and the rows it refused.

    metrics: steps, loss_first, loss_last, seconds, tokens, update_norm, …; drops: {row id: reason}. The folder also holds
    `probe.json` (digest excluded): token sequences on which parent and child differ most, with both log-probabilities.
    `state` is the folder of the optimiser's, where the update was to leave it. `whole`: its last step was made, and not `until` alone.
    `checks` say what the models inside the update were measured to be, where they were; no trainer fills them. `of` is how many steps
    the whole update has, where the trainer says so.
    """

    folder: Path
    metrics: Mapping[str, Any]
    drops: Mapping[str, str]
    state: Path | None = None
    whole: bool = True
    checks: Mapping[str, Any] = field(default_factory=dict)
    of: int = 0


class AnswerProgress(TypedDict):
    """How far a call of `generate`, `logprobs` or `read` is, beyond the results that it has yielded already.

    requests and tokens are those of unfinished chunks; chunks counts the finished ones, waiting those still to come.
    """

    requests: int
    tokens: int
    chunks: int
    waiting: int


class TrainProgress(TypedDict):
    """What is known after an optimiser step: which of how many, its loss, the tokens and the seconds up to here.

    `said` and `warning` are what a person should hear, once. `computers` are (process, facts) of ranks that made the steps so far.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    seconds: float
    said: NotRequired[str]
    warning: NotRequired[str]
    computers: NotRequired[Sequence[tuple[str, Facts]]]


OnAnswers = Callable[[AnswerProgress], None]
OnSteps = Callable[[TrainProgress], None]


def nobody_listens(progress: AnswerProgress | TrainProgress) -> None:
    """Ignore progress: what a backend reports to when its caller asks for no reports."""


class Backend(Protocol):
    """Machines. Every call is idempotent: an interrupted one is simply made again.

    The calls that take long report to the `on_progress` of that call now and then, and never after it has ended.
    """

    name: str

    def numerics(self) -> dict[str, Any]:
        """Return what fixes the numbers of this run: dtype, threads, concurrent sequences, KV blocks, package versions."""

    def facts(self) -> dict[str, Facts]:
        """Return what each engine and each rank that came up so far computes with, by name: engine-0, trainer-1."""

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        """Bring the root of a chain (hub id, folder, GGUF) into `out` as fp32; `dither` is a seed or None. Return notes.

        The note `long` lists, as `LongPrompt`, those of the questions `asked` that do not fit into the context of model and run. The note
        `refused` lists those that the chat template refuses, and then nothing else is done; `chat` says what it does to the others.
        """

    def generate(
        self, model: Model, chunks: Sequence[Chunk], sampling: Sampling, on_progress: OnAnswers = nobody_listens
    ) -> Iterator[Reply]:
        """Answer chunks in any order. The caller closes the iterator to abandon what is in flight."""

    def logprobs(self, model: Model, rows: pl.DataFrame, on_progress: OnAnswers = nobody_listens) -> Iterator[Logprob]:
        """Yield (id, sum over log-probabilities, tokens) of each row's answer after its `messages`, under `model`.

        The answer is `token_ids` (or `text` where nobody sampled it), and one end token where `finish_reason` is 'stop': the ids
        that a training row would have. With a column `given`, only what follows that beginning of `text` counts; where the column `sums`
        says 'probability', probabilities are added up and not their logarithms. One that the context does not hold is NaN.
        """

    def read(
        self, model: Model, reading: Reading, rows: pl.DataFrame, on_progress: OnAnswers = nobody_listens
    ) -> Iterator[Read]:
        """Yield what `model` reads of each text (columns TEXTS), in their order. It answers nothing and is gone afterwards."""

    def train(
        self,
        start: Model,
        reference: Model | None,
        rows: Sequence[Path],
        spec: TrainSpec,
        out: Path,
        on_progress: OnSteps = nobody_listens,
    ) -> Trained:
        """Update `start` on row files (table `rows`), writing the child under `out`."""

    def average(self, models: Sequence[tuple[Model, float]], out: Path) -> None:
        """Write the weighted average of full weights into `out`, as the trainer leaves a model; shares are divided by their sum."""

    def lengths(self, model: Model, rows: pl.DataFrame) -> list[int]:
        """Return how many tokens of its answers a loss would learn of each row of table `rows`, with the tokenizer of `model`."""

    def swap_notes(self) -> dict[str, Any]:
        """Return notes on the last weight swap: seconds, proved (true, false, or why not), and the share of the update that survived."""

    def close(self) -> None: ...
