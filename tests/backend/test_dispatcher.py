"""The dispatcher on real actors: engines that die, hang or lie, and which chunk is asked again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from toys import NEW, OLD, chunk_of, chunks_of, texts

from selfkd.backend.base import Questions, Reply, Sampling, made_by
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import BackendError, UsageError, WeightsError


def names(replies: Iterator[Reply]) -> set[str]:
    """The files that came out; their names carry the hashes of their contents."""
    return {reply.path.name for reply in replies}


def test_one_engine_four_engines_and_reversed_order_leave_the_same_files(backend: Any, tmp_path: Path) -> None:
    orders = [f"sleep {0.05 * (number % 3)}" for number in range(8)]
    chunks = chunks_of(tmp_path, *orders)
    one, four = backend(generators=1), backend(generators=4)
    alone = names(one.generate(OLD, chunks, Sampling()))
    assert len(alone) == 8
    assert names(four.generate(OLD, chunks, Sampling())) == alone
    assert names(four.generate(OLD, chunks[::-1], Sampling())) == alone


def test_engines_live_on_and_are_swapped_to_the_model_that_is_asked(backend: Any, tmp_path: Path) -> None:
    ray = backend(generators=2)
    chunks = chunks_of(tmp_path, "meet", "meet")
    list(ray.generate(OLD, chunks, Sampling()))
    assert ray.swap_notes() == {"seconds": 0.1, "proved": True, "survived": None, "engines": 2}
    replies = list(ray.generate(NEW, chunks, Sampling()))
    assert {reply.weights for reply in replies} == {NEW.digest}
    assert ray.swap_notes()["survived"] == 0.9
    assert len(list(ray.log.glob("engine-*.log"))) == 2


def test_every_engine_that_came_up_says_what_it_computes_with(backend: Any, tmp_path: Path) -> None:
    ray = backend(generators=2)
    assert ray.facts() == {}
    replies = list(ray.generate(OLD, chunks_of(tmp_path, "meet", "meet"), Sampling()))
    assert ray.facts() == {"engine-0": {"torch": "toy"}, "engine-1": {"torch": "toy"}}
    assert {made_by(reply.path) for reply in replies} == {(OLD.digest, digest.of({"torch": "toy"}))}


def test_logprobs_come_for_every_row_whatever_their_number(backend: Any) -> None:
    rows = pl.DataFrame({"id": [f"r{number}" for number in range(600)]})
    scores = list(backend(generators=2).logprobs(OLD, rows))
    assert sorted(name for name, _, _ in scores) == sorted(rows["id"])


def test_a_killed_engine_is_replaced_by_one_with_the_current_weights(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    list(ray.generate(OLD, chunks_of(tmp_path, "answer"), Sampling()))
    replies = list(ray.generate(NEW, chunks_of(tmp_path, "die-once", "answer"), Sampling()))
    assert {reply.weights for reply in replies} == {NEW.digest}
    assert all(text.startswith("1111") for reply in replies for text in texts(reply))
    assert "engine-0 lost during chunk" in (ray.log / "ray.log").read_text()


def test_a_hanging_engine_is_replaced_at_its_deadline(backend: Any, tmp_path: Path) -> None:
    ray = backend(chunk_timeout=3.0)
    started = time.monotonic()
    replies = list(ray.generate(OLD, chunks_of(tmp_path, "hang-once"), Sampling()))
    assert len(replies) == 1
    assert 3.0 <= time.monotonic() - started < 30.0


@pytest.mark.parametrize("order", ["die", "fail"])
def test_a_chunk_that_ends_two_engines_stops_the_run_and_is_named(backend: Any, tmp_path: Path, order: str) -> None:
    chunk = chunk_of(tmp_path, [order])
    with pytest.raises(BackendError, match=f"chunk {chunk.key[:12]} ended 2 engines"):
        list(backend().generate(OLD, [chunk], Sampling()))


def test_a_reply_of_other_weights_stops_the_run_at_once(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    with pytest.raises(WeightsError, match="was answered by weights ffffffffffff"):
        list(ray.generate(OLD, chunks_of(tmp_path, "lie"), Sampling()))
    assert not (ray.log / "ray.log").exists() or "lost" not in (ray.log / "ray.log").read_text()


def test_a_swap_that_is_not_proved_stops_the_run_at_once(backend: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="the probe differs"):
        list(backend().generate(Model("policy", "broken", "2" * 64), chunks_of(tmp_path, "answer"), Sampling()))


def test_an_engine_that_never_starts_is_not_tried_for_ever(backend: Any, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="2 engines in a row did not start"):
        list(backend().generate(Model("policy", "crash", "3" * 64), chunks_of(tmp_path, "answer"), Sampling()))


def test_what_an_engine_raises_is_told_in_words_also_where_the_error_does_not_pickle(backend: Any, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="2 engines in a row did not start") as caught:
        list(backend().generate(Model("policy", "odd", "4" * 64), chunks_of(tmp_path, "answer"), Sampling()))
    assert caught.value.fix.count("engine lost: ValidationError: 9 attention heads must be divisible by 2\n") == 2
    assert "serializable" not in str(caught.value)


def test_an_error_of_the_user_keeps_its_type_and_is_not_retried(backend: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="prompt 7 is too long") as caught:
        list(backend().generate(OLD, chunks_of(tmp_path, "refuse"), Sampling()))
    assert type(caught.value) is UsageError
    assert caught.value.fix == "Drop it."


def test_closing_the_iterator_abandons_what_is_in_flight(backend: Any, tmp_path: Path) -> None:
    ray = backend(generators=2)
    replies = ray.generate(OLD, chunks_of(tmp_path, "answer", "hang", "hang"), Sampling())
    next(replies)
    started = time.monotonic()
    replies.close()
    assert time.monotonic() - started < 3.0
    assert len(list(ray.generate(OLD, chunks_of(tmp_path, "answer"), Sampling()))) == 1


def test_tokens_of_a_chunk_in_flight_are_reported(backend: Any, tmp_path: Path) -> None:
    reports: list[dict[str, int]] = []
    list(backend().generate(OLD, [chunk_of(tmp_path, ["answer", "sleep 1.5"])], Sampling(), reports.append))
    assert {"requests": 1, "tokens": 7, "chunks": 0, "waiting": 1} in reports


def test_answers_of_an_earlier_chunk_are_not_reported_while_rows_are_scored(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    reports: list[dict[str, int]] = []
    list(ray.generate(OLD, chunks_of(tmp_path, "answer"), Sampling()))
    rows = pl.DataFrame({"id": ["r"], "messages": [[{"role": "user", "content": "sleep 1.5"}]]})
    list(ray.logprobs(OLD, rows, reports.append))
    assert reports[-1] == {"requests": 0, "tokens": 0, "chunks": 0, "waiting": 1}


@pytest.mark.parametrize("exact", [True, False])
def test_an_engine_is_told_which_chunk_follows_unless_answers_must_be_exact(backend: Any, tmp_path: Path, exact: bool) -> None:
    chunks = chunks_of(tmp_path, "answer", "answer", "answer")
    replies = list(backend(exact=exact).generate(OLD, chunks, Sampling()))
    assert [reply.key for reply in replies] == [chunk.key for chunk in chunks]
    told = sorted(path.name for path in (tmp_path / "tmp").glob("told-*"))
    assert told == ([] if exact else sorted(f"told-{chunk.key}" for chunk in chunks[1:]))


def test_an_engine_of_another_kind_makes_room(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    for name, size in (("small", 8), ("tall", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"hidden_size": size}))
        model = Model("policy", str(tmp_path / name), digest.of(name))
        [reply] = ray.generate(model, chunks_of(tmp_path, "answer"), Sampling())
        assert reply.weights == model.digest
    assert len(list(ray.log.glob("engine-*.log"))) == 2
    assert ray.swap_notes()["engines"] == 1


def test_a_warmed_engine_is_the_one_that_answers(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    ray.warm(OLD)
    list(ray.generate(OLD, chunks_of(tmp_path, "answer"), Sampling()))
    assert ray.swap_notes()["engines"] == 1


def test_a_model_is_loaded_in_another_process_and_errors_keep_their_type(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    notes = ray.load({"folder": "x"}, tmp_path / "base", 7, Questions([], 64))
    assert notes["dither"] == 7 and notes["context"] == 64
    assert notes["pid"] != os.getpid()
    with pytest.raises(UsageError, match="no network"):
        ray.load({"hub": "a/b"}, tmp_path / "other", None)
