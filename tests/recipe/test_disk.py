"""What a run takes on disk at its peak: by hand, and beside what a run that was made took."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, Faults, recipe_in
from weighty import COLUMNS, ROWS, Weighty

from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.errors import UsageError
from selfkd.recipe import disk
from selfkd.recipe.disk import Kept, Numbers
from selfkd.recipe.plan import plan
from selfkd.recipe.schema import Recipe

BEST = "\nbest: {metric: dev/last_number}"
TWO = RECIPE.replace("  - train: {loss: sft}", "  - train: {loss: sft}\n  - train: {loss: sft, name: again}")
WARM = RECIPE.replace("\nsteps:", "\nbefore:\n  - gold\n  - train: {loss: sft, name: warm}\nsteps:")
LIVES_ON = RECIPE.replace("{loss: sft}", "{loss: sft, optimiser: continue}")
CHECKED = RECIPE.replace("{loss: sft}", "{loss: sft, check: {every: 4, metric: dev/last_number}}")
FROM_BASE = RECIPE.replace("{loss: sft}", "{loss: sft, from: base}")


def of(folder: Path, head: str, text: str = RECIPE, dtype: str = "bfloat16") -> disk.Disk:
    return disk.of(made(folder, head, text), Numbers(1000, 10), 0, dtype)


def made(folder: Path, head: str, text: str = RECIPE) -> Recipe:
    return recipe_in(folder, text.replace("rounds: 2", f"rounds: {head}"))


@pytest.mark.parametrize(
    ("head", "text", "kept", "bytes"),
    [
        ("1", RECIPE, Kept(1, written=1), 8000),  # the root, and the first child
        ("2", RECIPE, Kept(2, written=1), 12000),  # root, round 1, and round 2 that is written
        ("9", RECIPE, Kept(3, written=1), 16000),  # root, two of the newest rounds, and one that is written
        ("9\nkeep: {last: 1, base: false}", RECIPE, Kept(1, written=1), 8000),
        ("9\nkeep: {last: 0, base: false, best: false}", RECIPE, Kept(1, written=1), 8000),  # the head is needed
        ("9\nkeep: {last: 0, base: false, best: false}", FROM_BASE, Kept(2, written=1), 12000),  # and the base that steps name
        ("9" + BEST, RECIPE, Kept(4, written=1), 20000),  # the best round may be an older one
        ("9", TWO, Kept(3, written=2), 20000),
        (
            "9",
            LIVES_ON,
            Kept(3, written=1, states=(0, 0)),
            32000,
        ),  # the head's and the one that is written: twice the weights each
        ("1", CHECKED, Kept(1, written=2), 12000),  # the root, the best so far, and the newest one
        ("1", WARM, Kept(2, written=1), 12000),  # the root and what the warm-up made of it
        ("9\nkeep: {last: 4, as: bf16}", RECIPE, Kept(3, 3), 18000),  # 4 x 3 + 2 x 3: one of them is whole while it is rounded
        ("9\nkeep: {last: 2, as: bf16}", RECIPE, Kept(3, 1), 14000),
        ("9\nkeep: {last: 1, best: false, as: bf16}", RECIPE, Kept(2, written=1), 12000),
    ],
)
def test_the_weights_that_lie_there_at_once(tmp_path: Path, head: str, text: str, kept: Kept, bytes: int) -> None:
    found = of(tmp_path, head, text)
    assert (found.kept, found.weights) == (kept, bytes)


LORA = RECIPE.replace("{loss: sft}", "{loss: sft, lora: {r: 4}}")
ON = RECIPE.replace("{loss: sft}", "{loss: sft, lora: {r: 4}, continue: true}")
ANEW = RECIPE.replace("{loss: sft}", "{loss: sft, lora: {r: 4}, from: base}")


@pytest.mark.parametrize(
    ("head", "text", "kept", "bytes"),
    [
        ("1", LORA, Kept(1, ranks=(4,)), 4 * (1000 + 40)),  # the root, and an adapter of rank 4 at 10 numbers a rank
        ("3", LORA, Kept(1, ranks=(4, 8, 12)), 4 * (1000 + 240)),  # each is laid over those before it
        ("9", ON, Kept(1, ranks=(4, 4, 4)), 4 * (1000 + 120)),
        ("9", ANEW, Kept(1, ranks=(4, 4, 4)), 4 * (1000 + 120)),
        ("9\nkeep: {last: 1, base: false, best: false}", ON, Kept(1, ranks=(4, 4)), 4 * (1000 + 80)),  # the root lies beneath
        (
            "9",
            ON.replace("continue: true", "continue: true, optimiser: continue"),
            Kept(1, ranks=(4, 4, 4), states=(4, 4)),
            4 * (1000 + 120 + 160),
        ),
        (
            "1",
            ON.replace("continue: true", "check: {every: 2, metric: dev/last_number}"),
            Kept(1, ranks=(4, 4)),
            4 * (1000 + 80),
        ),
        ("3" + BEST, ON, Kept(1, ranks=(4, 4, 4)), 4 * (1000 + 120)),
        ("9\nkeep: {last: 4, as: bf16}", ON, Kept(1, ranks=(4,) * 5), 4 * (1000 + 200)),  # adapters stay as they are
    ],
)
def test_an_adapter_counts_as_one_and_its_base_once(tmp_path: Path, head: str, text: str, kept: Kept, bytes: int) -> None:
    found = of(tmp_path, head, text)
    assert (found.kept, found.weights) == (kept, bytes)


@pytest.mark.parametrize(
    ("text", "minutes", "bytes"),
    [
        (RECIPE, 10, 3 * 12 * 1000 - 4 * 1000),  # two and a draft, of 12 bytes a number: AdamW's two beside the weights
        (RECIPE, 0, 0),
        (CHECKED, 0, 3 * 12 * 1000 - 4 * 1000),  # a check goes on from one in any case
        (RECIPE.replace("{loss: sft}", "{loss: sft, trl: {optim: sgd}}"), 10, 2 * 4 * 1000),  # then two, beside the child
        (RECIPE.replace("{loss: sft}", "{loss: sft, trl: {optim: adamw_bnb_8bit}}"), 10, 0),  # is never written
        (ON, 10, (3 * 12 - 4) * 40),  # of the adapter alone
    ],
)
def test_the_checkpoints_of_a_long_update_lie_beside_what_is_kept(
    tmp_path: Path, text: str, minutes: float, bytes: int
) -> None:
    machine = Machine(backend="local", checkpoint_minutes=minutes)
    found = disk.of(made(tmp_path, "2", text), Numbers(1000, 10), 0, "bfloat16", machine)
    assert found.update == bytes and found.peak == found.weights + bytes
    assert ("of checkpoints inside its update where that takes long" in found.text("", None)) == bool(bytes)


def test_an_engine_in_float32_keeps_all_in_fp32(tmp_path: Path) -> None:
    assert of(tmp_path, "9\nkeep: {last: 4, as: bf16}", dtype="float32").kept == Kept(5, written=1)


def test_answers_are_stored_once_as_samples_and_once_as_rows(tmp_path: Path) -> None:
    recipe = made(tmp_path, "2")
    assert disk.of(recipe, Numbers(1000), 300, "bfloat16").answers == 300 * 10 * 2
    only = made(tmp_path, "2", RECIPE.replace("  - train: {loss: sft}\n", ""))
    assert disk.of(only, Numbers(1000), 300, "bfloat16").answers == 300 * 10


Free = namedtuple("Free", "free")


@pytest.mark.parametrize(
    ("free", "said", "refused"),
    [
        (10**9, "1.0 GB are free", False),
        (20_000_000, "ONLY 20.0 MB ARE FREE: it may stop, and go on once there is room", False),
        (7_000_000, "disk: at least 8.0 MB are written at once, and 7.0 MB are free at", True),
    ],
)
def test_a_plan_compares_with_what_is_free_and_refuses_only_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, said: str, refused: bool
) -> None:
    monkeypatch.setattr("selfkd.recipe.plan.parameters", lambda path: 2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Free(free))
    found = plan(made(tmp_path, "9"), Machine(backend="fake"), tmp_path / "runs" / "sums")
    if not refused:
        assert ": 32.0 MB of weights in round 3 (3 checkpoints in fp32, 1 being written)" in str(found)
        assert said in str(found)
        found.refuse()
        return
    with pytest.raises(UsageError, match=said):
        found.refuse()


def test_what_a_run_holds_already_counts_as_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Free(100))
    (tmp_path / "run" / "round-000").mkdir(parents=True)
    (tmp_path / "run" / "round-000" / "model").write_bytes(b"x" * 50)
    folders = sum(path.lstat().st_size for path in (tmp_path / "run").rglob("*") if path.is_dir())
    assert disk.free(tmp_path / "run") == 150 + folders
    assert disk.free(tmp_path / "not" / "there") == 100


@pytest.mark.parametrize(
    ("head", "text"),
    [
        ("4", RECIPE),
        ("4\nkeep: {last: 1, base: false, best: false}", RECIPE),
        ("5\nkeep: {last: 4, as: bf16}", RECIPE),
        ("4\nkeep: {last: 2, as: bf16}", RECIPE),
        ("3", TWO),
        ("2", WARM),
        ("3\nkeep: {last: 0, base: false, best: false}", FROM_BASE),
    ],
)
def test_a_run_takes_what_was_said_within_two_hundredths(tmp_path: Path, head: str, text: str) -> None:
    """What is said of files beside the numbers in them is nothing: their headers are the difference."""
    recipe, peak = made(tmp_path, head, text), 0

    class Watching(Faults):
        def __call__(self, *arguments: Any) -> None:
            nonlocal peak
            peak = max(peak, sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors")))

    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    with Watching():
        walk(run, Weighty(run.numerics), run.begin())
    said = disk.of(recipe, Numbers(ROWS * COLUMNS), 0, "bfloat16").weights
    assert said <= peak <= 1.02 * said


def test_a_machine_that_is_elsewhere_has_a_disk_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfkd.recipe.plan.parameters", lambda path: 2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Free(1000))
    found = plan(made(tmp_path, "2"), Machine(cards=1, card_gb=80.0), tmp_path)
    assert not [problem for problem in found.problems if problem.startswith("disk")]
    assert "are free" not in dict(found.lines)["disk"].lower()


SCORED = RECIPE.replace("  - select:", "  - score: {classifier: judge, label: good, as: liked}\n  - select:")


def test_a_model_that_only_scores_is_copied_into_the_run_once(tmp_path: Path) -> None:
    twice = SCORED.replace("  - select:", "  - score: {classifier: judge, label: bad, as: disliked}\n  - select:")
    recipe = made(tmp_path, "2", twice)
    folder = tmp_path / "judge"
    folder.mkdir()
    for name, size in (("model-1.safetensors", 3000), ("model-2.safetensors", 2500), ("pytorch_model.bin", 9999)):
        (folder / name).write_bytes(bytes(size))
    found, plain = disk.of(recipe, Numbers(1000), 0, "bfloat16"), of(tmp_path / "plain", "2")
    assert found.scorers == 5500 and found.peak == plain.weights + 5500
    assert found.least == 5500 > plain.least == 4000  # it is written before the root is
    assert "0.0 MB of models that score" in found.text("", None) and "score" not in plain.text("", None)


def test_a_model_that_scores_and_is_not_here_is_said_to_be_of_unknown_size(tmp_path: Path) -> None:
    found = of(tmp_path, "2", SCORED)
    assert found.scorers is None and "and models that score, of unknown size" in found.text("", None)
