"""The clipped policy gradient in loss/, in float64 against a formula worked out apart from it, and row by row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfkd.core.files import builtin_folder
from selfkd.rewards.load import load

reinforce = load(builtin_folder() / "loss/reinforce.py", "reinforce").call
NEW = [[0.5, 0.2, 0.9], [0.3, 0.7, 0.1]]
OLD = [[0.4, 0.3, 0.9], [0.3, 0.2, 0.5]]


def by_hand(new: list[float], old: list[float], reward: float, clip: float) -> float:
    """Minus the mean of the smaller of the two products, as PPO has it."""
    terms = [min(p / q * reward, max(1 - clip, min(1 + clip, p / q)) * reward) for p, q in zip(new, old, strict=True)]
    return -sum(terms) / len(terms)


def tensors(new: list[list[float]], old: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = (torch.tensor(one, dtype=torch.float64).log() for one in (new, old))
    return first.requires_grad_(), second


@pytest.mark.parametrize("rewards", [(1.0, 1.0), (1.0, -1.0), (-1.0, 0.5)])
def test_the_loss_is_the_clipped_objective_averaged_over_the_tokens_of_a_row(rewards):
    now, start = tensors(NEW, OLD)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = reinforce(now, start, mask, torch.tensor(rewards, dtype=torch.float64), clip=0.2)
    hand = [by_hand(NEW[0], OLD[0], rewards[0], 0.2), by_hand(NEW[1][:2], OLD[1][:2], rewards[1], 0.2)]
    assert found.tolist() == pytest.approx(hand, abs=1e-12)


def test_at_the_start_the_gradient_is_that_of_reinforce_and_a_clipped_token_has_none():
    now, start = tensors(OLD, OLD)
    reinforce(now, start, torch.ones(2, 3, dtype=torch.bool), torch.tensor([1.0, -1.0])).sum().backward()
    third = torch.tensor([[-1 / 3] * 3, [1 / 3] * 3], dtype=torch.float64)  # minus the reward, per token of three
    assert torch.allclose(now.grad, third, atol=1e-12)
    now, start = tensors([[0.9]], [[0.3]])
    reinforce(now, start, torch.tensor([[True]]), torch.tensor([1.0])).sum().backward()
    assert now.grad.item() == 0.0


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(-2, 2), st.floats(0.01, 0.5))
def test_a_single_token_is_as_by_hand(new, old, reward, clip):
    now, start = tensors([[new]], [[old]])
    found = reinforce(now, start, torch.tensor([[True]]), torch.tensor([reward], dtype=torch.float64), clip=clip).item()
    assert math.isclose(found, by_hand([new], [old], reward, clip), abs_tol=1e-9)
