"""Divergences: in float64 against sums written out by hand, their limits and bounds, and that cutting them up changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfkd.backend.base import DivergenceSpec
from selfkd.backend.trainer.cpu_head import Heard
from selfkd.backend.trainer.divergence import between, bucketed, compared
from selfkd.errors import UsageError

P, Q = [0.7, 0.2, 0.1], [0.5, 0.25, 0.25]  # teacher and student


def value(p: list[float], q: list[float], **how: Any) -> float:
    rows = [torch.log(torch.tensor([one], dtype=torch.float64)) for one in (p, q)]
    return between(*rows, DivergenceSpec(**how)).item()


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixed(beta: float) -> list[float]:
    return [beta * a + (1 - beta) * b for a, b in zip(P, Q, strict=True)]


def test_each_divergence_is_its_formula():
    assert value(P, Q) == pytest.approx(0.7 * math.log(1.4) + 0.2 * math.log(0.8) + 0.1 * math.log(0.4), rel=1e-12)
    assert value(P, Q, kind="reverse") == pytest.approx(
        0.5 * math.log(1 / 1.4) + 0.25 * math.log(1.25) + 0.25 * math.log(2.5), rel=1e-12
    )
    for beta in (0.1, 0.5, 0.9):
        by_hand = beta * kl(P, mixed(beta)) + (1 - beta) * kl(Q, mixed(beta))
        assert value(P, Q, kind="jsd", beta=beta) == pytest.approx(by_hand, rel=1e-12)


def test_the_teachers_likeliest_tokens_and_one_bucket_for_the_others():
    """The teacher's first two are a and c; of b and d only the sum is known."""
    p, q = [0.5, 0.1, 0.3, 0.1], [0.2, 0.4, 0.3, 0.1]
    assert value(p, q, top_k=2) == pytest.approx(kl([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]), rel=1e-12)
    assert value(p, q, top_k=2, kind="reverse") == pytest.approx(kl([0.2, 0.3, 0.5], [0.5, 0.3, 0.2]), rel=1e-12)
    assert value(p, q, top_k=4) == value(p, q, top_k=9) == value(p, q)


def test_limits_for_a_token_and_for_an_entry_of_the_vocabulary():
    assert value(P, Q, clip=0.05) == 0.05 and value(P, Q, clip=0.5) == value(P, Q)
    first, *rest = [a * math.log(a / b) for a, b in zip(P, Q, strict=True)]
    assert first > 0.2 > max(rest)
    assert value(P, Q, clip_entry=0.2) == pytest.approx(0.2 + sum(rest), rel=1e-12)


def heads(tokens: int = 7, vocabulary: int = 11, **more: Any) -> tuple[Heard, Heard, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)

    def one(width: int) -> Heard:
        hidden, weight = (torch.randn(size, width, generator=drawn, dtype=torch.float64) for size in (tokens, vocabulary))
        bias = torch.randn(vocabulary, generator=drawn, dtype=torch.float64)
        return Heard(
            hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), **{"cap": None, "scale": 1.0, **more}
        )

    return one(5), one(4), torch.randint(vocabulary, (tokens,), generator=drawn)


WAYS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"kind": "reverse"},
    "jsd": {"kind": "jsd", "beta": 0.3},
    "top": {"top_k": 4},
    "top reverse": {"top_k": 4, "kind": "reverse"},
    "hot": {"temperature": 1.7},
    "clipped": {"clip": 1.5},
    "clipped entries": {"clip_entry": 0.4, "kind": "jsd"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("more", [{}, {"cap": 2.0, "scale": 0.5}])
def test_a_few_tokens_at_a_time_are_all_at_once_and_only_the_student_learns(way, more):
    teacher, student, labels = heads(**more)
    found = []
    for most in (10**9, 3 * 11):  # all seven tokens, or three, three and one
        values = compared(teacher, student, labels, DivergenceSpec(**WAYS[way]), most)
        weights = torch.arange(1.0, 8.0, dtype=torch.float64)
        gradients = torch.autograd.grad(
            (weights * (values.divergence + values.logps)).sum(), (student.hidden, student.weight, student.bias)
        )
        found.append([*values, *gradients])
        assert not values.teacher_logps.requires_grad
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_finite_differences(way):
    teacher, student, labels = heads(tokens=3)

    def of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        one = Heard(hidden, weight, bias, None, 1.0)
        found = compared(teacher, one, labels, DivergenceSpec(**WAYS[way]), 11)
        return found.divergence, found.logps

    assert torch.autograd.gradcheck(of, (student.hidden, student.weight, student.bias))


def test_log_probabilities_and_entropy_are_those_without_a_temperature():
    teacher, student, labels = heads()
    found = compared(teacher, student, labels, DivergenceSpec(temperature=3.0))
    table = torch.log_softmax(student.hidden @ student.weight.T + student.bias, -1)
    told = torch.log_softmax(teacher.hidden @ teacher.weight.T + teacher.bias, -1)
    torch.testing.assert_close(found.logps, table[range(7), labels])
    torch.testing.assert_close(found.teacher_logps, told[range(7), labels])
    torch.testing.assert_close(found.entropy, -(table.exp() * table).sum(-1))
    torch.testing.assert_close(found.agreement, (table.argmax(-1) == told.argmax(-1)).double())


def test_a_cap_on_logits_is_that_of_the_model():
    teacher, student, labels = heads(cap=2.0, scale=0.5)
    logits = 2.0 * torch.tanh(0.5 * (student.hidden @ student.weight.T + student.bias) / 2.0)
    found = compared(teacher, student, labels, DivergenceSpec())
    torch.testing.assert_close(found.logps, torch.log_softmax(logits, -1)[range(7), labels])


def test_a_teacher_with_another_vocabulary_is_refused():
    teacher, _, labels = heads()
    _, student, _ = heads(vocabulary=12)
    with pytest.raises(UsageError, match="vocabulary has 11 entries and the student's 12"):
        compared(teacher, student, labels, DivergenceSpec())


numbers = st.lists(st.floats(-8, 8), min_size=6, max_size=6)
kinds = st.sampled_from(["forward", "reverse", "jsd"])


def tables(one: list[float], other: list[float]) -> list[torch.Tensor]:
    return [torch.log_softmax(torch.tensor([values], dtype=torch.float64), -1) for values in (one, other)]


@given(numbers, numbers, kinds, st.floats(0.01, 0.99))
def test_no_divergence_is_negative_and_that_of_equals_is_nothing(one, other, kind, beta):
    how = DivergenceSpec(kind=kind, beta=beta)
    p, q = tables(one, other)
    assert between(p, q, how).item() >= -1e-12
    assert between(p, p, how).item() == pytest.approx(0, abs=1e-12)


@given(numbers, numbers, st.floats(0.01, 0.99))
def test_jsd_at_one_half_is_symmetric_and_elsewhere_changes_sides_with_beta(one, other, beta):
    p, q = tables(one, other)
    half = DivergenceSpec(kind="jsd")
    assert between(p, q, half).item() == pytest.approx(between(q, p, half).item(), abs=1e-12)
    there, back = DivergenceSpec(kind="jsd", beta=beta), DivergenceSpec(kind="jsd", beta=1 - beta)
    assert between(p, q, there).item() == pytest.approx(between(q, p, back).item(), abs=1e-12)


@given(numbers, numbers)
def test_jsd_over_beta_goes_to_forward_kl_and_over_one_minus_beta_to_reverse(one, other):
    """GKD, section 3: the limits of D_JSD(beta) / beta and, on the other side, of D_JSD(beta) / (1 - beta)."""
    p, q = tables(one, other)
    near = 1e-7
    small = between(p, q, DivergenceSpec(kind="jsd", beta=near)).item() / near
    large = between(p, q, DivergenceSpec(kind="jsd", beta=1 - near)).item() / near
    assert small == pytest.approx(between(p, q, DivergenceSpec()).item(), rel=0.02, abs=1e-4)
    assert large == pytest.approx(between(p, q, DivergenceSpec(kind="reverse")).item(), rel=0.02, abs=1e-4)


@given(numbers, numbers, kinds, st.integers(1, 5))
def test_a_bucket_for_the_rest_never_makes_a_divergence_larger_and_loses_no_mass(one, other, kind, k):
    p, q = tables(one, other)
    assert between(p, q, DivergenceSpec(kind=kind, top_k=k)).item() <= between(p, q, DivergenceSpec(kind=kind)).item() + 1e-12
    for table in bucketed(p, q, k):
        assert table.exp().sum().item() == pytest.approx(1, abs=1e-12)
