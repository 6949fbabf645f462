"""Cards that are not there: Ray lends numbers of cards on any machine, and who sits on which can be seen without one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from toys import NEW, NUMERICS, OLD, Sitter, Sleeper, chunks_of, learn

from selfkd.backend.base import Sampling, TrainSpec
from selfkd.backend.machine import Machine
from selfkd.core.accelerator import GIB, Accelerator, Card
from selfkd.core.pool import Model
from selfkd.errors import BackendError, UsageError

TESTS = str(Path(__file__).parent.parent)
CARDS = Accelerator("cuda", tuple(Card(str(number), "H100", (9, 0), 80 * GIB, 80 * GIB) for number in range(8)))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not find_spec("ray"):
        pytest.skip("the Ray backend needs the extra [cpu] or [gpu]")
    import sys

    from selfkd.backend.ray.cluster import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, *filter(None, sys.path)])
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), cpus=16, threads=1, cards=8)
    yield cluster
    cluster.close()


@pytest.fixture
def backend(cluster: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    from selfkd.backend.ray.dispatcher import RayBackend

    opened: list[Any] = []
    (tmp_path / "marks").mkdir()

    def open_one(trainers: int = 1, say: Callable[[str], None] = print, **machine: Any) -> Any:
        words = {**NUMERICS, "trainers": trainers, "marks": str(tmp_path / "marks")}
        log = tmp_path / f"log{len(opened)}"
        opened.append(
            RayBackend(Machine(**machine), words, log, engine=Sleeper, trainer=learn, ahead=False, say=say, hardware=CARDS)
        )
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def train(ray: Any, out: Path) -> dict[str, Any]:
    return dict(ray.train(OLD, None, [], TrainSpec("sft", 1), out).metrics)


def seen(placement: Any, seats: Any) -> list[list[str]]:
    """The cards that processes see which sit on these seats at the same time; all of them are as nice as this one."""
    import ray

    from selfkd.backend.ray.cluster import actor_class

    sitters = [actor_class(Sitter, **placement.options(seat)).remote(placement.visible(seat)) for seat in seats]
    placement.sitters = [*getattr(placement, "sitters", []), *sitters]
    found = ray.get([sitter.where.remote() for sitter in sitters], timeout=120)
    assert {nice for _, nice in found} == {os.nice(0)}
    return [cards.split(",") for cards, _ in found]


def commands() -> list[bytes]:
    """The command lines of all that this process started."""
    from selfkd.backend.ray.guardian import processes

    running, ours = processes(), {os.getpid()}
    while more := {pid for pid, (parent, _) in running.items() if parent in ours} - ours:
        ours |= more
    paths = [Path(f"/proc/{pid}/cmdline") for pid in ours]
    return [path.read_bytes() for path in paths if path.exists()]


def test_a_private_cluster_keeps_no_idle_process_and_leaves_ray_as_it_was(cluster: Any) -> None:
    import ray

    from selfkd.backend.ray.cluster import actor_class

    sitter = actor_class(Sitter, num_cpus=0).remote()
    ray.get(sitter.where.remote(), timeout=120)
    words = commands()
    assert any(b"raylet" in line for line in words) and any(b"ray::Sitter" in line for line in words)
    assert not [line for line in words if b"ray::IDLE" in line or b"log_monitor" in line]
    assert ray._private.ray_constants.ENABLE_RAY_CLUSTER
    ray.kill(sitter, no_restart=True)


@pytest.mark.parametrize(
    ("engines", "ranks", "parallel", "turns"),
    [(2, 3, 1, "share"), (1, 3, 2, "share"), (1, 1, 2, "split")],
)
def test_no_two_engines_and_no_two_ranks_meet_on_a_card(
    cluster: Any, engines: int, ranks: int, parallel: int, turns: str
) -> None:
    from selfkd.backend.ray.placement import Placement, plan

    machine, words = Machine(generators=engines, turns=turns), {**NUMERICS, "trainers": ranks, "tensor_parallel": parallel}
    placement = Placement.reserve(plan(machine, words, True), print)
    try:
        of_ranks, of_engines = seen(placement, placement.planned.ranks), seen(placement, placement.planned.engines)
    finally:
        placement.close()
    lent = [card for cards in of_engines for card in cards]
    alone = [card for cards in of_ranks for card in cards]
    assert (len(lent), len(set(lent))) == (engines * parallel,) * 2
    assert (len(alone), len(set(alone))) == (ranks,) * 2
    assert [len(cards) for cards in of_engines] == [parallel] * engines
    if turns == "split":
        assert not set(lent) & set(alone)
    else:
        assert set(alone) <= set(lent) if ranks <= engines * parallel else set(lent) <= set(alone)
        assert all(alone[number] in of_engines[number // parallel] for number in range(min(ranks, engines * parallel)))


def test_engines_sleep_while_the_ranks_of_their_cards_learn_and_the_ranks_live_on(backend: Any, tmp_path: Path) -> None:
    ray = backend(generators=2)
    chunks = chunks_of(tmp_path, "meet", "meet")
    list(ray.generate(OLD, chunks, Sampling()))
    before = ray.facts()
    first = train(ray, tmp_path / "a")
    cards = sorted(facts["cards"] for facts in before.values())
    assert first["asleep"] == cards and first["cards"] in cards
    assert {reply.weights for reply in ray.generate(NEW, chunks, Sampling())} == {NEW.digest}
    second = train(ray, tmp_path / "b")
    assert (second["pid"], second["asleep"]) == (first["pid"], cards)
    assert {name: facts for name, facts in ray.facts().items() if name in before} == before  # nobody started anew


def test_engines_wake_with_what_one_of_them_scored_under_the_model_that_was_trained(backend: Any, tmp_path: Path) -> None:
    ray = backend(generators=2)
    chunks = chunks_of(tmp_path, "meet", "meet")
    list(ray.generate(OLD, chunks, Sampling()))
    train(ray, tmp_path / "a")
    list(ray.generate(NEW, chunks, Sampling()))
    assert (ray.swap_notes()["proved"], ray.swap_notes()["engines"]) == ("scored under 0000", 2)
    train(ray, tmp_path / "b")  # of OLD, which no engine holds any more
    list(ray.generate(OLD, chunks, Sampling()))
    assert ray.swap_notes()["proved"] == "nothing was scored"


def test_with_cards_of_their_own_engines_stay_awake(backend: Any, tmp_path: Path) -> None:
    ray = backend(turns="split")
    list(ray.generate(OLD, chunks_of(tmp_path, "answer"), Sampling()))
    learned = train(ray, tmp_path / "a")
    assert learned["asleep"] == []
    assert learned["cards"] != ray.facts()["engine-0"]["cards"]


def test_an_engine_that_dies_while_it_falls_asleep_costs_no_update(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    list(ray.generate(Model("policy", "restless", "7" * 64), chunks_of(tmp_path, "answer"), Sampling()))
    assert train(ray, tmp_path / "a")["asleep"] == []
    assert "engine-0 lost while going to sleep" in (ray.log / "ray.log").read_text()
    assert len(list(ray.generate(NEW, chunks_of(tmp_path, "answer"), Sampling()))) == 1


def test_an_engine_that_hangs_while_it_falls_asleep_is_named_at_its_deadline(
    backend: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from selfkd.backend.ray import engine_pool

    ray = backend()
    list(ray.generate(Model("policy", "stuck", "7" * 64), chunks_of(tmp_path, "answer"), Sampling()))
    monkeypatch.setattr(engine_pool, "SLEEP_SECONDS", 1.0)
    assert train(ray, tmp_path / "a")["asleep"] == []
    said = (ray.log / "ray.log").read_text()
    assert "engine-0 lost while going to sleep: TimeoutError: no answer within 1 s" in said
    assert len(list(ray.generate(NEW, chunks_of(tmp_path, "answer"), Sampling()))) == 1


def test_a_swap_that_nobody_waited_for_does_not_count_after_sleep(backend: Any, tmp_path: Path) -> None:
    ray = backend()
    ray.warm(OLD)
    train(ray, tmp_path / "a")
    assert {reply.weights for reply in ray.generate(OLD, chunks_of(tmp_path, "answer"), Sampling())} == {OLD.digest}


def test_ranks_leave_where_the_engine_would_have_no_room_beside_them(backend: Any, tmp_path: Path, monkeypatch: Any) -> None:
    ray = backend()
    list(ray.generate(OLD, chunks_of(tmp_path, "answer"), Sampling()))
    monkeypatch.setattr(ray._engines, "have_room", lambda: False)
    first = train(ray, tmp_path / "a")
    assert train(ray, tmp_path / "b")["pid"] != first["pid"]


def test_what_the_cluster_cannot_hold_is_refused_before_anything_starts(backend: Any) -> None:
    with pytest.raises(UsageError, match="8 generators \\+ 1 trainers = 9 cards, and there are 8"):
        backend(generators=8, turns="split")


def test_whoever_waits_for_others_says_so_and_what_is_closed_is_free_again(backend: Any) -> None:
    first, words = backend(generators=8), []

    def hear(text: str) -> None:
        words.append(text)
        first.close()

    backend(generators=2, say=hear)
    assert len(words) == 1
    assert words[0].startswith("waits for 2 cards: others use 8 of 8 cards and 8 of 16 cores")
    backend(generators=6, say=words.append)
    assert len(words) == 1


def test_a_call_that_hangs_is_named_at_its_deadline(cluster: Any, tmp_path: Path) -> None:
    import ray

    from selfkd.backend.ray.cluster import actor_class, result_of

    sitter = actor_class(Sitter, num_cpus=0).remote()
    with pytest.raises(BackendError, match="loading the model did not end within 1 s"):
        result_of(sitter.sleep.remote(60.0), "loading the model", tmp_path, 1.0)
    ray.kill(sitter, no_restart=True)
