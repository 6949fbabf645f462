"""Which round is best, which are accepted and when a run stops: right answers by hand, from records alone."""

from __future__ import annotations

from typing import Any

import pytest

from selfkd.chain.records import Seal
from selfkd.chain.steering import best_round, best_rounds, standing_stop, stop_reason, verdict
from selfkd.errors import RecipeError
from selfkd.recipe.schema import Best, Stop


def rounds(*values: float | None, rolled_back: tuple[int, ...] = ()) -> list[Seal]:
    return [sealed(at, {"dev/right": value}, at not in rolled_back) for at, value in enumerate(values)]


def sealed(
    index: int, metrics: dict[str, Any], accepted: bool = True, stop: str = "", measures: dict[str, str] | None = None
) -> Seal:
    return Seal(
        format=2, round=index, parent="", steps=(), models={}, metrics=metrics, accepted=accepted, why="", stop=stop,
        digest="", measures=measures or {},
    )  # fmt: skip


BEST = Best(metric="dev/right")


def test_the_best_round_has_the_best_metric_and_the_earliest_wins_a_tie():
    assert best_round(rounds(0.1, 0.5, 0.5, 0.3), BEST) == 1
    assert best_round(rounds(0.4, 0.2, 0.2, 0.3), Best(metric="dev/right", mode="min")) == 1


def test_a_round_that_was_rolled_back_or_could_not_be_measured_is_never_best():
    assert best_round(rounds(0.1, 0.9, 0.5, rolled_back=(1,)), BEST) == 2
    assert best_round(rounds(0.1, None, 0.05), BEST) == 0
    assert best_round(rounds(None, None), BEST) == 0


def test_without_a_metric_the_newest_accepted_round_is_best():
    assert best_round(rounds(0.9, 0.1, 0.0, rolled_back=(2,)), None) == 1
    assert best_round([], None) == 0


def test_a_verdict_compares_with_the_round_before_and_the_best_one():
    before = rounds(0.5, 0.7, 0.6)
    assert verdict("dev_right >= prev_dev_right", BEST, before, {"dev/right": 0.65}, {}) == (True, "")
    assert verdict("dev_right >= best_dev_right", BEST, before, {"dev/right": 0.65}, {}) == (
        False,
        "not dev_right >= best_dev_right",
    )


def test_a_null_is_no_verdict_and_the_base_is_always_accepted():
    assert verdict("dev_right > 0", BEST, rounds(0.5), {"dev/right": None}, {}) == (False, "could not judge dev_right > 0")
    assert verdict("dev_right > 1", BEST, [], {"dev/right": 0.0}, {}) == (True, "")


def test_a_verdict_that_is_a_number_is_refused():
    with pytest.raises(RecipeError, match="'dev_right' gives a number, where true or false is wanted"):
        verdict("dev_right", BEST, rounds(0.5), {"dev/right": 0.5}, {})


def test_prev_is_the_last_accepted_round_and_not_one_that_was_rolled_back():
    before = rounds(1.0, 0.33, rolled_back=(1,))
    assert verdict("dev_right >= prev_dev_right", None, before, {"dev/right": 0.67}, {}) == (
        False,
        "not dev_right >= prev_dev_right",
    )


def measured(how: str, *values: float | None, rolled_back: tuple[int, ...] = ()) -> list[Seal]:
    """Rounds that each measured dev/right in the way that a letter of `how` names."""
    return [
        sealed(at, {"dev/right": value}, at not in rolled_back, measures={"dev/right": letter})
        for at, (letter, value) in enumerate(zip(how, values, strict=True))
    ]


def test_the_best_round_is_looked_for_among_those_measured_as_the_newest_accepted_one():
    assert best_round(measured("aabb", 0.2, 0.9, 0.3, 0.1), BEST) == 2
    assert best_round(measured("aab", 0.2, 0.9, 0.3, rolled_back=(2,)), BEST) == 1


def test_each_way_of_measuring_has_its_best_round():
    assert best_rounds(measured("aabb", 0.2, 0.9, 0.3, 0.1), BEST) == {1, 2}
    assert best_rounds(measured("aab", 0.2, 0.9, 0.3, rolled_back=(2,)), BEST) == {1}
    assert best_rounds(rounds(None, None), BEST) == {0}
    assert best_rounds(rounds(0.1, 0.2), None) == {1}


@pytest.mark.parametrize(("column", "before"), [("prev_dev_right", "aab"), ("best_dev_right", "aab")])
def test_what_another_round_measured_differently_is_null_for_a_verdict(column, before):
    keep_if = f"dev_right >= {column}"
    old = measured("aa", 0.1, 0.2)
    found = verdict(keep_if, BEST, old, {"dev/right": 0.9}, {"dev/right": "b"})
    assert found == (False, f"could not judge {keep_if}: dev/right was measured differently in round 1")
    assert verdict(keep_if, BEST, measured(before, 0.1, 0.2, 0.3), {"dev/right": 0.9}, {"dev/right": "b"}) == (True, "")


def test_patience_does_not_wait_for_a_value_that_was_measured_differently():
    stop = Stop(patience=2, metric="dev/right")
    before = measured("aab", 0.9, 0.9, 0.1)
    assert stop_reason(stop, before, {"dev/right": 0.05}, {"dev/right": "b"}, 3, 0) == ""
    before = measured("aabb", 0.9, 0.9, 0.1, 0.05)
    assert stop_reason(stop, before, {"dev/right": 0.05}, {"dev/right": "b"}, 4, 0) != ""


def test_patience_counts_rounds_since_the_best_one():
    stop = Stop(patience=2, metric="dev/right")
    assert stop_reason(stop, rounds(0.1, 0.5), {"dev/right": 0.4}, {}, 2, 0) == ""
    assert stop_reason(stop, rounds(0.1, 0.5, 0.4), {"dev/right": 0.5}, {}, 3, 0) == "dev/right did not improve for 2 rounds"
    assert stop_reason(stop, rounds(0.1, 0.5, 0.4), {"dev/right": 0.6}, {}, 3, 0) == ""


def test_a_budget_of_tokens_ends_the_run_and_no_run_ends_at_the_base():
    assert stop_reason(Stop(tokens=100), rounds(0.1, 0.2), {}, {}, 2, 100) == "100 tokens were generated, budget 100"
    assert stop_reason(Stop(tokens=101), rounds(0.1, 0.2), {}, {}, 2, 100) == ""
    assert stop_reason(Stop(tokens=1), [], {}, {}, 0, 9) == ""


def test_a_stop_stands_only_while_the_recipe_in_force_would_stop_there_too():
    stopped = [*rounds(0.5, 0.4), sealed(2, {"dev/right": 0.4}, stop="dev/right did not improve for 2 rounds")]
    assert standing_stop(Stop(patience=2, metric="dev/right"), stopped, 0) == "dev/right did not improve for 2 rounds"
    assert standing_stop(Stop(patience=3, metric="dev/right"), stopped, 0) == ""
    assert standing_stop(None, stopped, 0) == ""
    assert standing_stop(Stop(patience=2, metric="dev/right"), rounds(0.5, 0.4, 0.4), 0) == ""


def test_patience_counts_anew_from_the_round_after_which_more_were_asked_for():
    stop = Stop(patience=2, metric="dev/right")
    before = [*rounds(0.5, 0.4), sealed(2, {"dev/right": 0.4}, stop="dev/right did not improve for 2 rounds")]
    assert stop_reason(stop, before, {"dev/right": 0.4}, {}, 3, 0) == ""
    before.append(sealed(3, {"dev/right": 0.4}))
    assert stop_reason(stop, before, {"dev/right": 0.4}, {}, 4, 0) != ""
    more_patient = Stop(patience=4, metric="dev/right")  # round 2 was no end for it, so it counts from round 0
    assert stop_reason(more_patient, before, {"dev/right": 0.4}, {}, 4, 0) != ""


def test_what_no_earlier_round_measured_is_null_in_a_verdict_and_no_error():
    held = verdict("dev_other >= prev_dev_other", None, rounds(0.5), {"dev/right": 0.5, "dev/other": 0.5}, {})
    assert held == (False, "could not judge dev_other >= prev_dev_other")
