"""Our sampler against the probabilities it should draw by: shares, zeros, ends, and that a row knows nothing of the others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

torch = pytest.importorskip("torch", reason="needs the extra [cpu] or [gpu]")

from selfkd.backend.engine.inverse_cdf import BLOCK, InverseCdf, draw, likeliest, next_tokens, uniform, within  # noqa: E402
from selfkd.errors import BackendError  # noqa: E402

LAST = 1 - 2**-53  # the greatest number that a generator gives
SIZES = [5, BLOCK, BLOCK + 1, 3 * BLOCK + 17]


def numbers(*values: float) -> Any:
    return torch.tensor(values, dtype=torch.float64)


def seeded(count: int, first: int = 0) -> dict[int, Any]:
    return {row: torch.Generator().manual_seed(7919 * (first + row) + 1) for row in range(count)}


def exact(logits: np.ndarray, k: int | None, p: float | None) -> np.ndarray:
    """The probabilities by hand: the k greatest, and of these the fewest whose shares reach p."""
    shares = np.exp(logits - logits.max())
    order = np.argsort(-shares)
    if k is not None:
        shares[order[k:]] = 0
    shares /= shares.sum()
    if p is not None:
        shares[order[1 + np.searchsorted(shares[order].cumsum(), p) :]] = 0
    return shares / shares.sum()


@pytest.mark.parametrize(("k", "p"), [(None, None), (40, None), (None, 0.8), (40, 0.9)])
def test_tokens_come_as_often_as_their_probabilities_say(k: int | None, p: float | None) -> None:
    pytest.importorskip("vllm", reason="filters are vLLM's")
    logits, rows = 2 * torch.randn(200, generator=torch.Generator().manual_seed(3)), 30_000
    expected = exact(logits.double().numpy(), k, p)
    filters = [None if k is None else torch.full((rows,), k), None if p is None else torch.full((rows,), p)]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        drawn, processed = InverseCdf("raw_logprobs")(logits.repeat(rows, 1), seeded(2000), *filters)
    counts = np.bincount(drawn.numpy(), minlength=200)
    assert processed is None and counts[expected == 0].sum() == 0
    often = expected * rows >= 5
    pooled = [np.append(shares[often], shares[~often].sum()) for shares in (counts, expected * rows)]
    kept = pooled[1] > 0
    assert chisquare(pooled[0][kept], pooled[1][kept]).pvalue > 1e-3


def test_the_number_decides_the_token_and_shares_lie_in_order() -> None:
    shares = torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]]).repeat(7, 1)
    drawn = draw(shares, numbers(0.0, 0.24, 0.25, 0.74, 0.75, LAST, 1.0))
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3, 3]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_token_of_probability_zero_is_never_drawn(data: Any) -> None:
    size = data.draw(st.sampled_from(SIZES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    mass = torch.rand(size, generator=generator).pow(data.draw(st.integers(1, 60)))
    shares = torch.where(torch.rand(size, generator=generator) < data.draw(st.floats(0, 1)), mass, 0.0)
    shares[data.draw(st.integers(0, size - 1))] += data.draw(st.sampled_from([1e-30, 1e-6, 1.0]))
    number = data.draw(st.one_of(st.sampled_from([0.0, 5e-324, LAST]), st.floats(0, LAST)))
    drawn = int(draw(shares.unsqueeze(0), numbers(number)))
    assert shares[drawn] > 0
    ends = shares.double().cumsum(0) / shares.double().sum()
    below, above = ends[drawn - 1] if drawn else 0.0, ends[drawn]
    assert below - 1e-6 <= number <= above + 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_both_ends_fall_on_the_first_and_the_last_token_that_has_a_share(size: int) -> None:
    shares = torch.zeros(2, size)
    shares[:, 1], shares[:, size - 2] = 0.5, 0.5
    assert draw(shares, numbers(0.0, LAST)).tolist() == [1, size - 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_draws_the_same_whoever_else_is_in_the_batch(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shares = (3 * torch.randn(70, 5000, generator=torch.Generator().manual_seed(1))).softmax(-1)
        chosen = torch.rand(70, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        whole, order = draw(shares, chosen), torch.randperm(70, generator=torch.Generator().manual_seed(3))
        alone = [int(draw(shares[row : row + 1], chosen[row : row + 1])) for row in range(70)]
        sevens = [draw(shares[at : at + 7], chosen[at : at + 7]) for at in range(0, 70, 7)]
        assert whole.tolist() == alone == torch.cat(sevens).tolist()
        assert draw(shares[order], chosen[order]).tolist() == whole[order].tolist()
        torch.set_num_threads(3 - threads)
        assert draw(shares, chosen).tolist() == alone
    finally:
        torch.set_num_threads(before)


def test_each_seeded_row_draws_from_its_own_generator_and_the_others_from_torch() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(9)
        ours = torch.rand(2, dtype=torch.float64).tolist()
        torch.manual_seed(9)
        found = uniform(5, {row: one for row, one in seeded(5).items() if row in (0, 2, 3)}).tolist()
    alone = [torch.rand((), dtype=torch.float64, generator=one).item() for one in seeded(5).values()]
    assert found == [alone[0], ours[0], alone[2], alone[3], ours[1]]


def test_the_same_seed_draws_the_same_tokens_one_after_another() -> None:
    shares = torch.rand(3, 300, generator=torch.Generator().manual_seed(4)).pow(4).softmax(-1)
    first, second = ([draw(shares, uniform(3, held)).tolist() for _ in range(20)] for held in (seeded(3), seeded(3)))
    assert first == second and len({tuple(row) for row in first}) == 20


@pytest.mark.parametrize("mode", ["processed_logits", "processed_logprobs", "raw_logprobs"])
def test_what_is_returned_beside_the_tokens_is_what_vllm_would_return(mode: str) -> None:
    vllm = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    logits, k = torch.randn(6, 50, generator=torch.Generator().manual_seed(6)), torch.full((6,), 5, dtype=torch.int32)
    theirs = vllm.TopKTopPSampler(mode).forward_native(logits.clone(), seeded(6), k.clone(), None)[1]
    _, processed = InverseCdf(mode)(logits.clone(), seeded(6), k.clone(), None)
    assert processed is theirs is None if mode == "raw_logprobs" else torch.equal(processed, theirs)


def test_a_greedy_token_is_the_first_of_the_likeliest_and_never_one_without_a_score() -> None:
    assert likeliest(torch.tensor([[0.0, 2.0, 2.0], [-1.0, float("-inf"), -3.0]])).tolist() == [1, 0]
    for score in ("nan", "inf", "-inf"):
        with pytest.raises(BackendError, match="1 of 2 answers have no next token"):
            likeliest(torch.tensor([[0.0, 1.0], [float(score)] * 2]))


def test_scores_that_are_no_numbers_are_an_error_and_no_token() -> None:
    shares = torch.tensor([[0.5, 0.5], [float("nan")] * 2, [0.0, 0.0]])
    with pytest.raises(BackendError, match="2 of 3 answers have no next token") as caught:
        draw(shares, numbers(0.1, 0.2, 0.3))
    assert "float16" in caught.value.fix and "sample.vllm" in caught.value.fix


# ---- where there is no vLLM ----


def frequencies(weights: list[float], top_k: int = 0, top_p: float = 1.0, count: int = 20_000) -> list[float]:
    logits = torch.tensor([weights]).log().expand(count, -1)
    drawn = next_tokens(logits, list(seeded(count).values()), top_k, top_p)
    return (torch.bincount(drawn, minlength=len(weights)) / count).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, [0.1, 0.4, 0.0, 0.3, 0.2]),
        (2, 1.0, [0.0, 4 / 7, 0.0, 3 / 7, 0.0]),
        (0, 0.65, [0.0, 4 / 7, 0.0, 3 / 7, 0.0]),
        (0, 0.75, [0.0, 4 / 9, 0.0, 3 / 9, 2 / 9]),
        (3, 0.75, [0.0, 4 / 7, 0.0, 3 / 7, 0.0]),  # of what top_k left: 4/9 and 3/9 hold 7/9
        (1, 1.0, [0.0, 1.0, 0.0, 0.0, 0.0]),
        (0, 1e-9, [0.0, 1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(top_k: int, top_p: float, expected: list[float]) -> None:
    found = frequencies([0.1, 0.4, 0.0, 0.3, 0.2], top_k, top_p)
    for share, wanted in zip(found, expected, strict=True):
        assert share == 0 if wanted == 0 else abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / 20_000 + 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-math.inf, -80.0, -1.0, 0.0, 3.0]), min_size=2, max_size=9), st.sampled_from([0.0, LAST]))
def test_not_even_the_outermost_points_draw_an_impossible_token(row: list[float], point: float) -> None:
    if max(row) == -math.inf:
        return
    drawn = draw(within(torch.tensor([row]).softmax(-1), 0, 1.0), numbers(point))
    assert row[drawn.item()] > -math.inf


@pytest.mark.parametrize(("k", "p"), [(0, 1.0), (40, 1.0), (0, 0.8), (40, 0.9)])
def test_with_vllm_and_without_it_a_number_draws_the_same_token(k: int, p: float) -> None:
    pytest.importorskip("vllm", reason="filters are vLLM's")
    rows, logits = 500, 2 * torch.randn(500, 200, generator=torch.Generator().manual_seed(8))
    filters = [torch.full((rows,), k) if k else None, torch.full((rows,), p) if p < 1 else None]
    theirs, _ = InverseCdf("raw_logprobs")(logits.clone(), seeded(rows), *filters)
    assert next_tokens(logits, list(seeded(rows).values()), k, p).tolist() == theirs.tolist()
