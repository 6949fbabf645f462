"""Who sits where: two engines, or two ranks, never on one card, whatever the numbers; and what cannot fit is refused with its sums."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.backend.machine import Machine
from selfkd.backend.ray.placement import Node, Plan, Seat, check, check_slices, plan
from selfkd.core.accelerator import Card
from selfkd.errors import UsageError

COUNTS = st.integers(1, 8)


def numerics(trainers: int = 1, tensor_parallel: int = 1, threads: int = 4) -> dict[str, Any]:
    return {"trainers": trainers, "tensor_parallel": tensor_parallel, "threads": threads}


def planned(engines: int, trainers: int, parallel: int = 1, turns: str = "share", cards: bool = True) -> Plan:
    return plan(Machine(generators=engines, turns=turns), numerics(trainers, parallel), cards)


def sizes(found: Plan) -> list[int]:
    return [bundle.get("GPU", 0) for bundle in found.bundles]


def test_on_a_cpu_an_engine_and_a_rank_take_turns_on_the_same_cores():
    found = planned(2, 3, cards=False)
    assert found.bundles == ({"CPU": 4},) * 3
    assert found.engines == (Seat(0), Seat(1))
    assert found.ranks == (Seat(0), Seat(1), Seat(2))
    assert (found.cards, found.cpus, str(found)) == (0, 12, "12 cores")


def test_one_card_is_shared_by_one_engine_and_one_rank():
    found = planned(1, 1)
    assert found.bundles == ({"GPU": 1, "CPU": 1},)
    assert found.engines == found.ranks == (Seat(0, 0.5),)


def test_more_ranks_than_engines_and_the_reverse_each_have_a_card():
    assert sizes(planned(2, 8)) == sizes(planned(8, 2)) == [1] * 8
    assert planned(2, 8).ranks == planned(8, 2).engines == tuple(Seat(number, 0.5) for number in range(8))


def test_split_gives_each_cards_of_its_own():
    found = planned(2, 4, 2, "split")
    assert sizes(found) == [2, 2, 1, 1, 1, 1]
    assert found.engines == (Seat(0, 2), Seat(1, 2))
    assert found.ranks == (Seat(2, 1), Seat(3, 1), Seat(4, 1), Seat(5, 1))


@pytest.mark.parametrize(
    ("engines", "ranks", "parallel", "bundles", "beside"),
    [
        (4, 8, 2, [2, 2, 2, 2], [0, 0, 1, 1, 2, 2, 3, 3]),
        (2, 8, 4, [4, 4], [0, 0, 0, 0, 1, 1, 1, 1]),
        (1, 1, 2, [2], [0]),
        (1, 6, 4, [4, 1, 1], [0, 0, 0, 0, 1, 2]),
    ],
)
def test_ranks_sit_one_on_each_card_of_an_engine_that_spans_several(engines, ranks, parallel, bundles, beside):
    found = planned(engines, ranks, parallel)
    assert sizes(found) == bundles
    assert found.engines == tuple(Seat(number, spread=True) for number in range(engines))
    assert found.ranks == tuple(Seat(number, 1) for number in beside)


@given(COUNTS, COUNTS, st.sampled_from([1, 2, 4]), st.sampled_from(["share", "split"]))
def test_no_card_has_two_engines_or_two_ranks_and_none_is_idle(engines, ranks, parallel, turns):
    found = planned(engines, ranks, parallel, turns)
    assert (len(found.engines), len(found.ranks)) == (engines, ranks)
    assert len({seat.bundle for seat in found.engines}) == engines  # no two engines on one bundle
    for seats in (found.engines, found.ranks):
        lent = Counter[int]()
        for seat in seats:
            lent[seat.bundle] += math.ceil(seat.cards)
        assert all(lent[bundle] <= sizes(found)[bundle] for bundle in lent)
    for bundle, size in enumerate(sizes(found)):  # what Ray lends there at once is what the bundle has, at most
        assert sum(seat.cards for seat in (*found.engines, *found.ranks) if seat.bundle == bundle) <= size
    wanted = engines * parallel + ranks if turns == "split" else max(engines * parallel, ranks)
    assert found.cards == wanted


def refused(machine: Machine, words: dict[str, Any], *nodes: Node, cards: bool = True) -> str:
    with pytest.raises(UsageError) as caught:
        check(plan(machine, words, cards), nodes, machine, words)
    return str(caught.value)


def test_too_few_cards_are_refused_with_the_arithmetic():
    machine = Machine(generators=2, turns="split")
    said = refused(machine, numerics(4, 2), Node(64, 4))
    assert "turns: split asks for 2 generators × 2 tensor_parallel + 4 trainers = 8 cards, and there are 4" in said
    assert "Change `generators`" in said
    said = refused(Machine(), numerics(8), Node(64, 2), Node(64, 4))
    assert "turns: share asks for the larger of 1 generators and 8 trainers = 8 cards, and there are 6" in said
    assert "1 generators + 1 trainers = 2 cards, and there are 1" in refused(Machine(turns="split"), numerics(), Node(8, 1))


def test_an_engine_does_not_span_nodes():
    said = refused(Machine(), numerics(1, 8), Node(64, 4), Node(64, 4))
    assert "tensor_parallel: 8 asks for 8 cards of one node, and the largest has 4" in said


def test_cards_that_are_enough_in_all_but_lie_apart_are_refused():
    assert "do not fit on these nodes" in refused(Machine(generators=2), numerics(1, 3), Node(64, 4), Node(64, 2), Node(64, 2))


def test_cores_of_a_joined_cluster_are_compared_with_what_is_asked():
    said = refused(Machine(generators=2), numerics(1, threads=48), Node(64, 0), Node(16, 0), cards=False)
    assert "2 × 48 threads ask for 96 cores, 48 of one node each, and there are 64 + 16" in said
    check(plan(Machine(generators=2), numerics(), False), [Node(4, 0), Node(4, 0)], Machine(), numerics())


def test_what_fits_passes():
    for nodes in ([Node(8, 8)], [Node(4, 4), Node(4, 4)]):
        for engines, ranks, parallel, turns in ((8, 8, 1, "share"), (4, 4, 1, "split"), (2, 8, 4, "share"), (1, 4, 4, "split")):
            machine = Machine(generators=engines, turns=turns)
            words = numerics(ranks, parallel)
            check(plan(machine, words, True), nodes, machine, words)


def test_slices_of_a_card_serve_one_rank_and_one_engine():
    slices = [Card("MIG-a", "A100 MIG", (8, 0), 20, 20), Card("MIG-b", "A100 MIG", (8, 0), 20, 20)]
    with pytest.raises(UsageError, match="trainers: 2 needs cards that talk to each other"):
        check_slices(planned(1, 2), slices, numerics(2))
    check_slices(planned(2, 1), slices, numerics())
    check_slices(planned(1, 2), [Card("0", "A100", (8, 0), 40, 40)], numerics(2))
