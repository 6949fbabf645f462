"""What memory a model takes, part by part, against sums made by hand; benchmarks/memory.py compares with what is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.backend.memory import (
    GIB,
    Need,
    Serving,
    Training,
    activations,
    logits,
    of_engine,
    of_training,
    optimiser_bytes,
    token_bytes,
)
from selfkd.backend.model_sizes import Sizes

SMALL = Sizes(1_000_000, layers=2, hidden=64, inner=128, heads=4, kv_heads=2, head_size=32, vocabulary=100, tied=True)
PLAIN = Training(rows=2, row_tokens=10, learned=4, bf16=False)


def test_adamw_in_fp32_takes_sixteen_bytes_a_number() -> None:
    parts = of_training(SMALL, PLAIN).certain
    assert (parts["weights"], parts["gradients"], parts["optimiser"]) == (4_000_000, 4_000_000, 8_000_000)


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("adamw_torch_fused", 8),
        ("adafactor", 0),
        ("rmsprop", 4),
        ("lion_8bit", 1),
        ("adamw_bnb_8bit", 2),
        ("paged_adamw_8bit", 2),
    ],
)
def test_an_optimiser_keeps_so_many_bytes_of_each_number(name: str, each: float) -> None:
    assert optimiser_bytes(name) == each


def test_what_a_layer_keeps_of_a_token() -> None:
    """fp32: norms 4 × 64, products 2 × 64 + 128 + 128, attention 2 × (128 + 64), gate and partner 3 × 128, of 4 bytes each."""
    each = 4 * (4 * 64 + (2 * 64 + 128 + 128) + 2 * (128 + 64) + 3 * 128)
    assert activations(SMALL, PLAIN) == 2 * 20 * each
    halved = 4 * 4 * 64 + 2 * ((2 * 64 + 128 + 128) + 2 * (128 + 64) + 3 * 128)
    assert activations(SMALL, replace(PLAIN, bf16=True)) == 2 * 20 * halved
    assert activations(SMALL, replace(PLAIN, bf16=True, on_card=False)) == 2 * 20 * (halved + 2 * 2 * (128 + 64))
    assert activations(SMALL, replace(PLAIN, checkpointing=True)) == 20 * (2 * 4 * 64 + each)


@pytest.mark.parametrize(("bf16", "width"), [(False, 4), (True, 2)])
def test_on_a_cpu_what_an_adapter_adds_to_is_held_too(bf16: bool, width: int) -> None:
    """Queries 128, keys and values 64 each, what attention gives 64, gate and partner 128 each, and what the block gives 64."""
    alone = replace(PLAIN, bf16=bf16, on_card=False)
    adapted = activations(SMALL, replace(alone, rank=1)) - activations(SMALL, alone)
    assert adapted == 2 * 20 * width * (128 + 2 * 64 + 64 + 2 * 128 + 64)
    assert activations(SMALL, replace(PLAIN, rank=1)) == activations(SMALL, PLAIN)  # a card's allocator reuses them


def test_logits_are_whole_on_a_cpu_until_they_are_many_and_tiled_else() -> None:
    assert logits(SMALL, replace(PLAIN, on_card=False)) == 2 * 4 * (2 * 4) * 100
    large = replace(SMALL, vocabulary=100_000)
    tiled = 2 * 4 * 4096 * 32768 + 4 * 64 * 100_000
    assert logits(large, replace(PLAIN, rows=5000, learned=10)) == tiled
    of_torch = int(8.5 * 4 * 4096 * 32768) + 4 * 64 * 100_000  # where no Triton works in place
    assert logits(large, replace(PLAIN, rows=1000, learned=10, on_card=False)) == of_torch


def test_gradients_and_activations_meet_only_where_gradients_wait() -> None:
    alone, kept = of_training(SMALL, PLAIN), of_training(SMALL, replace(PLAIN, accumulation=2))
    assert kept.peak == sum(kept.certain.values()) + sum(kept.passing.values())
    assert alone.peak == max(alone.least, kept.peak - 4_000_000)
    assert of_training(SMALL, replace(PLAIN, ranks=2)).replaced == 0


def test_shards_divide_what_is_certain_and_adapters_learn_little() -> None:
    whole, sharded = of_training(SMALL, PLAIN).certain, of_training(SMALL, replace(PLAIN, ranks=4, shards=4)).certain
    assert {name: whole[name] // sharded[name] for name in ("weights", "gradients", "optimiser")} == dict.fromkeys(
        ("weights", "gradients", "optimiser"), 4
    )
    adapted = of_training(SMALL, replace(PLAIN, rank=1)).certain
    learned = 2 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 128))  # of rank 1, in two layers
    assert (adapted["gradients"], adapted["optimiser"]) == (4 * learned, 8 * learned)
    assert adapted["weights"] == 4_000_000 + 4 * learned
    rounded = of_training(SMALL, replace(PLAIN, rank=1, rounded=True)).certain
    assert rounded["weights"] == 2_000_000 + 2 * 64 * 100 + 4 * learned  # the embedding stays in fp32


def test_what_lies_in_4_bits_takes_half_a_byte_and_its_scales_and_the_rest_stays() -> None:
    """1/2 + 1/64 + 4/16384 bytes of each of 993,600 weights in layers; 6,400 of the embedding in fp32, and of a head of its own."""
    how = replace(PLAIN, rank=1, four_bits=True)
    learned = 4 * 2 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 128))
    layers = 993_600 / 2 + 993_600 / 64 + 993_600 / 4096
    assert of_training(SMALL, how).certain["weights"] == pytest.approx(layers + 4 * 6_400 + learned, abs=1)
    own, layers = replace(SMALL, tied=False), 987_200 / 2 + 987_200 / 64 + 987_200 / 4096
    for rounded, width in ((False, 4), (True, 2)):
        weights = of_training(own, replace(how, rounded=rounded)).certain["weights"]
        assert weights == pytest.approx(layers + (4 + width) * 6_400 + learned, abs=1)
    assert of_training(SMALL, how).passing["unpacked layer"] == 4 * 64 * 128
    assert of_training(SMALL, replace(how, bf16=True)).passing["bf16 copies"] == 2 * (6_400 + learned // 4)


@given(st.integers(1, 64), st.integers(1, 4096), st.integers(1, 8), st.booleans(), st.booleans())
def test_more_rows_never_take_less_and_checkpointing_never_takes_more(rows, tokens, accumulation, bf16, on_card) -> None:
    how = Training(rows, tokens, tokens, accumulation=accumulation, bf16=bf16, on_card=on_card)
    assert of_training(SMALL, how).peak <= of_training(SMALL, replace(how, rows=rows + 1)).peak
    saved = of_training(SMALL, replace(how, checkpointing=True))
    assert saved.least == of_training(SMALL, how).least
    deep = replace(SMALL, layers=8)
    assert of_training(deep, replace(how, checkpointing=True)).peak <= of_training(deep, how).peak


def test_an_engine_spread_over_cards_shares_weights_and_heads() -> None:
    one, two, four = (Serving(100, (8, 2), spread=spread) for spread in (1, 2, 4))
    assert token_bytes(SMALL, one) == 2 * 2 * 2 * 32 * 2
    assert token_bytes(SMALL, two) == token_bytes(SMALL, one) // 2 == token_bytes(SMALL, four)  # two heads: each on two cards
    assert of_engine(SMALL, four).certain["weights"] == 500_000
    assert of_engine(SMALL, one).certain["KV cache"] == 100 * token_bytes(SMALL, one)


def test_on_a_cpu_a_tied_head_is_held_apart_and_keys_are_taken_as_they_are_used() -> None:
    need = of_engine(SMALL, Serving(100, (8, 2), on_card=False), GIB)
    assert need.certain["weights"] == 2 * (1_000_000 + 6_400)
    assert "KV cache" not in need.certain and need.passing["KV cache"] == GIB


def test_a_peak_is_never_under_what_is_certain() -> None:
    assert Need({"weights": 100}, {"activations": 10}, replaced=50).peak == 100
    assert Need({"weights": 100}, {"activations": 80}, replaced=50).peak == 130
    several = Need({"weights": 100}, {"activations": 80}, replaced=50, libraries=7).times(3)
    assert (several.least, several.peak) == (300, 3 * 137)


def test_a_state_in_the_machines_memory_leaves_one_lot_on_the_card_and_on_a_cpu_nothing_moves() -> None:
    small = of_training(SMALL, replace(PLAIN, offloaded=True))
    assert (small.certain["optimiser"], small.host) == (8_000_000, 8_000_000)  # it is one lot
    large = of_training(replace(SMALL, parameters=1 << 30), replace(PLAIN, offloaded=True, shards=2))
    assert (large.certain["optimiser"], large.host) == (8 * 2**26, 4 * 2**30)
    assert large.times(2).host == 8 * 2**30
    on_a_cpu = of_training(SMALL, replace(PLAIN, offloaded=True, on_card=False))
    assert (on_a_cpu.certain["optimiser"], on_a_cpu.host) == (8_000_000, 0)


def test_a_teacher_of_its_own_lies_beside_the_model_and_its_logits_come_in_pieces() -> None:
    """1,000,000 numbers in fp32; in bf16 2 bytes of each and 2 more of the embedding's 100 × 64; a fourth of them on four ranks."""
    taught = replace(PLAIN, taught=True)
    assert "teacher" not in of_training(SMALL, taught).certain
    copied = replace(taught, teacher=True)
    assert of_training(SMALL, copied).certain["teacher"] == 4_000_000
    assert of_training(SMALL, replace(copied, bf16=True)).certain["teacher"] == 2_000_000 + 2 * 6_400
    assert of_training(SMALL, replace(copied, bf16=True, ranks=4, shards=4)).certain["teacher"] == 503_200
    assert logits(SMALL, taught) == 12 * 4 * (2 * 4 * 100) + 4 * 6_400
    large = replace(SMALL, vocabulary=150_000)
    assert logits(large, replace(taught, learned=10_000)) == 12 * 4 * 2**24 + 4 * 64 * 150_000
