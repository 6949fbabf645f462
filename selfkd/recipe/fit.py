"""Whether a recipe fits on a machine: what each card, or the memory of a CPU, holds at its peak, and what would fit instead.

From the sizes of the model and from words alone; starts nothing. `certain` is there whatever the answers are, and what that alone does not
fit is refused; what only long answers do not fit is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, groupby
from typing import Any

from selfkd.backend import memory
from selfkd.backend.bf16 import flags_here
from selfkd.backend.engine.vllm_options import Card, memory_share
from selfkd.backend.machine import CPU_SEQUENCES, Machine, chosen_generator
from selfkd.backend.memory import GIB, Need, Serving, Training
from selfkd.backend.model_sizes import Sizes
from selfkd.backend.ray import placement
from selfkd.backend.trainer.batches import FLAT_TOKENS, cut, share
from selfkd.backend.trainer.trl_options import BATCH, OF_TORCH, for_loss
from selfkd.core.accelerator import accelerator
from selfkd.core.hardware import total_memory
from selfkd.core.number_format import BYTES, in_hardware, of_training
from selfkd.errors import UsageError
from selfkd.recipe.schema import Recipe
from selfkd.steps.build import BuildStep
from selfkd.steps.train import TrainStep

DRIVER = GIB // 2
ADAPTER_RANK = 16  # of the one that is offered


@dataclass(frozen=True)
class Place:
    """What there is: bytes of each card, none where the CPU computes; bytes of the machine's own memory, None where not known."""

    cards: tuple[int, ...] = ()
    memory: int | None = None

    @classmethod
    def of(cls, machine: Machine) -> Place:
        """Return what a machine file states, else what is here."""
        own = int(machine.memory_gb * GIB) or None
        if machine.cards:
            return cls((int(machine.card_gb * GIB),) * machine.cards, own)
        return cls((), own) if own else cls.here()

    @classmethod
    def here(cls) -> Place:
        """Return what this machine has."""
        return cls(tuple(card.total for card in accelerator().cards), total_memory())


@dataclass(frozen=True)
class Lengths:
    """Tokens of a training sequence, and those of its answer."""

    row: int
    answer: int


@dataclass(frozen=True)
class Load:
    """What is asked of one place in one stage of a round: of a card, of several that are asked the same, or of the memory."""

    where: str
    stage: str
    room: int
    need: Need
    more: str = ""

    @property
    def name(self) -> str:
        return f"{self.where}, {self.stage}"

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(size)}" for name, size in self._parts().items() if size)
        way = "; gradients grow while activations shrink, so the smaller of the two is not added" if self.need.replaced else ""
        return f"up to {gib(self.need.peak)} of {gib(self.room)} GiB: {parts}{way}{self.more}{self._verdict()}"

    def _parts(self) -> Mapping[str, int]:
        return {**self.need.certain, **self.need.passing, "libraries": self.need.libraries}

    def _verdict(self) -> str:
        if self.fits:
            return ""
        return ". DOES NOT FIT" if self.need.least > self.room else ". May not fit, where answers are as long as they may be"

    @property
    def fits(self) -> bool:
        return self.need.peak <= self.room


def gib(size: float) -> str:
    """Return bytes in GiB, as a person reads them.

    >>> gib(3 * 2**30), gib(2**20)
    ('3.0', '0.0')
    """
    return f"{size / GIB:.1f}"


def words_of(machine: Machine, place: Place) -> dict[str, Any]:
    """Return what a run with this machine file would be fixed to, as far as memory goes; nothing is timed and no card is asked."""
    quick = bool(place.cards) or bool(in_hardware(flags_here()))
    dtype = machine.dtype if machine.dtype != "auto" else "bfloat16" if quick else "float32"
    chosen = {"dtype": dtype, "precision": "bf16" if quick and dtype != "float32" else "fp32"}
    return {**machine.words(), **chosen, "threads": machine.threads or 1, "generator": chosen_generator(machine)}


# ---- what is asked ----


def loads(
    recipe: Recipe, machine: Machine, words: Mapping[str, Any], sizes: Sizes, lengths: Lengths, place: Place
) -> list[Load]:
    """Return what each card and the machine's memory are asked for; UsageError where there are too few cards at all.

    `words` are the numerics of a run, or those that it would have.
    """
    trainings = list(updates(recipe, words, lengths, bool(place.cards)))
    served = serving(recipe, words, place)
    if place.cards:
        cards = _on_cards(machine, words, sizes, trainings, served, place)
        return [*cards, *_on_the_host(machine, words, sizes, trainings, place)]
    return list(_on_a_cpu(machine, words, sizes, trainings, served, place)) if place.memory else []


def updates(recipe: Recipe, words: Mapping[str, Any], lengths: Lengths, on_card: bool) -> Iterator[Training]:
    """Yield how each train step of the recipe is made, each way once."""
    steps = [step for index in range(recipe.rounds + 1) for step in recipe.steps_of(index)]
    ranked = {step.as_: step.answers for step in steps if isinstance(step, BuildStep) and step.kind == "rank"}
    trained = [step for step in steps if isinstance(step, TrainStep)]
    yield from dict.fromkeys(training(step, words, lengths, on_card, ranked.get(step.of, 0)) for step in trained)


def training(step: TrainStep, words: Mapping[str, Any], lengths: Lengths, on_card: bool, answers: int = 0) -> Training:
    """Return how one train step is made: its own words over those of the machine; `answers` are those of a row that ranks some."""
    options: dict[str, Any] = {**for_loss(step.loss, words.get("trainer", {})), **step.trl}
    ranks, sequences = words["trainers"], answers or step.kind.sequences
    batch, accumulation = options.get("per_device_train_batch_size", BATCH), options.get("gradient_accumulation_steps", 1)
    split, bf16 = share(batch, accumulation, ranks), of_training(step.precision, words) == "bf16"
    if not on_card:
        split = cut(split, sequences * lengths.row, FLAT_TOKENS)
    return Training(
        rows=split.micro,
        row_tokens=lengths.row,
        learned=lengths.answer,
        sequences=sequences,
        accumulation=split.accumulation,
        bf16=bf16,
        checkpointing=bool(options.get("gradient_checkpointing")),
        optimiser=options.get("optim") or Training.optimiser,
        ranks=ranks,
        on_card=on_card,
        shards=ranks if words.get("shard") else 1,
        rank=step.lora.r if step.lora else 0,
        rounded=bool(step.lora) and bf16 and words["dtype"] == "bfloat16",
        offloaded=on_card and bool(words.get("trainer", {}).get("offload_optimiser")),
        four_bits=bool(step.lora and step.lora.quantise),
        taught=step.kind.teacher,
        teacher=step.copies_teacher(),
    )


def serving(recipe: Recipe, words: Mapping[str, Any], place: Place) -> Serving:
    """Return how an engine answers."""
    tokens, requests = memory.usual_step(min(place.cards) if place.cards else None)
    asked = words["engine"].get("max_num_batched_tokens") or max(tokens, recipe.context + 1)
    width, spread = BYTES.get(words["dtype"], memory.HALF), words["tensor_parallel"]
    return Serving(recipe.context, (asked, words["max_num_seqs"] or requests), width, spread, bool(place.cards))


def _on_cards(
    machine: Machine, words: Mapping[str, Any], sizes: Sizes, trainings: Sequence[Training], served: Serving, place: Place
) -> Iterator[Load]:
    """Yield the loads of each card, of neighbours that are asked the same together: while it trains, and while it answers."""
    planned = placement.plan(machine, words, True)
    placement.check(planned, [placement.Node(max(planned.cpus, 1), len(place.cards))], machine, words)
    seated = list(_seated(planned))
    worst = max((memory.of_training(sizes, how) for how in trainings), key=lambda need: need.peak, default=None)
    numbered = enumerate(zip(seated, place.cards, strict=False), start=1)
    for (has, room), same in groupby(numbered, key=lambda one: one[1]):
        numbers = [number for number, _ in same]
        where = f"card {numbers[0]}" if len(numbers) == 1 else f"cards {numbers[0]}-{numbers[-1]}"
        if has.rank and worst:
            yield Load(where, "training", room, _beside_a_sleeper(worst) if has.engine else worst)
        if has.engine:
            yield _answering(where, room, has, words, sizes, served)


@dataclass(frozen=True)
class _Seated:
    """Who sits on one card."""

    engine: bool
    rank: bool


def _seated(planned: placement.Plan) -> Iterator[_Seated]:
    """Yield who sits on each card of a plan, in the order of its bundles."""
    engines = {seat.bundle for seat in planned.engines}
    for number, bundle in enumerate(planned.bundles):
        ranks = sum(seat.bundle == number for seat in planned.ranks)
        yield from (_Seated(number in engines, card < ranks) for card in range(bundle["GPU"]))


def _beside_a_sleeper(need: Need) -> Need:
    """Return a need with what an engine keeps on the same card while it sleeps."""
    return replace(need, certain={**need.certain, "sleeping engine": memory.CARD_CONTEXT + memory.GRAPHS})


def _answering(where: str, card: int, has: _Seated, words: Mapping[str, Any], sizes: Sizes, served: Serving) -> Load:
    share_of_it = words["engine"].get("gpu_memory_utilization") or memory_share(Card(card, card), has.rank)
    room, need = int(share_of_it * card), memory.of_engine(sizes, served)
    one = need.certain["KV cache"]
    answers = 1 + (room - need.peak) // one
    more = f"; the rest holds {answers:,} answers of {served.context:,} tokens at once" if answers > 0 else ""
    return Load(where, "answering", room, need, more)


def _on_the_host(
    machine: Machine, words: Mapping[str, Any], sizes: Sizes, trainings: Sequence[Training], place: Place
) -> Iterator[Load]:
    """Yield what ranks on cards ask of the machine's memory: each reads the whole checkpoint there first, or its part of a divided model.

    Where the optimiser's state lies there, that too.
    """
    if place.memory is None:
        return
    ranks, processes = words["trainers"], _processes(machine, words)
    copies = 1 if words.get("shard") else ranks
    need = Need({"weights": copies * memory.FP32 * sizes.parameters}, {}, libraries=processes)
    yield Load("memory", "loading", place.memory, need)
    if state := max((memory.of_training(sizes, how).host for how in trainings), default=0):
        yield Load("memory", "training", place.memory, Need({"optimiser": ranks * state}, {}, libraries=processes))


def _processes(machine: Machine, words: Mapping[str, Any]) -> int:
    """Return the bytes of the machine's memory that the processes of a run on cards take by themselves."""
    engines = machine.generators * words["tensor_parallel"]
    return int(words["trainers"] * memory.RANK_PROCESS + engines * memory.ENGINE_PROCESS + DRIVER)


def _on_a_cpu(
    machine: Machine, words: Mapping[str, Any], sizes: Sizes, trainings: Sequence[Training], served: Serving, place: Place
) -> Iterator[Load]:
    """Yield what all processes ask of the memory together: there an engine keeps what it has while ranks train."""
    assert place.memory is not None
    engines, ranks = machine.generators * words["tensor_parallel"], words["trainers"]
    served = replace(served, step=(served.step[0], words["max_num_seqs"] or CPU_SEQUENCES))
    engine = memory.of_engine(sizes, served, int(words["kv_cache_gb"] * GIB)).times(engines)
    waiting = engine.libraries + DRIVER
    for need in sorted((memory.of_training(sizes, how).times(ranks) for how in trainings), key=lambda need: -need.peak)[:1]:
        certain = {**need.certain, "engine's weights": engine.certain["weights"]}
        passing = {**need.passing, "KV cache": engine.passing["KV cache"]}
        yield Load("memory", "training", place.memory, Need(certain, passing, need.replaced, need.libraries + waiting))
    yield Load("memory", "answering", place.memory, replace(engine, libraries=waiting + ranks * memory.RANK_PROCESS))


# ---- what is refused, and what would fit ----


@dataclass(frozen=True)
class Way:
    """A change that makes an update smaller, in words and as it changes the description."""

    words: str
    change: Callable[[Training], Training]


def _with_adapter(how: Training) -> Training:
    return how if how.rank else replace(how, rank=ADAPTER_RANK, rounded=how.bf16)


def _in_four_bits(how: Training) -> Training:
    """What lies beneath an adapter can lie in 4 bits, where each rank holds it whole."""
    return replace(how, four_bits=True) if how.rank and how.shards == 1 else how


OFFLOADING = Way(
    "offload_optimiser: true (in `trainer` of the machine file)",
    lambda how: replace(how, offloaded=how.on_card and how.optimiser in OF_TORCH),
)
FOUR_BITS = Way(
    "train.lora.quantise=nf4 (an override, or quantise: nf4 in `lora`; the weights beneath lie in 4 bits while it learns)",
    _in_four_bits,
)
WAYS = (
    Way("gradient_checkpointing: true (in `trainer` of the machine file)", lambda how: replace(how, checkpointing=True)),
    Way(
        "per_device_train_batch_size: 1 (in train.trl, with gradient_accumulation_steps larger by as much)",
        lambda how: replace(how, rows=1, accumulation=how.accumulation * how.rows),
    ),
    Way("shard: true (in the machine file)", lambda how: replace(how, shards=how.ranks)),
    Way("train.lora.r=16 (an override, or lora: {r: 16} in the step; an adapter learns, and not all weights)", _with_adapter),
    FOUR_BITS,
    OFFLOADING,
    Way("optim: adafactor (in train.trl; it learns otherwise)", lambda how: replace(how, optimiser="adafactor")),
)


def spread_problem(sizes: Sizes, spread: int) -> str:
    """Return why an engine cannot be spread over so many cards, with what it could be spread over; '' where it can."""
    possible = [count for count in range(1, sizes.heads + 1) if _divides(sizes, count)]
    if spread in possible:
        return ""
    heads = f"{sizes.heads} attention heads, {sizes.kv_heads} for keys and values, and layers {sizes.inner:,} wide"
    return f"tensor_parallel: {spread} does not divide this model ({heads}); possible: {', '.join(map(str, possible))}"


def _divides(sizes: Sizes, count: int) -> bool:
    """Whether so many cards get a whole number of heads each; keys and values that are fewer lie on several of them."""
    shared = sizes.kv_heads % count == 0 or count % sizes.kv_heads == 0
    return sizes.heads % count == 0 and shared and sizes.inner % count == 0


@dataclass(frozen=True)
class _Asked:
    """All that decides whether a recipe fits."""

    recipe: Recipe
    machine: Machine
    words: Mapping[str, Any]
    sizes: Sizes
    lengths: Lengths
    place: Place

    def loads(self, parameters: int) -> list[Load]:
        """Return the loads of such a model with so many parameters."""
        sizes = replace(self.sizes, parameters=parameters)
        return loads(self.recipe, self.machine, self.words, sizes, self.lengths, self.place)


def problems(
    recipe: Recipe, machine: Machine, words: Mapping[str, Any], sizes: Sizes, lengths: Lengths, place: Place
) -> Iterator[str]:
    """Yield what cannot be whatever the answers are, each with its numbers and with what could."""
    if words.get("generator") != "transformers" and (problem := spread_problem(sizes, words["tensor_parallel"])):
        yield f"{problem}."
        return
    asked = _Asked(recipe, machine, words, sizes, lengths, place)
    for load in asked.loads(sizes.parameters):
        if load.need.least > load.room:
            certain = ", ".join(f"{name} {gib(size)}" for name, size in load.need.certain.items() if size)
            least = f"at least {gib(load.need.least)} GiB ({certain}), and there are {gib(load.room)}"
            yield f"{load.name}: {sizes.parameters / 1e9:.2g} billion parameters need {least}. {_instead(load, asked)}"


def _instead(load: Load, asked: _Asked) -> str:
    """Say what would fit with answers as long as they may be: changes of the recipe or the machine file, a size, or more memory."""
    found = _ways(load, asked) if load.stage == "training" else _wider(asked) if load.stage == "answering" else ""
    half = next(one for one in asked.loads(asked.sizes.parameters // 2) if one.name == load.name)
    each = 2 * (load.need.peak - half.need.peak)
    most = (load.room - load.need.peak + each) / each * asked.sizes.parameters / 1e9
    size = f"a model of up to {most:.2g} billion parameters" if most >= 0.05 else ""
    larger = f"{math.ceil(load.need.peak / GIB)} GiB and more"
    return f"What would fit: {'; or '.join(filter(None, (found, size, larger)))}."


def _ways(load: Load, asked: _Asked) -> str:
    """Return the fewest changes by which every update fits with rows of full length, and offloading beside them where it is enough alone."""
    if asked.place.cards and load.where == "memory":
        return "offload_optimiser: false"
    offered = [way for way in WAYS if way is not FOUR_BITS or asked.sizes.fits_four_bits]
    every = chain.from_iterable(combinations(offered, count) for count in range(1, len(offered) + 1))
    first = next(((ways, said) for ways in every if (said := _way(load, asked, ways))), None)
    if first is None:
        return ""
    ways, said = first
    alone = _way(load, asked, (OFFLOADING,)) if OFFLOADING not in ways else ""
    return "; or ".join(filter(None, (said, alone)))


def _way(load: Load, asked: _Asked, ways: Sequence[Way]) -> str:
    """Return changes in words, with what is taken then, if every update fits with rows of full length by them; else ''."""
    on_card, ranks = bool(asked.place.cards), asked.words["trainers"]
    hows = updates(asked.recipe, asked.words, Lengths(asked.recipe.context, asked.recipe.context), on_card)
    needs = [memory.of_training(asked.sizes, _changed(how, ways)) for how in hows]
    others = sum(size for name, size in load.need.certain.items() if name.startswith(("sleeping", "engine's")))
    others += 0 if on_card else load.need.libraries + load.need.passing["KV cache"]
    peak = others + (1 if on_card else ranks) * max(need.peak - need.libraries for need in needs)
    host, memory_of_host = ranks * max(need.host for need in needs), asked.place.memory
    room = memory_of_host is None or host + _processes(asked.machine, asked.words) <= memory_of_host
    if peak > load.room or not (room or not host):
        return ""
    beside = f", and {gib(host)} of the machine's memory" if host else ""
    return f"{' and '.join(way.words for way in ways)}: up to {gib(peak)} GiB{beside}"


def _changed(how: Training, ways: Sequence[Way]) -> Training:
    for way in ways:
        how = way.change(how)
    return how


def _wider(asked: _Asked) -> str:
    """Return over how many cards an engine would fit; '' where there are not so many."""
    words, cards = asked.words, asked.place.cards
    for count in range(words["tensor_parallel"] + 1, len(cards) + 1):
        served = replace(serving(asked.recipe, words, asked.place), spread=count)
        if _divides(asked.sizes, count) and memory.of_engine(asked.sizes, served).peak <= min(cards):
            return f"tensor_parallel: {count} (in the machine file)"
    return ""


def refuse(recipe: Recipe, machine: Machine, words: Mapping[str, Any], sizes: Sizes, lengths: Lengths, place: Place) -> None:
    """Raise UsageError, with every problem, where the recipe cannot fit whatever the answers are."""
    if found := list(problems(recipe, machine, words, sizes, lengths, place)):
        fix = "See all of it: selfkd run RECIPE --plan --on MACHINE. Nothing was started."
        raise UsageError("\n".join(found), "machine", fix)
