"""What makes an update repeat, with fakes in the place of cards: the variables come before CUDA, and a rank says what it kept to."""

from __future__ import annotations

from typing import Any

import pytest

from selfkd.backend import facts
from selfkd.backend.trainer import repeatable

torch = pytest.importorskip("torch")


@pytest.fixture
def card(monkeypatch):
    """A process with a card whose CUDA has not started."""
    for name in repeatable.FOR_CARDS:
        monkeypatch.setenv(name, "")  # so that it is taken away again afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(facts, "_gpu", lambda _: {"gpu": "H100 (sm_90)"})
    return monkeypatch


def after(numerics: dict[str, Any]) -> tuple[bool, bool, Any]:
    """Whether algorithms are deterministic inside, whether they must be, and what the rank says of itself."""
    repeatable.prepare(numerics)
    with repeatable.repeatable(numerics):
        inside = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return inside[0], inside[0] and not inside[1], facts.of_trainer()["repeats"]


def test_an_exact_run_on_a_card_keeps_to_what_repeats(card):
    assert after({"exact": True}) == (True, True, True)
    assert facts.of_trainer()["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert facts.of_trainer()["NCCL_ALGO"] == "Ring" and facts.of_trainer()["FLASH_ATTENTION_DETERMINISTIC"] == "1"


def test_a_run_that_is_not_exact_trains_as_fast_as_the_card_can_and_says_so(card):
    assert after({"exact": False}) == (False, False, False)
    assert "NCCL_ALGO" not in facts.of_trainer()


def test_where_cuda_started_first_nothing_is_claimed(card):
    card.setattr(torch.cuda, "is_initialized", lambda: True)
    assert after({"exact": True}) == (True, False, False)


def test_what_the_user_set_stays(card):
    card.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert after({"exact": True})[2] is True
    assert facts.of_trainer()["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_rank_names_how_its_updates_add_up_and_an_engine_has_no_such_word(monkeypatch):
    monkeypatch.setattr(repeatable, "_last", {})
    assert facts.of_trainer()["arithmetic"] == repeatable.ARITHMETIC
    assert "arithmetic" not in facts.of_engine()


def test_a_cpu_always_keeps_to_what_repeats_and_gets_its_settings_back():
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with repeatable.repeatable({"threads": 1, "exact": False}):
        assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, before)
    assert repeatable.holds() and "repeats" not in facts.of_trainer()
