"""An optimiser that lives on: two updates with its state are one long update, and a state of something else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from tiny import as_model, tiny_model
from updates import update, write_rows

from selfkd.backend.base import LoraSpec, OptimiserState, Saves, Trained
from selfkd.backend.trainer import batches
from selfkd.core import digest
from selfkd.core.pool import Model, shape
from selfkd.errors import UsageError

# Micro-batches of one row: larger ones are cut by the mean length of all rows, and two sets have two.
STEADY = {"learning_rate": 2e-3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    tiny_model(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> Model:
    return as_model(folder / "tiny")


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are taken as their ids are sorted, so that two sets behind each other are taken as one of both."""
    order = lambda rows, size, seed, epoch: [list(range(len(rows)))[at : at + size] for at in range(0, len(rows), size)]  # noqa: E731
    monkeypatch.setattr(batches, "plan", order)


def rows_in(folder: Path, first: int, count: int) -> list[Path]:
    import polars as pl

    folder.mkdir(parents=True, exist_ok=True)
    [path] = write_rows(folder, first + count)
    shape("rows", pl.read_parquet(path).sort("id")[first:]).write_parquet(path)
    return [path]


def left(trained: Trained) -> OptimiserState:
    assert trained.state is not None
    return OptimiserState(trained.state, "")


def child(trained: Trained) -> Model:
    return as_model(trained.folder)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_two_updates_with_one_optimiser_are_one_over_both_sets_of_rows_and_without_it_they_are_not(
    start, in_order, tmp_path, loss
):
    """DPO's reference moves with the start, so there the second set is held against no reference on both sides."""
    first, second, both = (rows_in(tmp_path / f"{at}-{n}", at, n) for at, n in ((0, 6), (6, 4), (0, 10)))
    keep: dict[str, Any] = {"trl": STEADY, "keeps_state": True}
    if loss == "dpo":
        from selfkd.backend.base import TrainSpec
        from selfkd.backend.trainer.update import train_rank

        def made(begin: Model, rows: list[Path], out: Path, **more: Any) -> Trained:
            return train_rank(begin, None, rows, TrainSpec("dpo", 5, **more), out, {"threads": 1})
    else:
        made = update  # type: ignore[assignment]
    one = made(start, first, tmp_path / "one", **keep)
    two = made(child(one), second, tmp_path / "two", state=left(one), **keep)
    anew = made(child(one), second, tmp_path / "anew", trl=STEADY)
    whole = made(start, both, tmp_path / "whole", **keep)
    assert (one.metrics["steps"], two.metrics["steps"], whole.metrics["steps"]) == (3, 2, 5)
    assert digest.weights(two.folder) == digest.weights(whole.folder)
    assert digest.weights(anew.folder) != digest.weights(whole.folder)
    assert contents(two) == contents(whole)  # the moments too, and the place in the schedule
    assert anew.state is None and not (tmp_path / "anew-state").exists()


def contents(trained: Trained) -> dict[str, bytes]:
    assert trained.state
    return {path.name: path.read_bytes() for path in sorted(trained.state.iterdir())}


def test_the_moments_are_those_of_adamw_by_hand(start, tmp_path):
    """After one step from nothing they are (1 - beta) g and (1 - beta²) g², and the second step of a continued one corrects for two."""
    from safetensors.torch import load_file

    one = update(start, rows_in(tmp_path, 0, 2), tmp_path / "one", trl=STEADY, keeps_state=True)
    [path] = sorted((tmp_path / "one-state").glob("part-*"))
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    mean, square = tensors[f"optimiser/{name}/exp_avg@0"], tensors[f"optimiser/{name}/exp_avg_sq@0"]
    gradient = mean / 0.1
    assert (gradient**2 * 0.001 - square).abs().max() < 1e-6 * square.abs().max()
    assert float(tensors[f"optimiser/{name}/step@0"]) == 1.0
    before, after = (load_file(next(Path(at).glob("*.safetensors")))[name] for at in (start.path, one.folder))
    moved = -STEADY["learning_rate"] * gradient / (gradient.abs() + 1e-8)
    assert (after - before - moved).abs().max() < 1e-6


@pytest.mark.parametrize(("schedule", "goes_on"), [("constant_with_warmup", True), ("inverse_sqrt", True), ("cosine", False)])
def test_a_schedule_without_an_end_goes_on_at_its_place_and_one_that_ends_begins_anew(start, tmp_path, schedule, goes_on):
    options = {**STEADY, "lr_scheduler_type": schedule, "warmup_steps": 4}
    rows = rows_in(tmp_path, 0, 6)
    one = update(start, rows, tmp_path / "one", trl=options, keeps_state=True)
    two = update(child(one), rows, tmp_path / "two", trl=options, keeps_state=True, state=left(one))
    place = json.loads((tmp_path / "two-state" / "words.json").read_text())
    assert two.metrics["steps"] == 3
    assert place["scheduler"]["last_epoch"] == (6 if goes_on else 3)
    rates = {"constant_with_warmup": 1.0, "inverse_sqrt": (4 / 6) ** 0.5, "cosine": 3 / 4}
    assert place["groups"][0]["lr"] == pytest.approx(2e-3 * rates[schedule])


def test_the_learning_rate_is_that_of_today(start, tmp_path):
    rows = rows_in(tmp_path, 0, 2)
    one = update(start, rows, tmp_path / "one", trl=STEADY, keeps_state=True)
    slow = {**STEADY, "learning_rate": 1e-4}
    update(child(one), rows, tmp_path / "two", trl=slow, keeps_state=True, state=left(one))
    place = json.loads((tmp_path / "two-state" / "words.json").read_text())
    assert place["groups"][0]["lr"] == 1e-4


def test_an_adapter_goes_on_with_its_own_state_alone(start, tmp_path):
    rows, lora = rows_in(tmp_path, 0, 2), LoraSpec(r=2, alpha=4.0, goes_on=True)
    keep: dict[str, Any] = {"trl": STEADY, "keeps_state": True, "lora": lora}
    one = update(start, rows, tmp_path / "one", **keep)
    whole = update(start, rows, tmp_path / "whole", **{**keep, "trl": {**STEADY, "num_train_epochs": 2}})
    [path] = (tmp_path / "one-state").glob("part-*")
    assert path.stat().st_size < next(Path(start.path).glob("*.safetensors")).stat().st_size / 2
    begun = Model("policy", str(one.folder), digest.weights(one.folder), "adapter", start.path)
    two = update(begun, rows, tmp_path / "two", **keep, state=left(one))
    assert digest.weights(two.folder) == digest.weights(whole.folder)
    with pytest.raises(UsageError, match=r"of other parameters than learn here, such as .*lora_A"):
        update(start, rows, tmp_path / "full", trl=STEADY, state=left(one))


def test_a_state_of_another_optimiser_is_refused_in_words(start, tmp_path):
    rows = rows_in(tmp_path, 0, 2)
    one = update(start, rows, tmp_path / "one", trl=STEADY, keeps_state=True)
    with pytest.raises(UsageError, match="is of the optimiser AdamW, and this step trains with SGD"):
        update(child(one), rows, tmp_path / "two", trl={**STEADY, "optim": "sgd"}, state=left(one))
    assert not (tmp_path / "two").exists()


def test_an_optimiser_that_cannot_be_kept_is_refused_behind_its_first_step(start, tmp_path, monkeypatch):
    from selfkd.backend.trainer import optimiser_state, resume

    def of_its_own(*_: Any) -> Any:
        raise resume.Unsaveable("the optimiser AdamW keeps exp_avg in a form of its own")
        yield

    monkeypatch.setattr(optimiser_state, "states", of_its_own)
    told: list[Any] = []
    with pytest.raises(UsageError, match="in a form of its own, so its state cannot be kept"):
        update(start, rows_in(tmp_path, 0, 6), tmp_path / "one", trl=STEADY, keeps_state=True, on_progress=told.append)
    assert told == [] and not list(tmp_path.glob("one*"))


def test_an_update_that_was_stopped_and_goes_on_leaves_the_same_state(start, tmp_path):
    rows = rows_in(tmp_path, 0, 8)
    one = update(start, rows, tmp_path / "one", trl=STEADY, keeps_state=True)
    more: dict[str, Any] = {"trl": STEADY, "keeps_state": True, "state": left(one)}
    whole = update(child(one), rows, tmp_path / "whole", **more)
    more["saves"] = Saves(tmp_path / "update", "this one", 1e-9)

    def enough(progress: Any) -> None:
        if progress["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update(child(one), rows, tmp_path / "begun", **more, on_progress=enough)
    assert not list(tmp_path.glob("begun*"))
    went_on = update(child(one), rows, tmp_path / "went-on", **more)
    assert went_on.metrics["continued_at"] == [2]
    assert digest.weights(went_on.folder) == digest.weights(whole.folder) and contents(went_on) == contents(whole)


def apart(one: Path, other: Path, parent: Path) -> float:
    """How far two children lie apart, as a share of what the update moved."""
    ours, theirs, before = opened(one), opened(other), opened(parent)
    away = sum(float((ours[name] - theirs[name]).norm()) ** 2 for name in ours)
    moved = sum(float((theirs[name] - before[name]).norm()) ** 2 for name in ours)
    return (away / moved) ** 0.5


def opened(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def together(rank: int, join: Callable[[], None], start: Model, rows: list[Path], place: Path) -> None:
    """One of two ranks that hold the model divided: two updates, the second with the state that the first one left."""
    join()
    more: dict[str, Any] = {"trl": STEADY, "keeps_state": True, "numerics": {"shard": True}}
    update(start, rows, place / "one", **more)
    begun = as_model(place / "one")
    update(begun, rows, place / "two", **more, state=OptimiserState(place / "one-state", ""))


def test_what_two_ranks_left_divided_one_goes_on_with_whole(start, tmp_path):
    rows = rows_in(tmp_path, 0, 6)
    on_ranks(2, together, start, rows, tmp_path)
    assert {path.name[:6] for path in (tmp_path / "one-state").glob("part-*")} == {"part-0", "part-1"}
    alone = update(
        as_model(tmp_path / "one"), rows, tmp_path / "alone", trl=STEADY, state=OptimiserState(tmp_path / "one-state", "")
    )
    anew = update(as_model(tmp_path / "one"), rows, tmp_path / "anew", trl=STEADY)
    assert apart(alone.folder, tmp_path / "two", tmp_path / "one") < 1e-3  # by rounding
    assert apart(anew.folder, tmp_path / "two", tmp_path / "one") > 0.1
