"""A Ray cluster for the tests of one file, and backends on it whose engines and trainers are toys."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from toys import NUMERICS, Toy, fetch, learn, links

from selfkd.backend.engine.held_engine import READER
from selfkd.backend.machine import Machine

TESTS = str(Path(__file__).parent.parent)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not find_spec("ray"):  # looked for, not imported: the backend sets what Ray reads at its import
        pytest.skip("the Ray backend needs the extra [cpu] or [gpu]")
    from selfkd.backend.ray.cluster import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *filter(None, sys.path)])  # the toys are imported in Ray's processes
    before = set(links(Path(f"/proc/{os.getpid()}/fd")))  # an engine of another test file may listen in this very process
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), cpus=16, threads=1)
    cluster.sockets_before = before
    yield cluster
    cluster.close()


@pytest.fixture
def backend(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    from selfkd.backend.ray.dispatcher import RayBackend

    opened: list[Any] = []

    def open_one(exact: bool = True, reader: Any = READER, **machine: Any) -> Any:
        log, numerics = tmp_path / f"log{len(opened)}", {**NUMERICS, "exact": exact}
        toys = {"engine": Toy, "trainer": learn, "loader": fetch, "reader": reader}
        opened.append(RayBackend(Machine(**machine), numerics, log, **toys, ahead=False))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()
