"""How much memory a model takes while it is trained and while it answers: arithmetic on its sizes, part by part, in bytes.

Knows neither machines nor recipes, imports nothing heavy, and measures nothing: benchmarks/memory.py compares it with what is
measured. What is said of cards follows from the sources of torch, TRL and vLLM; no card has shown it yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from selfkd.backend.model_sizes import Sizes
from selfkd.backend.nf4 import BYTES

GIB = 2**30
FP32, HALF = 4, 2
Parts = Mapping[str, int]  # {what: bytes}

# Bytes of state for each trained number, by optimiser; AdamW, the default, holds two numbers in fp32.
OPTIMISERS = {"adafactor": 0.0, "sgd": 0.0, "rmsprop": 4.0, "adagrad": 4.0, "lion": 4.0, "ademamix": 12.0}
ADAM = 8.0
OFFLOAD_LOT = 1 << 26  # numbers whose state is on the card at a time where it lies in the machine's memory: 512 MiB of AdamW's
# TRL's output head works in tiles of so many tokens and so many words of the vocabulary; ours on a CPU holds logits whole up to so many.
TILE_TOKENS, TILE_WORDS, WHOLE_LOGITS = 4096, 32768, 1 << 27
CARD_TILES, CPU_TILES = (
    2.0,
    8.5,
)  # tiles at once: Triton works in place, torch's own operations do not (measured at 32,768 tokens)
# Distillation makes logits of teacher and student for so many elements at a time, in so many tables of them.
PIECE_ELEMENTS, PIECE_TABLES = 1 << 24, 12
# What a process takes without a model: Python, torch and the libraries around it; on a card CUDA's context and what its libraries keep.
RANK_PROCESS, ENGINE_PROCESS, CARD_CONTEXT = int(0.58 * GIB), int(1.3 * GIB), GIB
# vLLM: tokens and requests of one step on cards of 70 GiB and more, and on smaller ones; and what its recorded graphs take.
LARGE_CARD, LARGE_STEP, SMALL_STEP = 70 * GIB, (16384, 1024), (8192, 256)
GRAPHS = GIB // 2
CPU_STEP_TOKENS = 4096


@dataclass(frozen=True)
class Training:
    """How an update is made, as far as memory goes.

    `rows` go through the model at once on one rank, each of `sequences` of `row_tokens`, of which `learned` are the answer's.
    `shards`: over how many ranks weights, gradients and optimiser are spread; `rank`: of the
    adapter that learns, 0 where all weights do; `rounded`: the weights beneath it lie there in 16 bits; `four_bits`: their layers in 4;
    `offloaded`: the optimiser's state lies in the machine's memory. `taught`: at each token the model is compared with a teacher's whole
    distribution; `teacher`: that one's weights lie beside it, as a copy of their own.
    """

    rows: int
    row_tokens: int
    learned: int
    sequences: int = 1
    accumulation: int = 1
    bf16: bool = True
    checkpointing: bool = False
    optimiser: str = "adamw_torch_fused"
    ranks: int = 1
    on_card: bool = True
    shards: int = 1
    rank: int = 0
    rounded: bool = False
    offloaded: bool = False
    four_bits: bool = False
    taught: bool = False
    teacher: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.sequences * self.row_tokens

    @property
    def gradients_wait(self) -> bool:
        """Whether gradients lie there while activations are at their most: else the ones are made as the others are let go."""
        return self.accumulation > 1 or self.ranks > 1


@dataclass(frozen=True)
class Need:
    """What a process needs at its peak. `certain` lies there at once whatever the rows are; `passing` comes and goes with them.

    `replaced`: bytes of `certain` that are not there yet when the passing ones are. `libraries`: what programs and mapped files
    take of a machine's memory, a part of which it can do without. `host`: what it holds of a process on a card.
    """

    certain: Parts
    passing: Parts
    replaced: int = 0
    libraries: int = 0
    host: int = 0

    @property
    def least(self) -> int:
        return sum(self.certain.values())

    @property
    def peak(self) -> int:
        return self.libraries + max(self.least, self.least - self.replaced + sum(self.passing.values()))

    def times(self, count: int) -> Need:
        """Return what so many processes need that each need this."""
        certain, passing = ({name: count * size for name, size in parts.items()} for parts in (self.certain, self.passing))
        return Need(certain, passing, count * self.replaced, count * self.libraries, count * self.host)


# ---- training ----


def of_training(sizes: Sizes, how: Training) -> Need:
    """Return what one rank needs for an update."""
    trained = adapter(sizes, how.rank) if how.rank else sizes.parameters
    optimiser = int(optimiser_bytes(how.optimiser) * trained) // how.shards
    away = optimiser if how.offloaded and how.on_card else 0
    lot = min(optimiser, int(optimiser_bytes(how.optimiser) * OFFLOAD_LOT))
    states = {
        "weights": (_frozen(sizes, how) + FP32 * trained if how.rank else FP32 * trained) // how.shards,
        "gradients": FP32 * trained // how.shards,
        "optimiser": lot if away else optimiser,
        **({"CUDA": CARD_CONTEXT} if how.on_card else {}),
        **({"teacher": _teacher(sizes, how)} if how.teacher else {}),
    }
    passing = {"activations": activations(sizes, how), "logits": logits(sizes, how)}
    if how.shards > 1:
        passing["gathered"] = gathered(sizes, how)
    elif how.bf16:
        cast = sizes.embedding + trained if how.rounded or how.four_bits else sizes.parameters
        passing["bf16 copies"] = HALF * cast
    if how.four_bits:
        passing["unpacked layer"] = (HALF if how.bf16 else FP32) * sizes.hidden * max(sizes.inner, sizes.attended)
    # On a CPU a copy more was measured: of checkpoints that are read and written, whose files are mapped.
    beside = 0 if how.on_card else RANK_PROCESS + FP32 * sizes.parameters
    return Need(states, passing, 0 if how.gradients_wait else states["gradients"], beside, away)


def adapter(sizes: Sizes, rank: int) -> int:
    """Return how many numbers an adapter of this rank has at most: two matrices at every linear layer of the blocks."""
    attention = 2 * (sizes.hidden + sizes.attended) + 2 * (sizes.hidden + sizes.kept)
    return rank * sizes.layers * (attention + 3 * (sizes.hidden + sizes.inner))


def _frozen(sizes: Sizes, how: Training) -> int:
    """Return the bytes of the weights beneath an adapter; the embedding is no product, and stays as it is, as a head of its own does beside 4 bits."""
    if how.four_bits:
        head = 0 if sizes.tied else (HALF if how.rounded else FP32) * sizes.embedding
        layers = sizes.parameters - sizes.embedding * (1 if sizes.tied else 2)
        return int(BYTES * layers) + FP32 * sizes.embedding + head
    return FP32 * sizes.parameters - (FP32 - HALF) * (sizes.parameters - sizes.embedding) * how.rounded


def gathered(sizes: Sizes, how: Training) -> int:
    """Return what a divided model gathers at its most: the output head in fp32, the block that computes, and the next one."""
    blocks = sizes.parameters - sizes.embedding * (1 if sizes.tied else 2)
    return FP32 * sizes.embedding + 2 * (HALF if how.bf16 else FP32) * blocks // sizes.layers


def _teacher(sizes: Sizes, how: Training) -> int:
    """Return the bytes of a teacher's own weights on a rank: its products in 16 bits where all is computed so."""
    return (HALF * (sizes.parameters + sizes.embedding) if how.bf16 else FP32 * sizes.parameters) // how.shards


def optimiser_bytes(name: str) -> float:
    """Return the bytes of state that an optimiser of transformers keeps for each number."""
    kind = next((kind for kind in OPTIMISERS if name.removeprefix("paged_").startswith(kind)), None)
    whole = ADAM if kind is None else OPTIMISERS[kind]
    return whole / 4 if "8bit" in name else whole


def activations(sizes: Sizes, how: Training) -> int:
    """Return the bytes that forward leaves for backward. With checkpointing a layer leaves its input, and one is computed again whole."""
    layer = how.tokens * _layer(sizes, how)
    if not how.checkpointing:
        return sizes.layers * layer
    return sizes.layers * how.tokens * FP32 * sizes.hidden + layer


def _layer(sizes: Sizes, how: Training) -> int:
    """Return the bytes that one layer keeps of one token.

    In fp32 whatever the precision: what enters each of two norms, and what leaves it before its weight. In the format of the compute: what
    enters each product, queries, keys, values and what attention gives, the gate before and after its activation, and its partner.
    """
    width = HALF if how.bf16 else FP32
    attention = HALF if how.bf16 and how.on_card else FP32  # on a CPU attention is computed in fp32
    norms = 4 * FP32 * sizes.hidden
    products = width * (2 * sizes.hidden + sizes.attended + sizes.inner)
    layer = norms + products + attention * 2 * (sizes.attended + sizes.kept) + width * 3 * sizes.inner
    return layer + (width * _given(sizes) if how.rank and not how.on_card else 0)


def _given(sizes: Sizes) -> int:
    """Return how wide all that gives is which an adapter adds to.

    Backward needs none of it, but small tensors that it needs come to lie between: measured, a CPU's allocator holds the holes.
    """
    return sizes.attended + 2 * sizes.kept + 2 * sizes.hidden + 2 * sizes.inner


def logits(sizes: Sizes, how: Training) -> int:
    """Return what the output head holds at its peak: logits and their log-softmax whole, or in tiles with the head's own gradient.

    Compared with a teacher: tables of a few tokens at a time, and that gradient.
    """
    tokens = how.rows * how.sequences * how.learned
    if how.taught:
        return (
            FP32 * PIECE_TABLES * min(max(PIECE_ELEMENTS, sizes.vocabulary), tokens * sizes.vocabulary) + FP32 * sizes.embedding
        )
    if not how.on_card and tokens * sizes.vocabulary <= WHOLE_LOGITS:
        return 2 * FP32 * tokens * sizes.vocabulary
    tile = min(tokens, TILE_TOKENS) * min(sizes.vocabulary, TILE_WORDS)
    return int((CARD_TILES if how.on_card else CPU_TILES) * FP32 * tile) + FP32 * sizes.embedding


# ---- answering ----


@dataclass(frozen=True)
class Serving:
    """How an engine answers, as far as memory goes. `spread`: over how many cards; `step`: tokens and requests of one step."""

    context: int
    step: tuple[int, int]
    width: int = HALF
    spread: int = 1
    on_card: bool = True


def of_engine(sizes: Sizes, how: Serving, keys_and_values: int | None = None) -> Need:
    """Return what an engine needs on each of its cards, with keys and values for one answer, or for so many bytes of them.

    On a CPU these are taken as they are used.
    """
    weights = sizes.parameters + (0 if how.on_card or not sizes.tied else sizes.embedding)
    kept = {"KV cache": how.context * token_bytes(sizes, how) if keys_and_values is None else keys_and_values}
    held, step = {"weights": how.width * weights // how.spread}, {"activations": _step(sizes, how)}
    if how.on_card:
        return Need({**held, **kept, "CUDA": CARD_CONTEXT, "graphs": GRAPHS}, step)
    return Need(held, {**step, **kept}, libraries=ENGINE_PROCESS)


def token_bytes(sizes: Sizes, how: Serving) -> int:
    """Return what keys and values of one token take on each card; heads that are fewer than cards lie on several."""
    return 2 * sizes.layers * sizes.head_size * how.width * -(-sizes.kv_heads // how.spread)


def _step(sizes: Sizes, how: Serving) -> int:
    """Return what the largest step makes: of each token the widest layer, of each request logits in fp32 and a copy to draw from."""
    tokens, requests = how.step
    layer = 4 * sizes.hidden + (3 * sizes.inner + sizes.attended + 2 * sizes.kept) // how.spread
    return tokens * how.width * layer + requests * 2 * FP32 * sizes.vocabulary


def usual_step(card: int | None) -> tuple[int, int]:
    """Return how many tokens and requests vLLM takes into one step: on a card of so many bytes, or on a CPU (None)."""
    if card is None:
        return CPU_STEP_TOKENS, 128
    return LARGE_STEP if card >= LARGE_CARD else SMALL_STEP
