"""What an engine's scores on a probe prove, and which sequences a probe keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from selfkd.backend import probe
from selfkd.backend.probe import Probe, Scored, judge


def evidence(update: float, tokens_scored: int = 200) -> tuple[Probe, np.ndarray]:
    noise = np.random.default_rng(0)
    parent = noise.normal(-3, 1, tokens_scored)
    direction = noise.normal(0, update, tokens_scored)
    return Probe("parent", [[1, 2]], [1], parent + direction, parent), direction


def test_a_stale_engine_is_wrong_even_where_the_update_is_far_below_the_tolerance() -> None:
    seen, _ = evidence(1e-3)
    stale = seen.before + np.random.default_rng(1).normal(0, 1e-5, 200)
    assert judge(seen, Scored(stale, stale, True), "float32").wrong
    assert judge(seen, Scored(seen.child + 1e-5, stale, True), "float32").proved is True


def test_parent_and_child_that_rounding_hides_are_never_called_proved() -> None:
    for dtype, update, rounding in (("float32", 1e-6, 1e-5), ("bfloat16", 1e-3, 0.08)):
        seen, _ = evidence(update)
        before = seen.before + np.random.default_rng(1).normal(0, rounding, 200)
        after = seen.child + np.random.default_rng(2).normal(0, rounding, 200)
        assert judge(seen, Scored(after, before, True), dtype).proved == probe.INDISTINGUISHABLE


def test_in_bf16_an_update_below_the_rounding_is_found_along_its_direction() -> None:
    seen, update = evidence(0.06)
    before = seen.before + np.random.default_rng(1).normal(0, 0.08, 200)
    after = before + update + np.random.default_rng(2).normal(0, 0.05, 200)
    verdict = judge(seen, Scored(after, before, True), "bfloat16")
    assert verdict.proved is True and verdict.survived == pytest.approx(1, abs=0.2)
    assert judge(seen, Scored(before, before, True), "bfloat16").wrong


def test_the_dead_zone_is_neither_proved_nor_called_wrong() -> None:
    seen, update = evidence(1.0)
    after = seen.before + 0.3 * update + np.random.default_rng(2).normal(0, 0.1, 200)
    verdict = judge(seen, Scored(after, seen.before, True), "bfloat16")
    assert verdict.proved == "only 30% of the update is visible in bfloat16" and not verdict.wrong


def test_scores_that_are_not_numbers_are_wrong() -> None:
    seen, _ = evidence(1.0)
    assert judge(seen, Scored(seen.child * np.nan, None, False), "bfloat16").wrong


def test_the_probe_keeps_the_sequences_that_differ_most(tmp_path: Path) -> None:
    sequences = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    path = probe.write_probe(tmp_path, sequences, [[0.0, 0.0], [0.0, 5.0], [1.0, 0.0]], [[0.0, 0.0]] * 3, "p", keep=2)
    assert [entry["ids"] for entry in json.loads(path.read_text())["sequences"]] == [[4, 5, 6], [7, 8, 9]]
    assert probe.read_probe(tmp_path).before is not None


def test_scores_from_before_the_sleep_prove_an_update_that_the_trainers_own_scores_cannot() -> None:
    """Level 2 drops the weights. An engine in bf16 lies off the trainer by more than a small update, but by the same before and after."""
    seen, update = evidence(0.008)
    before = seen.before + np.random.default_rng(1).normal(0, 0.04, 200)
    after = before + update + np.random.default_rng(2).normal(0, 0.004, 200)
    assert judge(seen, Scored(after, None, True), "bfloat16").proved == probe.INDISTINGUISHABLE
    assert judge(seen, Scored(after, before, True), "bfloat16").proved is True


def test_earlier_scores_are_those_of_the_sequences_that_a_probe_kept() -> None:
    kept = Probe("parent", [[1, 2, 3], [4, 5]], [1, 1], np.zeros(3), np.zeros(3))
    known = {(1, 2, 3): [-1.0, -2.0], (7, 8): [-9.0], (4, 5): [-3.0]}
    assert probe.earlier_scores(kept, known).tolist() == [-1.0, -2.0, -3.0]
    assert probe.earlier_scores(kept, {(1, 2, 3): [-1.0, -2.0]}) is None
    late = Probe("parent", [[1, 2, 3]], [2], np.zeros(1), np.zeros(1))
    assert probe.earlier_scores(late, known).tolist() == [-2.0]


def test_scores_from_before_the_sleep_count_where_an_engine_has_none_of_its_own_and_they_are_of_the_parent() -> None:
    seen = Probe("parent", [[1, 2]], [1], np.zeros(1), np.zeros(1))
    after, before = np.ones(1), np.full(1, 2.0)
    earlier, foreign = (probe.Earlier(name, {(1, 2): [3.0]}) for name in ("parent", "another"))

    def found(before: np.ndarray | None, held: str, earlier: probe.Earlier | None) -> tuple[float | None, bool]:
        scored = probe.weighed(seen, after, before, held, earlier)
        return (None if scored.before is None else float(scored.before[0]), scored.held_parent)

    assert found(None, "", earlier) == (3.0, True)
    assert found(None, "", foreign) == found(None, "", None) == (None, False)
    assert found(before, "parent", earlier) == (2.0, True)  # by the same engine, in the same batch
    assert found(before, "another", None) == (2.0, False)


def of_size_one() -> np.ndarray:
    drawn = np.random.default_rng(1).normal(0, 1, 200)
    return np.asarray(drawn / np.sqrt(np.mean(np.square(drawn))))


def test_weights_that_an_update_put_into_the_next_number_of_16_bits_are_no_sign_of_other_weights() -> None:
    """As seen of SmolLM2 in bf16: 0.07 from the parent's checkpoint, 0.29 from the child's, on an update of 0.03."""
    seen, _ = evidence(0.03)
    verdict = judge(seen, Scored(seen.child + 0.29 * of_size_one(), seen.before, True), "bfloat16")
    assert not verdict.wrong and verdict.proved == probe.INDISTINGUISHABLE
    assert not judge(seen, Scored(seen.child + 0.29 * of_size_one(), None, False), "bfloat16").wrong


def test_an_engine_that_lies_further_away_is_wrong_and_what_it_did_under_the_parent_excuses_only_so_much() -> None:
    seen, one = evidence(0.03)[0], of_size_one()
    assert judge(seen, Scored(seen.child + 0.6 * one, seen.before, True), "bfloat16").wrong
    assert judge(seen, Scored(seen.child + 0.6 * one, None, False), "bfloat16").wrong
    assert not judge(seen, Scored(seen.child + 0.6 * one, seen.before + 0.5 * one, True), "bfloat16").wrong
    assert judge(seen, Scored(seen.child + 1.2 * one, seen.before + 1.2 * one, True), "bfloat16").wrong
    assert judge(seen, Scored(seen.child + 0.3 * one, seen.before, True), "float32").wrong
