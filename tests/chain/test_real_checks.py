"""A real chain whose updates are measured on their way, with an optimiser that lives on: killed inside one, it ends on the same digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from real_chain import finish, kill_group, make_home, start, until

from selfkd.report.verify import verify

CHECKS = {
    "train: {loss: sft, of: plain, trl: {learning_rate: 5.0e-4, num_train_epochs: 2}}": (
        "train: {loss: sft, of: plain, optimiser: continue, check: {every: 4, metric: dev/vowels, patience: 2}, "
        "trl: {learning_rate: 5.0e-4, num_train_epochs: 2, per_device_train_batch_size: 4}}"
    ),
    "train: {loss: dpo, nll: 1.0, of: pairs, trl: {learning_rate: 1.0e-4}}": (
        "train: {loss: dpo, nll: 1.0, of: pairs, optimiser: continue, check: {every: 1, metric: dev/vowels, pick: last}, "
        "trl: {learning_rate: 1.0e-4, per_device_train_batch_size: 2}}"
    ),
}


def home_in(folder: Path) -> Path:
    home = make_home(folder, machine="threads: 1\ngenerator: transformers\n")
    text = (home / "chain.yaml").read_text()
    for plain, checked in CHECKS.items():
        assert plain in text
        text = text.replace(plain, checked)
    (home / "chain.yaml").write_text(text)
    (home / "local.yaml").write_text("backend: local\nthreads: 1\ngenerator: transformers\n")
    return home


def checked(step: int) -> Any:
    return lambda event: event["event"] == "checked" and event["step"] >= step


@pytest.mark.nightly
@pytest.mark.real
def test_killed_inside_an_update_that_is_measured_it_ends_on_the_same_digest_under_ray_and_in_one_process(tmp_path):
    home = home_in(tmp_path)
    whole = finish(home, "whole")
    for index in (1, 2):
        made = whole.made(index)
        assert [one["step"] for one in made["train"].checks["figures"]] == [4, 6]  # every fourth, and the end
        assert made["train-2"].checks["picked"] == made["train-2"].checks["figures"][-1]["step"]
        assert made["train-2"].checks["figures"][-1]["value"] == whole.sealed()[index].metrics["dev/vowels"]
    assert whole.made(2)["train"].notes["optimiser"]["state"] == whole.made(1)["train-2"].states["policy"].digest
    assert verify(whole.folder).problems == []
    process = start(home, "killed")
    until(home / "runs" / "killed", checked(4), process)
    kill_group(process)
    killed, local = finish(home, "killed"), finish(home, "local", "local.yaml")
    assert killed.sealed()[-1].digest == whole.sealed()[-1].digest == local.sealed()[-1].digest
    assert verify(killed.folder).problems == []
