"""One engine in several workers, real, on a CPU: a swap that is proved, a worker killed in the middle, and what vLLM refuses in words."""

from __future__ import annotations

import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from real_chain import begins, finish, make_home, pid_in, start, until
from tiny import as_model, tiny_model
from toys import chunk_of

from selfkd.backend.base import Sampling
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.chain.run import Run
from selfkd.report.verify import verify

pytestmark = [pytest.mark.real, pytest.mark.nightly]
TWO = "threads: 1\ntensor_parallel: 2\n"


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if not find_spec("vllm") or not find_spec("trl"):
        pytest.skip("needs vLLM and TRL: install the extra [cpu] or [gpu]")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"), machine=TWO, rounds=1)


def workers_of(engine: int) -> list[int]:
    """The processes below an engine that load weights: those without children of their own, the youngest last."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it ended between two looks
            continue
    below, found = {engine}, []
    while new := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= new
    for pid in sorted(below - {engine} - set(parents.values())):
        if b"Worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return found


def test_a_worker_killed_in_the_middle_costs_an_engine_and_no_bit(home: Path) -> None:
    whole, run = finish(home, "whole"), home / "runs" / "killed"
    swap = whole.made(1)["measure"].notes["swap"]
    assert swap["proved"] is True and swap["survived"] > 0.5
    process = start(home, "killed")
    until(run, begins(1, "sample"), process)
    [first, *others] = workers_of(pid_in(run, "engine-0.log", "generator"))
    assert len(others) == 1
    os.kill(first, signal.SIGKILL)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    ended = Run.at(run)
    assert (max(run.glob("logs/attempt-*/engine-1.log"))).exists()  # the one that took its place
    assert ended.sealed()[-1].digest == whole.sealed()[-1].digest
    assert verify(run).problems == []


def test_what_vllm_refuses_reaches_a_person_in_words(home: Path, tmp_path: Path) -> None:
    """An option that vLLM's own configuration checks: the error holds objects that no process can hand to another."""
    from selfkd.backend.ray.dispatcher import RayBackend
    from selfkd.errors import BackendError

    machine = Machine(threads=1, dtype="float32", kv_cache_gb=0.1, engine={"max_num_batched_tokens": 1})
    numerics: dict[str, Any] = {**fixed_numerics(machine), "max_model_len": 64}
    backend = RayBackend(machine, numerics, tmp_path / "log")
    try:
        model = as_model(tiny_model(tmp_path / "tiny"))
        with pytest.raises(BackendError) as caught:
            list(backend.generate(model, [chunk_of(tmp_path, ["hi"])], Sampling(max_tokens=4)))
    finally:
        backend.close()
    assert "engine lost: ValidationError: " in caught.value.fix and "max_num_batched_tokens" in caught.value.fix
    assert "ArgsKwargs" not in str(caught.value) and "serializable" not in str(caught.value)
