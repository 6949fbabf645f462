"""Who sits where: the bundles that a run reserves on a cluster, and on which of them each engine and each rank sits.

A bundle holds whole cards, so that nobody else's process meets ours; on a CPU it holds cores. Under `share` the engine and the rank
of one card sit on the same bundle and take turns; two engines, or two ranks, never do. `plan` is arithmetic and starts nothing;
`Placement` is the reservation, which belongs to this driver and ends with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfkd.backend.machine import Machine
from selfkd.backend.ray.cluster import result_of
from selfkd.core.accelerator import Card
from selfkd.errors import UsageError

CARD_CPUS = 1  # of a bundle with cards: its processes mostly wait for them
TURN = 0.5  # of a card, for an engine and for a rank that take turns on it
FIRST_SECONDS, SAY_SECONDS = 3, 60  # of waiting before the first word about it, and between two
ASK_SECONDS = 120.0
ADVICE = "Change `generators`, `trainers`, `tensor_parallel` or `turns` in the machine file (selfkd help machine)"


def nobody_hears(text: str) -> None:
    """Ignore what is said: for whoever opens a backend and asks for no word."""


@dataclass(frozen=True)
class Node:
    """What one node of a cluster has, whoever uses it now."""

    cpus: int
    cards: int

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Node:
        return cls(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


@dataclass(frozen=True)
class Seat:
    """Where one process sits: a bundle, and how much of its cards it asks Ray for.

    `spread`: it uses every card of the bundle although ranks ask Ray for them; Ray cannot lend halves of several cards.
    """

    bundle: int
    cards: float = 0
    spread: bool = False


@dataclass(frozen=True)
class Plan:
    """What is reserved, and the seat of each engine and of each rank."""

    bundles: tuple[Mapping[str, int], ...]
    engines: tuple[Seat, ...]
    ranks: tuple[Seat, ...]

    @property
    def cards(self) -> int:
        return sum(bundle.get("GPU", 0) for bundle in self.bundles)

    @property
    def cpus(self) -> int:
        return sum(bundle["CPU"] for bundle in self.bundles)

    def __str__(self) -> str:
        return f"{self.cards} cards" if self.cards else f"{self.cpus} cores"


def plan(machine: Machine, numerics: Mapping[str, Any], on_cards: bool) -> Plan:
    """Return the bundles and seats that a machine file asks for."""
    engines, ranks, spread = machine.generators, numerics["trainers"], numerics["tensor_parallel"]
    if not on_cards:
        seats = tuple(Seat(number) for number in range(max(engines, ranks)))
        return Plan(({"CPU": numerics["threads"]},) * len(seats), seats[:engines], seats[:ranks])
    if machine.turns == "split":
        return _split(engines, ranks, spread)
    return _shared(engines, ranks) if spread == 1 else _shared_widely(engines, ranks, spread)


def _split(engines: int, ranks: int, spread: int) -> Plan:
    """Cards of their own for each."""
    bundles = (_cards(spread),) * engines + (_cards(1),) * ranks
    return Plan(
        bundles,
        tuple(Seat(number, spread) for number in range(engines)),
        tuple(Seat(engines + number, 1) for number in range(ranks)),
    )


def _shared(engines: int, ranks: int) -> Plan:
    """One card for engine i and rank i."""
    seats = tuple(Seat(number, TURN) for number in range(max(engines, ranks)))
    return Plan((_cards(1),) * len(seats), seats[:engines], seats[:ranks])


def _shared_widely(engines: int, ranks: int, spread: int) -> Plan:
    """The cards of one engine for as many ranks, and one more for each rank that is left over."""
    alone = max(0, ranks - engines * spread)
    bundles = (_cards(spread),) * engines + (_cards(1),) * alone
    beside = [number // spread for number in range(ranks - alone)]
    seats = [*beside, *range(engines, engines + alone)]
    return Plan(
        bundles, tuple(Seat(number, spread=True) for number in range(engines)), tuple(Seat(number, 1) for number in seats)
    )


def _cards(count: int) -> Mapping[str, int]:
    return {"GPU": count, "CPU": CARD_CPUS}


# ---- before anything starts ----


def check(planned: Plan, nodes: Sequence[Node], machine: Machine, numerics: Mapping[str, Any]) -> None:
    """Raise UsageError with the arithmetic where the nodes could not hold the bundles even if nobody else used them."""
    if not planned.cards:
        _check_cores(planned, nodes, numerics["threads"])
        return
    there, largest, spread = sum(node.cards for node in nodes), max(node.cards for node in nodes), numerics["tensor_parallel"]
    sums = _sums(machine, numerics)
    if largest < spread:
        what = f"tensor_parallel: {spread} asks for {spread} cards of one node, and the largest has {largest}"
        raise UsageError(what, "machine", f"{ADVICE}.")
    if there < planned.cards:
        raise UsageError(f"{sums} = {planned.cards} cards, and there are {there}", "machine", f"{ADVICE}.")
    if not _fits(planned, nodes):
        have = " + ".join(f"{node.cards} cards, {node.cpus} cores" for node in nodes)
        what = f"{sums} do not fit on these nodes, at {CARD_CPUS} core for each engine or card: {have}"
        raise UsageError(what, "machine", f"{ADVICE}.")


def check_slices(planned: Plan, cards: Sequence[Card], numerics: Mapping[str, Any]) -> None:
    """Raise UsageError where processes on slices of cards would have to talk to each other: NVIDIA's library does not let them."""
    talks = [name for name in ("tensor_parallel", "trainers") if numerics[name] > 1]
    if planned.cards and talks and any(card.is_slice for card in cards):
        what = f"{talks[0]}: {numerics[talks[0]]} needs cards that talk to each other, and slices of a card (MIG) do not"
        raise UsageError(what, "machine", "Use 1, or whole cards.")


def _check_cores(planned: Plan, nodes: Sequence[Node], threads: int) -> None:
    if not _fits(planned, nodes):
        have = " + ".join(str(node.cpus) for node in nodes)
        what = f"{len(planned.bundles)} × {threads} threads ask for {planned.cpus} cores, {threads} of one node each, and there are {have}"
        raise UsageError(what, "machine", "Set `threads`, `generators` or `trainers` in the machine file so that they fit.")


def _fits(planned: Plan, nodes: Sequence[Node]) -> bool:
    """Whether the bundles fit, the large ones first, each on the fullest node that has room for it."""
    room = [[node.cards, node.cpus] for node in nodes]
    for bundle in sorted(planned.bundles, key=lambda one: -one.get("GPU", 0)):
        cards, cpus = bundle.get("GPU", 0), bundle["CPU"]
        place = next((one for one in sorted(room) if one[0] >= cards and one[1] >= cpus), None)
        if place is None:
            return False
        place[0] -= cards
        place[1] -= cpus
    return True


def _sums(machine: Machine, numerics: Mapping[str, Any]) -> str:
    """Say what is added up."""
    engines, ranks, spread = machine.generators, numerics["trainers"], numerics["tensor_parallel"]
    generators = f"{engines} generators" + (f" × {spread} tensor_parallel" if spread > 1 else "")
    if machine.turns == "split":
        return f"turns: split asks for {generators} + {ranks} trainers"
    return f"turns: share asks for the larger of {generators} and {ranks} trainers"


# ---- the reservation ----


@dataclass
class Placement:
    """The bundles of a run, reserved as one placement group: it belongs to this driver, and ends with `close` or with the driver."""

    planned: Plan
    group: Any = None
    _cards: dict[int, str] = field(default_factory=dict)

    @classmethod
    def reserve(cls, planned: Plan, say: Callable[[str], None]) -> Placement:
        """Reserve, waiting as long as others use what is asked for; `say` hears of it within seconds, and then now and then."""
        import ray
        from ray.util import placement_group

        placement = cls(planned, placement_group([dict(bundle) for bundle in planned.bundles], strategy="PACK"))
        ready = placement.group.ready()
        try:
            for looks in itertools.count(1):
                if ray.wait([ready], timeout=1.0)[0]:
                    placement._find_cards()
                    return placement
                if looks % SAY_SECONDS == FIRST_SECONDS:
                    say(f"waits for {planned}: others use {_used()} of this cluster. Ctrl-C is safe.")
        except BaseException:
            placement.close()
            raise
        raise AssertionError

    def options(self, seat: Seat) -> dict[str, Any]:
        """Return the options of an actor that sits there. It asks for no core of its own: the bundle holds them."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Strategy

        return {"num_cpus": 0, "num_gpus": seat.cards, "scheduling_strategy": Strategy(self.group, seat.bundle)}

    def visible(self, seat: Seat) -> str | None:
        """Return the value of CUDA_VISIBLE_DEVICES that a process must set there itself; None where Ray sets it."""
        return self._cards[seat.bundle] if seat.spread else None

    def _find_cards(self) -> None:
        """Ask which cards the bundles of spread engines are, before a rank sits there: a process that is lent all of them knows."""
        self._cards = {seat.bundle: self._ask(seat.bundle) for seat in self.planned.engines if seat.spread}

    def close(self) -> None:
        from ray.util import remove_placement_group

        remove_placement_group(self.group)

    def _ask(self, bundle: int) -> str:
        import ray

        lent = Seat(bundle, self.planned.bundles[bundle]["GPU"])
        task = ray.remote(max_retries=0, **self.options(lent))(_own_cards)
        cards: str = result_of(task.remote(), "asking for the cards of an engine", Path("ray"), ASK_SECONDS)
        return cards


def _own_cards() -> str:
    """Return the cards that this process is lent."""
    import os

    return os.environ["CUDA_VISIBLE_DEVICES"]


def _used() -> str:
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    words = (("GPU", "cards"), ("CPU", "cores"))
    return " and ".join(
        f"{there[name] - free.get(name, 0):g} of {there[name]:g} {word}" for name, word in words if name in there
    )
