"""maj@k, against every way to draw k of n answers tried one by one."""

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.core.stats import pass_at
from selfkd.core.votes import plurality

ANSWERS = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([None, 1.0, 2.0, 3.0])), min_size=1, max_size=8)


def tried(answers: list[tuple[float, float | None]], k: int) -> float:
    """Vote in each subset: what the most frequent keys' answers score in the mean, or all of them where none has a key."""
    won = []
    for drawn in combinations(answers, k):
        votes = Counter(key for _, key in drawn if key is not None)
        best = [key for key, count in votes.items() if count == max(votes.values())] or [None]
        # a tie is shared by its keys, whose answers are equally many
        scores = [sum(score for score, key in drawn if key == one) / sum(key == one for _, key in drawn) for one in best]
        won.append(sum(scores) / len(scores))
    return sum(won) / len(won)


@given(ANSWERS, st.data())
def test_it_is_the_mean_over_every_way_to_draw(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    assert plurality(*zip(*answers, strict=True), k) == pytest.approx(tried(answers, k), abs=1e-12)


def test_right_answers_that_agree_gain_by_a_vote_and_scattered_ones_lose():
    """Of five answers three say 7, which is right: drawn three at a time, 7 wins in 7 of 10 draws and ties with two others in 3."""
    scores, keys = [1, 1, 1, 0, 0], [7, 7, 7, 1, 2]
    assert plurality(scores, keys, 3) == pytest.approx((7 + 3 * 1 / 3) / 10)
    assert plurality(scores, keys, 5) == 1.0
    assert plurality(scores, keys, 1) == pytest.approx(3 / 5)  # as drawing one of them
    assert plurality([1, 0, 0, 0], [1, 2, 2, 3], 4) == 0.0 < pass_at([1, 0, 0, 0], 4)


def test_more_draws_than_answers_are_refused():
    with pytest.raises(ValueError, match="3 answers cannot be drawn of 2"):
        plurality([1, 0], [1, 2], 3)


def test_hundreds_of_answers_take_no_time():
    began = time.perf_counter()
    plurality([float(i % 5 == 0) for i in range(256)], [float(i % 90) for i in range(256)], 64)
    assert time.perf_counter() - began < 5


def test_a_vote_among_hundreds_of_answers_is_counted_at_once():
    keys = [float(number % 60 if number % 2 else number % 5) for number in range(256)]
    began = time.monotonic()
    assert 0 < plurality([float(key == 1) for key in keys], keys, 256) <= 1
    assert time.monotonic() - began < 8  # 0.3 s on two shared cores; counting every key at every number of votes took 20 s
