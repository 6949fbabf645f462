"""Engine against trainer in a whole chain: recorded in the round and shown, outside its digest, with a reason where there is no figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from real_chain import make_home
from rich.console import Console

from selfkd.backend.base import SAMPLED
from selfkd.backend.choose import open_backend
from selfkd.backend.machine import Machine
from selfkd.backend.trainer import batches
from selfkd.chain import agreement
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.core.pool import KEYS, Model, Pool, as_stored, shape
from selfkd.recipe.load import load
from selfkd.report import status
from selfkd.report.tables import print_status
from selfkd.report.verify import verify

KEPT = "max_tokens: 24, vllm: {logprobs: 0}}"


def home_in(folder: Path, *changes: tuple[str, str]) -> Path:
    home = make_home(folder, rounds=1)
    text = (home / "chain.yaml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (home / "chain.yaml").write_text(text)
    return home


def walked(home: Path, name: str = "run") -> Run:
    machine = Machine(backend="local", generator="transformers", threads=1, dtype="float32")
    run = Run.open(load(str(home / "chain.yaml")), home / name, machine)
    attempt = run.begin()
    made = open_backend(run.machine, dict(run.numerics), attempt.logs)
    try:
        walk(run, made, attempt)
    finally:
        made.close()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    yield walked(home_in(tmp_path_factory.mktemp("kept"), ("max_tokens: 24}", KEPT)))


def shown(run: Run) -> str:
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_status(status.read(run.folder), console)
    return console.export_text()


def test_a_round_records_it_and_says_it_and_says_why_a_second_update_has_none(run: Run) -> None:
    found = run.sealed()[1].notes["engine_apart"]
    assert found["train"]["mean"] < 1e-5 and found["train"]["floor"] < 1e-5 and found["train"]["tokens"] > 20
    assert found["train-2"] == {"why": agreement.OTHER_WEIGHTS}  # it goes on from what the first one made
    said = shown(run)
    assert "round 1: train: engine and trainer " in said and "nats apart in the mean" in said
    assert "train-2: engine and trainer cannot be compared: no row was sampled by the weights" in said
    assert run.metrics()["train_engine_apart_mean"].to_list() == [None, found["train"]["mean"]]
    assert verify(run.folder).problems == []


def test_it_is_in_no_digest(run: Run, tmp_path: Path) -> None:
    """The log-probabilities of tokens may be anything: the table means the same."""
    table = run.made(1)["sample"].tables["samples"]
    frame = pl.concat([pl.read_parquet(run.folder / path) for path in table.files])
    assert frame["token_logprobs"].null_count() == 0
    sums = frame["token_logprobs"].list.eval(pl.element().cast(pl.Float64)).list.sum()
    assert (sums - frame["logprob"]).abs().max() < 1e-3
    frame.with_columns(pl.col("token_logprobs").list.eval(pl.element() * 2)).write_parquet(tmp_path / "other.parquet")
    assert digest.table(as_stored([tmp_path / "other.parquet"]), KEYS["samples"]) == table.digest


START = Model("policy", "models/root", "ab" * 32)
OTHER = Model("policy", "models/other", "cd" * 32)
ASKED, TOLD = ([{"role": "user", "content": text}] for text in ("2+2?", "Say a. 2+2?"))


def said(folder: Path, model: Model = START, asked: Any = ASKED, logprobs: Any = (-0.5, -1.5)) -> tuple[Any, str]:
    """What the engine is taken to have said of a row with one sample, of the pool that the sample lies in."""
    sample = {"id": "s1", "prompt": "p1", "model": str(model), "teacher_messages": asked, "token_ids": [7, 8]}
    shape("samples", [{**sample, "token_logprobs": logprobs and list(logprobs)}]).write_parquet(folder / "samples.parquet")
    rows = shape("rows", [{"id": "r1", "samples": ["s1"], "messages": ASKED}])
    return agreement.said_of(rows, Pool(files={"samples": (folder / "samples.parquet",)}), START, 0)


def test_only_what_the_starting_weights_said_behind_the_same_words_counts(tmp_path: Path) -> None:
    found, why = said(tmp_path)
    assert found.to_dicts() == [{"row": "r1", "ids": [7, 8], "logprobs": [-0.5, -1.5]}] and not why
    assert found.schema == pl.Schema(SAMPLED)
    assert said(tmp_path, model=OTHER) == (None, agreement.OTHER_WEIGHTS)
    assert said(tmp_path, asked=TOLD) == (None, agreement.OTHER_WORDS)
    assert said(tmp_path, logprobs=None) == (None, "")  # nobody asked for them: nothing is to be said


def test_of_many_rows_those_are_looked_at_that_the_update_takes_first() -> None:
    names = [f"r{number}" for number in range(50)]
    rows = [batches.Row(name, 1.0, np.zeros(3, np.int32), np.zeros(2, np.int32)) for name in names]
    assert {rows[at].id for at in batches.plan(rows, 8, 5, 0)[0]} == {names[at] for at in batches.ordered(names, 5, 0)[:8]}


def test_without_the_rounding_of_both_sides_there_is_no_alarm_and_words_say_so() -> None:
    found = {"mean": 0.5, "p99": 0.9, "tokens": 10, "trainer": {"mean": 0.01, "p99": 0.02, "tokens": 5}}
    alone = agreement.judged(found, None)
    assert not agreement.alarm(alone, "train") and "how much is rounding was not measured" in agreement.told(alone)
    both = agreement.judged(found, {"mean": 0.02, "p99": 0.05, "tokens": 5})
    assert both["floor"] == pytest.approx(0.03) and "their own rounding explains 0.03" in agreement.alarm(both, "train")
    assert not agreement.alarm({**both, "mean": 0.059}, "train")
    assert not agreement.alarm({**both, "mean": 1e-3, "floor": 1e-8}, "train")  # a swap may be as far off in fp32


@pytest.mark.nightly
def test_a_round_that_is_too_far_apart_warns_while_it_is_made_and_in_its_status(tmp_path: Path, monkeypatch: Any) -> None:
    real = agreement.said_of

    def wrong(*arguments: Any) -> Any:
        found, why = real(*arguments)
        return found if found is None else found.with_columns(pl.col("logprobs").list.eval(pl.element() - 0.5)), why

    monkeypatch.setattr(agreement, "said_of", wrong)
    run = walked(home_in(tmp_path, ("max_tokens: 24}", KEPT)))
    alarm = run.sealed()[1].notes["engine_apart"]["train"]["alarm"]
    assert "another chat template" in alarm and alarm[:40] in shown(run)
    events = (run.folder / "logs").rglob("events.jsonl")
    assert any("nats apart in the mean" in path.read_text() for path in events)
