"""The local backend: the same engine and trainer in this process."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from toys import NEW, NUMERICS, OLD, Sleeper, Toy, chunks_of, fetch, learn

from selfkd.backend import local as local_backend
from selfkd.backend.base import Sampling, Saves, Trained, TrainSpec
from selfkd.backend.local import LocalBackend
from selfkd.backend.machine import Machine
from selfkd.backend.trainer import sealed
from selfkd.backend.trainer.sealed import STOP
from selfkd.core.accelerator import GIB, Accelerator, Card
from selfkd.core.pool import Model
from selfkd.errors import Stopped, UsageError


def test_the_local_backend_answers_and_trains_in_this_process(tmp_path: Path) -> None:
    local = LocalBackend(Machine(backend="local"), NUMERICS, tmp_path, engine=Toy, trainer=learn, loader=fetch)
    replies = list(local.generate(NEW, chunks_of(tmp_path, "answer"), Sampling()))
    assert [reply.weights for reply in replies] == [NEW.digest]
    local.close()


def test_on_a_card_the_local_engine_scores_before_it_sleeps_and_wakes_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Accelerator("cuda", (Card("0", "H100", (9, 0), 80 * GIB, 79 * GIB),))
    monkeypatch.setattr(local_backend, "accelerator", lambda: card)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    local = LocalBackend(
        Machine(backend="local"), {**NUMERICS, "marks": str(tmp_path)}, tmp_path, engine=Sleeper, trainer=learn
    )
    list(local.generate(OLD, chunks_of(tmp_path, "answer"), Sampling()))
    local.train(OLD, None, [], TrainSpec("sft", 1), tmp_path / "out")
    list(local.generate(NEW, chunks_of(tmp_path, "answer"), Sampling()))
    assert local.swap_notes()["proved"] == "scored under 0000"
    local.close()


def slow(start: Model, reference: Any, rows: Any, spec: TrainSpec, out: Path, numerics: Any, on_progress: Any) -> Trained:
    """A trainer that is sent a signal in its second step, twice where it is told so, and looks for the wish to stop behind each."""
    for step in range(1, 4):
        for _ in range(spec.trl["signals"] if step == 2 else 0):
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)  # the rest of the step
        on_progress({"step": step, "steps": 3, "loss": 0.5, "tokens": 9, "seconds": 0.1})
        if (spec.saves.folder / STOP).exists():
            (spec.saves.folder / f"sealed at {step}").touch()
            raise Stopped("stopped on request")
    return Trained(out, {}, {})


@pytest.mark.parametrize(
    ("signals", "worth", "patience", "minutes", "left"),
    [
        (1, 0.0, 60.0, 10, ["sealed at 2", "stop"]),
        (2, 0.0, 60.0, 10, ["stop"]),  # the second one waits for nothing
        (1, 0.0, 0.01, 10, ["stop"]),  # the step takes too long
        (1, 60.0, 60.0, 10, []),  # what was done is done again sooner
        (1, 0.0, 60.0, 0, []),
    ],
)
def test_a_stop_seals_the_step_at_hand(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals: int,
    worth: float,
    patience: float,
    minutes: float,
    left: list[str],
) -> None:
    """Who drives the run puts its own handler in place at each step, as `selfkd run` does."""
    monkeypatch.setattr(sealed, "WORTH_SECONDS", worth)
    monkeypatch.setattr(sealed, "STOP_SECONDS", patience)

    def stop(number: int, frame: Any) -> None:
        raise Stopped("stopped on request")

    local = LocalBackend(Machine(backend="local"), NUMERICS, tmp_path, engine=Toy, trainer=slow, loader=fetch)
    (tmp_path / "update").mkdir()
    spec = TrainSpec("sft", 1, saves=Saves(tmp_path / "update", "key", minutes), trl={"signals": signals})
    monkeypatch.setattr(local._engine, "sleep", lambda: None)
    before = signal.signal(signal.SIGINT, stop)
    try:
        with pytest.raises(Stopped):
            local.train(OLD, None, [], spec, tmp_path / "out", lambda progress: signal.signal(signal.SIGINT, stop))
        assert signal.getsignal(signal.SIGINT) is stop
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(path.name for path in (tmp_path / "update").iterdir()) == left


def test_weights_of_another_kind_get_an_engine_of_their_own(tmp_path: Path) -> None:
    started: list[str] = []

    def engine(numerics: dict[str, Any], model: Model) -> Toy:
        started.append(model.path)
        return Toy(numerics, model)

    models = [Model("policy", str(tmp_path / name), name[0] * 64) for name in ("small-1", "tall-1", "long-1")]
    for model, size in zip(models, (8, 9, 9), strict=True):
        Path(model.path).mkdir()
        (Path(model.path) / "config.json").write_text(json.dumps({"hidden_size": size}))
    local = LocalBackend(Machine(backend="local"), NUMERICS, tmp_path, engine=engine, trainer=learn, loader=fetch)
    for model in models:
        [reply] = local.generate(model, chunks_of(tmp_path, "answer"), Sampling())
        assert reply.weights == model.digest
    assert started == [models[0].path, models[1].path]
    local.close()


def test_the_local_backend_refuses_a_second_rank(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trains on one rank"):
        LocalBackend(Machine(backend="local"), {**NUMERICS, "trainers": 2}, tmp_path)


def test_of_several_cards_the_local_backend_shows_torch_the_one_with_most_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = (Card("0", "H100", (9, 0), 80 * GIB, 20 * GIB), Card("1", "H100", (9, 0), 80 * GIB, 79 * GIB))
    monkeypatch.setattr(local_backend, "accelerator", lambda: Accelerator("cuda", cards))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    LocalBackend(Machine(backend="local"), NUMERICS, tmp_path, engine=Toy, trainer=learn, loader=fetch)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")
