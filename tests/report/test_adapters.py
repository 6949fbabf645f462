"""What readers are told of adapters: of each round in status, and of the rounds that a comparison holds side by side."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, recipe_in
from rich.console import Console

from selfkd.backend.base import Trained
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.report import status, tables
from selfkd.report.compare import compare

LORA = RECIPE.replace("train: {loss: sft}", "train: {loss: sft, lora: {r: 4}, continue: true}")
MERGED = {"rank": 4, "serve": "merged", "survived": 1.0}
OVER_NF4 = {**MERGED, "quantise": "nf4", "gap_before": 0.2, "gap": 0.18, "likelier": 0.03, "carried": 0.87}


class Noting(Fake):
    """A trainer that notes of its adapters what it was given, update by update."""

    noted: tuple[dict[str, Any], ...] = ()

    def train(self, *arguments: Any, **more: Any) -> Trained:
        found = super().train(*arguments, **more)
        notes, self.noted = self.noted[:1], self.noted[1:]
        return Trained(found.folder, {**found.metrics, **({"lora": notes[0]} if notes else {})}, found.drops)


def made(folder: Path, name: str, text: str, *noted: dict[str, Any]) -> Run:
    run = Run.open(
        recipe_in(folder / name, text.replace("name: sums", f"name: {name}")), folder / "runs" / name, Machine(backend="fake")
    )
    backend = Noting(run.numerics)
    backend.noted = noted
    walk(run, backend, run.begin())
    return run


def printed(folder: Path) -> str:
    to = Console(width=200, record=True, file=io.StringIO(), highlight=False)
    tables.print_status(status.read(folder), to)
    return to.export_text()


def test_status_says_once_for_neighbours_what_an_adapter_is(tmp_path: Path) -> None:
    run = made(tmp_path, "a", LORA.replace("rounds: 2", "rounds: 3"), MERGED, MERGED, {**MERGED, "serve": "adapter", "rank": 8})
    shown = printed(run.folder)
    assert "rounds 1 to 2: train learned an adapter of rank 4, merged into the weights by engines\n" in shown
    assert "round 3: train learned an adapter of rank 8, served beside the weights" in shown


def test_status_says_what_four_bits_changed_and_warns_where_little_is_left(tmp_path: Path) -> None:
    run = made(tmp_path, "a", LORA, OVER_NF4, {**OVER_NF4, "carried": 0.31})
    shown = printed(run.folder)
    assert "learned over nf4: 87 % of what it learned is served, 0.18 apart in log-probability a token (mean +0.03)" in shown
    assert "only 31% of what the adapter learned over 4 bits shows over the full weights" in shown
    assert [len(row.warnings) for row in status.read(run.folder).rounds] == [0, 0, 1]


def test_a_comparison_names_the_adapter_that_stands_at_the_end_of_a_round(tmp_path: Path) -> None:
    whole = made(tmp_path, "whole", RECIPE)
    kept = made(tmp_path, "kept", LORA.replace("rounds: 2", "rounds: 1"), OVER_NF4)
    found = compare([whole.folder, kept.folder])
    (note,) = [note for note in found.notes if "adapter" in note]
    assert note.startswith("kept: in round 1 the policy is an adapter of rank 4, merged") and "over nf4: 87 %" in note


@pytest.mark.parametrize("carried", [None, 0.5, 1.2])
def test_no_warning_where_half_is_served_or_nothing_was_learned(tmp_path: Path, carried: float | None) -> None:
    run = made(tmp_path, "a", LORA.replace("rounds: 2", "rounds: 1"), {**OVER_NF4, "carried": carried})
    assert status.read(run.folder).rounds[-1].warnings == []
