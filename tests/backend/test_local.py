"""The local backend: the same engine and trainer in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from toys import NEW, NUMERICS, Toy, chunks_of, fetch, learn

from selfkd.backend.base import Sampling
from selfkd.backend.local import LocalBackend
from selfkd.backend.machine import Machine
from selfkd.errors import UsageError


def test_the_local_backend_answers_and_trains_in_this_process(tmp_path: Path) -> None:
    local = LocalBackend(Machine(backend="local"), NUMERICS, tmp_path, engine=Toy, trainer=learn, loader=fetch)
    replies = list(local.generate(NEW, chunks_of(tmp_path, "answer"), Sampling()))
    assert [reply.weights for reply in replies] == [NEW.digest]
    local.close()


def test_the_local_backend_refuses_a_second_rank(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trains on one rank"):
        LocalBackend(Machine(backend="local"), {**NUMERICS, "trainers": 2}, tmp_path)
