"""What vLLM is started with on a CPU and on a card, and that the words of a machine file win; without vLLM and without a card."""

from __future__ import annotations

from typing import Any

import pytest

from selfkd.backend.engine.vllm_options import Card, environment, has_core_process, llm_options, memory_share
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.errors import BackendError

GIB = 2**30
EMPTY = Card(free=79 * GIB, total=80 * GIB)


def asked(card: Card | None = None, turns: str = "share", config: Any = None, **words: Any) -> dict[str, Any]:
    """The options of an engine of a run that was created on such a machine."""
    numerics = fixed_numerics(Machine(threads=3, turns=turns, **words), on_cards=card is not None)
    return llm_options({**numerics, "turns": turns}, "folder", config or {}, 512, "module.Extension", card)


def test_on_a_cpu_memory_and_batches_are_fixed_and_the_head_is_untied() -> None:
    options = asked(kv_cache_gb=0.5)
    assert options["kv_cache_memory_bytes"] == GIB // 2 and options["max_num_seqs"] == 128
    assert options["hf_overrides"] == {"tie_word_embeddings": False} and options["enforce_eager"]
    assert not {"enable_sleep_mode", "gpu_memory_utilization"} & options.keys()


def test_the_text_of_a_model_that_is_more_than_text_is_untied_too() -> None:
    config = {"model_type": "gemma3", "text_config": {"tie_word_embeddings": True}, "vision_config": {}, "decoder": None}
    untied = {"tie_word_embeddings": False}
    assert asked(config=config)["hf_overrides"] == {**untied, "text_config": untied}
    assert "hf_overrides" not in asked(EMPTY, config=config)


def test_on_a_card_the_head_stays_tied_and_vllm_chooses_how_many_answers_at_once() -> None:
    options = asked(EMPTY)
    assert not {"hf_overrides", "max_num_seqs", "kv_cache_memory_bytes", "enforce_eager", "block_size"} & options.keys()
    assert options["gpu_memory_utilization"] == 0.92
    assert asked(EMPTY, max_num_seqs=64)["max_num_seqs"] == 64


def test_engines_can_sleep_only_where_they_take_turns_with_ranks() -> None:
    assert asked(EMPTY, "share")["enable_sleep_mode"] is True
    assert "enable_sleep_mode" not in asked(EMPTY, "split")


@pytest.mark.parametrize("card", [None, EMPTY], ids=["cpu", "card"])
def test_every_word_of_the_machine_file_wins(card: Card | None) -> None:
    usual = asked(card)
    for name in usual:
        assert asked(card, engine={name: "mine"}) == {**usual, name: "mine"}
    assert asked(card, engine={"enable_sleep_mode": False})["enable_sleep_mode"] is False
    assert asked(card, engine={"swap_space": 4}) == {**usual, "swap_space": 4}


def test_a_card_that_is_full_needs_no_measure_where_the_share_is_given() -> None:
    assert asked(Card(GIB, 24 * GIB), engine={"gpu_memory_utilization": 0.04})["gpu_memory_utilization"] == 0.04


@pytest.mark.parametrize(
    ("free", "total", "shared", "share"),
    [
        (79, 80, True, 0.92),  # nothing else on it: vLLM's own share
        (22, 24, False, 0.886),  # a desktop on it: 22/24 - 0.03
        (22, 24, True, 0.845),  # and a rank, which keeps 1 GiB while it sleeps: 21/24 - 0.03
        (12, 24, False, 0.47),  # half of it taken
    ],
)
def test_the_share_of_a_card_is_what_is_free_and_never_more_than_vllms(
    free: int, total: int, shared: bool, share: float
) -> None:
    assert memory_share(Card(free * GIB, total * GIB), shared) == share


def test_a_card_with_nothing_free_is_named_before_vllm_starts() -> None:
    with pytest.raises(BackendError, match=r"only 1\.5 of 24\.0 GiB of the card are free") as caught:
        asked(Card(3 * GIB // 2, 24 * GIB))
    assert "CUDA_VISIBLE_DEVICES" in caught.value.fix


def test_beside_a_card_an_engine_has_one_thread_and_on_a_cpu_those_of_the_run() -> None:
    numerics = {**fixed_numerics(Machine(threads=3)), "exact": True}
    assert environment(numerics, card=True)["OMP_NUM_THREADS"] == "1"
    assert environment(numerics, card=False)["OMP_NUM_THREADS"] == "3"
    assert environment(numerics, card=True)["VLLM_BATCH_INVARIANT"] == "1"
    assert environment(numerics, card=False)["VLLM_BATCH_INVARIANT"] == "0"


@pytest.mark.parametrize(
    ("words", "card", "separate"),
    [
        ({"tensor_parallel": 2, "exact": True}, True, True),  # one over several cards must
        ({"exact": False}, True, True),
        ({"exact": True}, True, False),
        ({}, True, False),  # of a run that says nothing of it
        ({"exact": False, "backend": "local"}, True, False),
        ({"exact": False}, False, False),
    ],
)
def test_vllm_schedules_in_a_process_of_its_own_where_it_must_or_where_it_pays(
    words: dict[str, Any], card: bool, separate: bool
) -> None:
    numerics = {**fixed_numerics(Machine(threads=1)), **words}
    assert has_core_process(numerics, card) is separate
    assert environment(numerics, card)["VLLM_ENABLE_V1_MULTIPROCESSING"] == str(int(separate))


def test_workers_of_an_engine_over_several_cards_are_its_own_and_not_rays() -> None:
    """An engine sits in a placement group of Ray, where vLLM would ask Ray for workers: on a CPU it then refuses to start."""
    for card in (None, EMPTY):
        assert asked(card, tensor_parallel=2)["distributed_executor_backend"] == "mp"
        assert "distributed_executor_backend" not in asked(card)
