"""An update that is stopped goes on from its checkpoint: to the same bits on as many ranks, to the same curve on others."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks
from tiny import as_model, tiny_model
from updates import Enough, stopped_at, update, write_rows

from selfkd.backend.base import LoraSpec, Saves
from selfkd.backend.trainer import sealed
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import Stopped

# 9 rows in steps of 2, 2 epochs: 10 steps, cut in the middle of an epoch and of what AdamW adapts to.
CURVED = {
    **{"learning_rate": 2e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_train_epochs": 2},
    **{"lr_scheduler_type": "cosine", "warmup_steps": 2},
}
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_model(folder / "tiny")
    write_rows(folder, 9)
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> Model:
    return as_model(folder / "tiny")


def saves(folder: Path, minutes: float = 1e-9, key: str = "this update") -> Saves:
    """By default a checkpoint behind each step."""
    return Saves(folder, key, minutes)


def killed_at(step: int) -> Callable[[Any], None]:
    def at(progress: Any) -> None:
        if progress["step"] >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def doomed(start: Model, rows: list[Path], out: Path, loss: str, folder: Path, step: int) -> None:
    update(start, rows, out, loss, trl=CURVED, saves=saves(folder), on_progress=killed_at(step))


def kill(start: Model, folder: Path, loss: str, into: Path, step: int) -> None:
    """Make an update in a process of its own, which SIGKILL ends behind a step."""
    arguments = (start, [folder / "rows.parquet"], into.with_name("doomed"), loss, into, step)
    process = multiprocessing.get_context("spawn").Process(target=doomed, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_killed_in_the_middle_it_ends_on_the_same_bits(start, folder, tmp_path, loss):
    rows = [folder / "rows.parquet"]
    kill(start, folder, loss, tmp_path / "update", 7)  # the sixth is sealed, the seventh was made for nothing
    assert sealed.steps(tmp_path / "update")[0][0] == 6 and len(sealed.steps(tmp_path / "update")) == sealed.KEPT
    told: list[Any] = []
    went_on = update(start, rows, tmp_path / "b", loss, trl=CURVED, saves=saves(tmp_path / "update"), on_progress=told.append)
    whole = update(start, rows, tmp_path / "a", loss, trl=CURVED)
    assert digest.weights(went_on.folder) == digest.weights(whole.folder)
    assert [one["step"] for one in told] == [6, 7, 8, 9, 10]
    assert told[0]["said"] == "train continues at step 6 of 10, from its checkpoint"
    assert went_on.metrics["continued_at"] == [6] and "continued_at" not in whole.metrics
    for name in ("steps", "epochs", "tokens", "loss_first", "loss_last", "loss_mean", "grad_norm_max", "update_norm"):
        assert went_on.metrics[name] == whole.metrics[name], name


def test_an_adapter_that_was_learning_goes_on_to_the_same_bits_and_its_checkpoint_holds_nothing_of_the_weights_beneath(
    start, folder, tmp_path
):
    rows, lora = [folder / "rows.parquet"], LoraSpec(r=2, alpha=4.0)
    with suppress(Enough):
        update(start, rows, tmp_path / "x", trl=CURVED, lora=lora, saves=saves(tmp_path / "update"), on_progress=stopped_at(7))
    sizes = [path.stat().st_size for path in (tmp_path / "update").rglob("*.safetensors")]
    assert sizes and max(sizes) < next((folder / "tiny").glob("*.safetensors")).stat().st_size / 2
    went_on = update(start, rows, tmp_path / "b", trl=CURVED, lora=lora, saves=saves(tmp_path / "update"))
    whole = update(start, rows, tmp_path / "a", trl=CURVED, lora=lora)
    assert went_on.metrics["continued_at"] == [6]
    assert digest.weights(went_on.folder) == digest.weights(whole.folder)


def opened(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def apart(one: Path, other: Path, parent: Path) -> float:
    """How far two children lie apart, as a share of what the update moved."""
    import torch

    ours, theirs, before = opened(one), opened(other), opened(parent)
    away = sum(torch.linalg.vector_norm(ours[name] - theirs[name]).item() ** 2 for name in ours)
    moved = sum(torch.linalg.vector_norm(theirs[name] - before[name]).item() ** 2 for name in ours)
    return float((away / moved) ** 0.5)


def ranks_of(metrics: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in ranks.items() if name != "facts"} for ranks in metrics["made_by"]]


def together(rank: int, join: Callable[[], None], start: Model, folder: Path, place: Path) -> dict[bool, Any]:
    """One of two ranks: an update whole, one that every rank leaves at its seventh step, and its continuation; plain and divided."""
    import torch

    join()
    found = {}
    for shard in (False, True):
        own = place / str(shard)
        own.mkdir(exist_ok=True)
        torch.distributed.barrier()
        for name, more in (("whole", {}), ("begun", {"on_progress": stopped_at(7)}), ("went on", {})):
            if name != "whole":
                more["saves"] = saves(own / "update")
            with suppress(Enough):
                done = update(start, [folder / "rows.parquet"], own / name, trl=CURVED, numerics={"shard": shard}, **more)
            torch.distributed.barrier()
            if name == "begun" and rank == 0:
                shutil.copytree(own / "update", own / "kept")
            torch.distributed.barrier()
        found[shard] = done.metrics
    return found


@pytest.fixture(scope="module")
def pair(start: Model, folder: Path) -> tuple[Path, dict[bool, Any]]:
    place = folder / "pair"
    place.mkdir()
    return place, on_ranks(2, together, start, folder, place)[0]


@pytest.fixture(scope="module")
def alone(start: Model, folder: Path) -> Path:
    return update(start, [folder / "rows.parquet"], folder / "alone", trl=CURVED).folder


@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_go_on_to_the_same_bits_and_one_goes_on_with_what_two_began(start, folder, alone, pair, tmp_path, shard):
    place, metrics = pair[0] / str(shard), pair[1][shard]
    step, newest = sealed.steps(place / "kept")[0]
    assert step == 6
    assert {path.name[:6] for path in newest.glob("part-*")} == ({"part-0", "part-1"} if shard else {"part-0"})
    sizes = [sum(path.stat().st_size for path in newest.glob(f"part-{rank}-*")) for rank in range(2)]
    assert not shard or max(sizes) < 0.6 * sum(sizes)  # each wrote its own
    assert (newest / "random-1.json").exists()
    assert digest.weights(place / "went on") == digest.weights(place / "whole")
    assert metrics["continued_at"] == [6] and ranks_of(metrics) == [{"trainers": 2, "shard": shard}]
    one = update(start, [folder / "rows.parquet"], tmp_path / "out", trl=CURVED, saves=saves(place / "kept"))
    assert ranks_of(one.metrics) == [{"trainers": 2, "shard": shard}, {"trainers": 1, "shard": False}]
    assert one.metrics["continued_at"] == [6] and one.metrics["steps"] == STEPS
    assert apart(one.folder, alone, Path(start.path)) < 1e-3  # by rounding
    assert apart(one.folder, place / "whole", Path(start.path)) < 1e-3


@pytest.mark.nightly
def test_four_ranks_go_on_as_two_and_as_one(start, folder, alone, tmp_path):
    """Steps of two rows cannot be shared by four, so they are of four here."""
    wider = {**CURVED, "per_device_train_batch_size": 4, "num_train_epochs": 4}
    rows = [folder / "rows.parquet"]
    on_ranks(4, wider_together, start, folder, tmp_path / "begun", wider, 7)
    whole = update(start, rows, tmp_path / "whole", trl=wider).folder
    for ranks in (2, 1):
        shutil.copytree(tmp_path / "update", tmp_path / str(ranks) / "update")
        out = tmp_path / str(ranks) / "out"
        if ranks == 1:
            update(start, rows, out, trl=wider, saves=saves(out.with_name("update")))
        else:
            on_ranks(ranks, wider_together, start, folder, out, wider, 0)
        assert apart(out, whole, Path(start.path)) < 1e-3


def wider_together(rank: int, join: Callable[[], None], start: Model, folder: Path, out: Path, trl: Any, stop: int) -> Any:
    join()
    more: dict[str, Any] = {"on_progress": stopped_at(stop)} if stop else {}
    try:
        options = {"trl": trl, "numerics": {"shard": True}, "saves": saves(out.with_name("update")), **more}
        return update(start, [folder / "rows.parquet"], out, **options).metrics
    except Enough:
        return None


def several_together(rank: int, join: Callable[[], None], start: Model, folder: Path, place: Path, loss: str) -> Any:
    """One of several ranks: an update whole, one that every rank leaves at its fifth step, and its continuation."""
    import torch

    join()
    trl = {**CURVED, "per_device_train_batch_size": 4, "num_train_epochs": 4}
    for name, more in (("whole", {}), ("begun", {"on_progress": stopped_at(5)}), ("went on", {})):
        kept = {} if name == "whole" else {"saves": saves(place / "update")}
        with suppress(Enough):
            done = update(start, [folder / "rows.parquet"], place / name, loss, trl=trl, **kept, **more)
        torch.distributed.barrier()
    return done.metrics


@pytest.mark.nightly
@pytest.mark.parametrize(("ranks", "loss"), [(3, "sft"), (4, "sft"), (3, "dpo")])
def test_three_and_more_ranks_go_on_to_the_same_bits_though_they_lay_out_anew_what_they_exchange(
    start, folder, tmp_path, ranks, loss
):
    metrics = on_ranks(ranks, several_together, start, folder, tmp_path, loss)[0]
    assert metrics["continued_at"] == [4]
    assert digest.weights(tmp_path / "went on") == digest.weights(tmp_path / "whole")


def test_what_the_first_ranks_computed_with_is_told_where_others_go_on(start, folder, tmp_path, monkeypatch):
    from selfkd.backend.facts import of_trainer
    from selfkd.backend.trainer import update as module

    elsewhere = {"cpu": "another", "instructions": ["avx2"], "torch": "2.0.0"}
    monkeypatch.setattr(module, "of_trainer", lambda: elsewhere)
    begun(start, folder, tmp_path / "update")
    monkeypatch.undo()
    told: list[Any] = []
    rows, kept = [folder / "rows.parquet"], saves(tmp_path / "update")
    done = update(start, rows, tmp_path / "out", trl=CURVED, saves=kept, on_progress=told.append)
    first, second = ([digest.of(facts)] for facts in (elsewhere, of_trainer()))
    assert [ranks["facts"] for ranks in done.metrics["made_by"]] == [first, second]
    assert told[0]["computers"] == [["trainer-0", elsewhere]] and "computers" not in told[1]
    words = json.loads((sealed.steps(tmp_path / "update")[0][1] / "words.json").read_text())
    assert words["computers"] == [["trainer-0", elsewhere], ["trainer-0", digest.as_json(of_trainer())]]


# What does not count


def begun(start: Model, folder: Path, into: Path) -> None:
    with pytest.raises(Enough):
        update(
            start,
            [folder / "rows.parquet"],
            into.with_name("begun"),
            trl=CURVED,
            saves=saves(into),
            on_progress=stopped_at(5),
        )


def harm(newest: Path, how: str) -> None:
    part = next(newest.glob("part-*"))
    if how == "flipped":
        content = bytearray(part.read_bytes())
        content[-1] ^= 1
        part.write_bytes(content)
    elif how == "unsealed":
        (newest / sealed.SEAL).unlink()
    elif how == "missing":
        (newest / "random-0.json").unlink()
    else:
        seal = json.loads((newest / sealed.SEAL).read_text())
        (newest / sealed.SEAL).write_text(json.dumps({**seal, "step": 9}))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("flipped", "was changed after it was committed"),
        ("unsealed", "its seal is missing, or damaged"),
        ("missing", "random-0.json is missing"),
        ("resealed", "its seal was changed after it was written"),
    ],
)
def test_a_checkpoint_that_is_damaged_or_unsealed_is_ignored_and_the_one_before_it_is_taken(
    start, folder, alone, tmp_path, how, why
):
    begun(start, folder, tmp_path / "update")
    assert [step for step, _ in sealed.steps(tmp_path / "update")] == [4, 3]
    harm(tmp_path / "update" / "step-000004", how)
    told: list[Any] = []
    done = update(
        start,
        [folder / "rows.parquet"],
        tmp_path / "out",
        trl=CURVED,
        saves=saves(tmp_path / "update"),
        on_progress=told.append,
    )
    assert told[0]["warning"].startswith("train: the checkpoint at step 4 was ignored: ") and why in told[0]["warning"]
    assert told[1]["said"] == "train continues at step 3 of 10, from its checkpoint"
    assert digest.weights(done.folder) == digest.weights(alone)


def test_a_checkpoint_of_another_update_is_not_used(start, folder, alone, tmp_path):
    begun(start, folder, tmp_path / "update")
    found = sealed.newest(tmp_path / "update", "another one")
    assert found.folder is None and found.ignored[0] == "the checkpoint at step 4 was ignored: it is of another update"
    other = saves(tmp_path / "update", minutes=0, key="another one")
    done = update(start, [folder / "rows.parquet"], tmp_path / "out", trl=CURVED, saves=other)
    assert "continued_at" not in done.metrics and digest.weights(done.folder) == digest.weights(alone)


def test_a_short_update_makes_no_checkpoint_and_a_full_disk_stops_none(start, folder, alone, tmp_path, monkeypatch):
    from selfkd.backend.trainer import resume

    rows, told = [folder / "rows.parquet"], []
    update(start, rows, tmp_path / "short", trl=CURVED, saves=saves(tmp_path / "update", minutes=10))
    assert not (tmp_path / "update").exists()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "write", full)
    done = update(start, rows, tmp_path / "full", trl=CURVED, saves=saves(tmp_path / "update"), on_progress=told.append)
    assert digest.weights(done.folder) == digest.weights(alone)
    said = [one["warning"] for one in told if "warning" in one]
    assert len(said) == 1 and "no checkpoint could be written at step 1: [Errno 28] No space left on device" in said[0]


def test_a_checkpoint_that_could_not_be_written_whole_leaves_nothing_on_a_disk_that_is_full(
    start, folder, tmp_path, monkeypatch
):
    from selfkd.backend.trainer import resume

    def full(draft: Path, *_: Any) -> None:
        (draft / "part-0-000.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "write", full)
    update(start, [folder / "rows.parquet"], tmp_path / "full", trl=CURVED, saves=saves(tmp_path / "update"))
    assert list((tmp_path / "update").iterdir()) == []


def test_a_checkpoint_is_kept_where_newer_ones_lie_that_do_not_count(tmp_path):
    update_of = tmp_path / "update"
    for step in (8, 9):
        (update_of / f"step-{step:06d}").mkdir(parents=True)  # without a seal, as a kill leaves one
    draft = sealed.fresh_draft(update_of)
    (draft / "part-0-000.safetensors").write_bytes(b"tensors")
    made = sealed.seal(draft, update_of, "this update", 5, sealed.entries([draft / "part-0-000.safetensors"]))
    assert [path for _, path in sealed.steps(update_of)] == [made]
    assert sealed.newest(update_of, "this update") == (made, ())


def test_an_optimiser_that_cannot_be_copied_as_it_is_makes_none_and_says_so(start, folder, tmp_path):
    import torch

    from selfkd.backend.trainer import resume

    model = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimiser.step()
    assert {key for _, key, _ in resume.states(model, optimiser)} == {"step", "exp_avg", "exp_avg_sq"}
    optimiser.state[model.weight]["exp_avg"] = optimiser.state[model.weight]["exp_avg"].to(torch.uint8)
    with pytest.raises(resume.Unsaveable, match="the optimiser AdamW keeps exp_avg in a form of its own"):
        list(resume.states(model, optimiser))


def test_asked_to_stop_it_seals_the_step_that_it_is_at(start, folder, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "WORTH_SECONDS", 0.0)
    rows, kept = [folder / "rows.parquet"], saves(tmp_path / "update", minutes=10)
    kept.folder.mkdir()

    def ask(progress: Any) -> None:
        if progress["step"] == 5:
            (kept.folder / sealed.STOP).touch()

    with pytest.raises(Stopped):
        update(start, rows, tmp_path / "stopped", trl=CURVED, saves=kept, on_progress=ask)
    assert [step for step, _ in sealed.steps(kept.folder)] == [5] and not (tmp_path / "stopped").exists()
    (kept.folder / sealed.STOP).unlink()
    done = update(start, rows, tmp_path / "out", trl=CURVED, saves=kept)
    assert done.metrics["continued_at"] == [5] and digest.weights(done.folder) == digest.weights(alone)
