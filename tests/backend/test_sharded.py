"""A model divided over ranks: no rank holds more than its part, and what is learned, written and refused is what one rank would."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from divided import SHARD, Seen, experts_model, learn, weights
from ranks import on_ranks
from tiny import as_model, opened, tiny_model
from updates import UNEVEN, update, write_rows

from selfkd.backend.machine import Machine, fixed_numerics, read_machine
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import GuardError, SelfkdError, UsageError

FILE_SIZE = 60_000  # bytes: the tiny model then fills several files
THRIFTY = {**UNEVEN, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}


def failing(name: str, *arguments: Any, **more: Any) -> str:
    try:
        update(*arguments, numerics=SHARD, **more)
    except SelfkdError as error:
        return f"{type(error).__name__}: {error}"
    return f"{name} did not fail"


def in_small_files(start: Model, out: Path) -> int:
    """Save a divided model in files of FILE_SIZE; return the most bytes of gathered tensors that this rank kept at a time."""
    from selfkd.backend.trainer import sharded
    from selfkd.backend.trainer.opened import LOADED

    kept, take = [0], sharded._Files.take

    def taking(self: Any, tensors: Any) -> None:
        there = [tensor for file in self.open.values() for tensor in file.values()]
        kept.append(sum(tensor.nbytes for tensor in [*there, *tensors.values()]))
        take(self, tensors)

    sharded._Files.take, before, sharded.SHARD_SIZE = taking, sharded.SHARD_SIZE, FILE_SIZE
    try:
        sharded.save(sharded.load(start.path, **LOADED), out)
    finally:
        sharded._Files.take, sharded.SHARD_SIZE = take, before
    return max(kept)


def work(rank: int, join: Callable[[], None], folder: Path) -> dict[str, Any]:
    """One of two ranks: every update that these tests look at."""
    import torch

    from selfkd.backend.trainer import sharded
    from selfkd.backend.trainer import update as module

    join()
    start, experts, rows = as_model(folder / "tiny"), as_model(folder / "experts"), [folder / "rows.parquet"]
    found: dict[str, Any] = {}
    for name, model, loss, more in (
        ("sft", start, "sft", {}),
        ("again", start, "sft", {}),
        ("dpo", start, "dpo", {}),
        ("thrifty", start, "sft", {"trl": THRIFTY}),
        ("bf16", start, "sft", {"precision": "bf16"}),
        ("experts", experts, "sft", {}),
    ):
        found[name] = learn(model, rows, folder / f"{name}-2", loss, **{"trl": UNEVEN, "numerics": SHARD, **more})
        torch.distributed.barrier()

    def nobody(path: str) -> Any:
        raise AssertionError(f"{path} was loaded whole")

    module.opened.load, apart = nobody, Model("policy", shutil.copytree(start.path, folder / f"apart-{rank}"), "another digest")
    spec = module.TrainSpec("dpo", 2**40 + 7, trl=UNEVEN)
    found["apart"] = module.train_rank(start, apart, rows, spec, folder / "apart", {"threads": 1, **SHARD})
    found["nothing"] = failing("nothing", start, rows, folder / "nothing", trl={"learning_rate": 0.0})
    found["infinite"] = failing("infinite", start, rows, folder / "infinite", trl={"learning_rate": 1e30})
    found["kept"] = in_small_files(start, folder / "small files")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    sharded.save_file = full
    found["full"] = failing("full", start, rows, folder / "full")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model(folder / "tiny")
    experts_model(folder / "experts")
    write_rows(folder, 9)
    return folder


@pytest.fixture(scope="module")
def group(folder: Path) -> list[dict[str, Any]]:
    return on_ranks(2, work, folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Seen]:
    """The same updates in this process, the model whole."""
    start, experts, rows = as_model(folder / "tiny"), as_model(folder / "experts"), [folder / "rows.parquet"]
    return {
        name: learn(model, rows, folder / f"{name}-alone", loss, **{"trl": UNEVEN, **more})
        for name, model, loss, more in (
            ("sft", start, "sft", {}),
            ("dpo", start, "dpo", {}),
            ("bf16", start, "sft", {"precision": "bf16"}),
            ("experts", experts, "sft", {}),
        )
    }


def must_agree(one: Seen, other: Seen, parent: Path, apart: float) -> None:
    """Losses and weights differ by rounding, the weights by less than a part `apart` of what the update moved."""
    import torch

    assert one.curve == pytest.approx(other.curve, rel=apart / 20) and len(one.curve) > 1
    for name in ("steps", "rows"):
        assert one.trained.metrics[name] == other.trained.metrics[name]
    for name in ("update_norm", "grad_norm_max"):
        assert one.trained.metrics[name] == pytest.approx(other.trained.metrics[name], rel=apart)
    ours, theirs, before = weights(one.trained.folder), weights(other.trained.folder), weights(parent)
    assert ours.keys() == theirs.keys() == before.keys()
    for name, tensor in theirs.items():
        moved = torch.linalg.vector_norm(tensor - before[name])
        assert torch.linalg.vector_norm(ours[name] - tensor) <= apart * moved, name


# What a rank holds


@pytest.mark.parametrize("name", ["sft", "dpo", "thrifty", "bf16", "experts"])
def test_each_rank_reads_and_holds_its_part_and_no_more(folder, group, name):
    """fp32 weights, gradients and the two moments of AdamW: 16 bytes of each weight."""
    model = weights(folder / ("experts" if name == "experts" else "tiny"))
    whole = sum(tensor.numel() for tensor in model.values())
    for found in group:
        assert found[name].kinds == {"DTensor"}
        assert 0.4 * 16 * whole < found[name].held < 0.6 * 16 * whole
        assert 0.4 * 4 * whole < found[name].read < 0.6 * 4 * whole
        assert found[name].trained.metrics["shard"] == 2
        assert found[name].trained.metrics["shard_held"] == pytest.approx(found[name].held / 16 / whole, abs=0.01)


def test_a_model_that_is_not_divided_after_all_is_refused(folder):
    import torch

    from selfkd.backend.trainer import sharded

    model = opened(folder / "tiny")
    with pytest.raises(GuardError, match=r"every rank holds all of model.embed_tokens.weight and of 19 more"):
        sharded.held(model, torch.optim.AdamW(model.parameters()))


def test_a_checkpoint_is_gathered_by_the_tensor_and_written_by_the_file(folder, group):
    """As many bytes as one file and the largest tensor, on rank 0 alone; the files are those of a model that is whole."""
    largest = max(tensor.nbytes for tensor in weights(folder / "tiny").values())
    assert [found["kept"] <= FILE_SIZE + largest for found in group] == [True, True]
    assert group[0]["kept"] > 0 == group[1]["kept"]
    opened(folder / "tiny").save_pretrained(folder / "as usual", max_shard_size=FILE_SIZE)
    usual, ours = folder / "as usual", folder / "small files"
    files = {path.name for path in usual.glob("*.safetensors")}
    assert len(files) > 3 and files == {path.name for path in ours.glob("*.safetensors")}
    assert all((usual / name).read_bytes() == (ours / name).read_bytes() for name in files)
    theirs, own = (json.loads((path / "model.safetensors.index.json").read_text()) for path in (usual, ours))
    assert own["weight_map"] == theirs["weight_map"]


# What is learned


@pytest.mark.parametrize("name", ["sft", "dpo", "experts"])
def test_two_ranks_with_half_of_a_model_each_learn_what_one_learns(folder, group, alone, name):
    must_agree(group[0][name], alone[name], folder / ("experts" if name == "experts" else "tiny"), 0.02)


def test_it_learns_the_same_step_by_step_with_little_memory(folder, group):
    """Activations computed again, gradients summed up over two micro-batches."""
    must_agree(group[0]["thrifty"], group[0]["sft"], folder / "tiny", 0.02)


def test_in_bf16_it_learns_what_a_whole_model_learns_and_is_proved_in_fp32(folder, group, alone):
    from selfkd.backend.probe import read_probe, token_logprobs

    divided, whole = group[0]["bf16"], alone["bf16"]
    assert divided.trained.metrics["precision"] == "bf16"
    assert divided.curve == pytest.approx(whole.curve, rel=0.01)
    assert divided.curve != pytest.approx(group[0]["sft"].curve, rel=1e-5)
    found = read_probe(divided.trained.folder)
    for path, recorded in ((folder / "tiny", found.before), (divided.trained.folder, found.child)):
        scored = [value for row in token_logprobs(opened(path), found.ids) for value in row]
        assert scored == pytest.approx(recorded.tolist(), abs=1e-4)


def test_the_same_update_on_the_same_ranks_gives_the_same_bits(group):
    digests = {digest.weights(found[name].trained.folder) for found in group for name in ("sft", "again")}
    assert len(digests) == 1


def test_the_child_has_the_files_of_its_parent(folder, group):
    for name, parent in (("sft", "tiny"), ("experts", "experts")):
        child = group[0][name].trained.folder
        assert {path.name for path in child.iterdir()} == {path.name for path in (folder / parent).iterdir()} | {"probe.json"}


def test_another_reference_is_divided_too_and_gives_what_an_equal_one_gives(group):
    """In `work`, loading a model whole fails."""
    apart, same = group[0]["apart"].metrics, group[0]["dpo"].trained.metrics
    for name in ("loss_first", "loss_last", "logps/chosen_last", "update_norm"):
        assert apart[name] == pytest.approx(same[name], rel=1e-6)


# What is refused


def test_every_rank_learns_of_a_failure_and_nothing_is_left(folder, group):
    for found in group:
        assert found["nothing"].startswith("GuardError: train  training changed no weight")
        assert found["infinite"].startswith("GuardError: train  at optimiser step 2")
        assert found["full"].startswith("StorageError: ") and "No space left on device" in found["full"]
    assert not any((folder / name).exists() for name in ("nothing", "infinite", "full"))


def test_one_rank_has_nothing_to_divide(folder, tmp_path):
    with pytest.raises(UsageError, match="divides a model over ranks, and there is one"):
        update(as_model(folder / "tiny"), [folder / "rows.parquet"], tmp_path / "out", numerics=SHARD)
    (tmp_path / "machine.yaml").write_text("shard: true\n")
    with pytest.raises(UsageError, match="Set `trainers` in the machine file to 2 or more"):
        fixed_numerics(read_machine(tmp_path / "machine.yaml"))
    numerics = [fixed_numerics(Machine(threads=1, dtype="float32", trainers=2, shard=shard)) for shard in (True, False)]
    assert [one["shard"] for one in numerics] == [True, False] and numerics[0]["digest"] != numerics[1]["digest"]


@pytest.mark.parametrize(
    ("names", "why"), [([], "transformers names none"), (["NoSuchLayer"], "transformers names NoSuchLayer")]
)
def test_a_model_whose_blocks_cannot_be_found_is_named(folder, names, why):
    from selfkd.backend.trainer import sharded

    model = opened(folder / "tiny")
    assert [type(block).__name__ for block in sharded.blocks(model)] == ["LlamaDecoderLayer"] * 2
    model._no_split_modules = names
    with pytest.raises(UsageError, match=rf"blocks of LlamaForCausalLM.*cannot be found\n.*{why}"):
        sharded.blocks(model)


def test_an_optimiser_that_looks_at_whole_weights_is_refused():
    from selfkd.backend.trainer import refused

    refused.optimiser({}, {}, True, 2)
    refused.optimiser({"optim": "adamw_torch"}, {}, True, 2)
    refused.optimiser({"optim": "adafactor"}, {}, False, 2)
    with pytest.raises(UsageError, match="adafactor does not know weights that are divided"):
        refused.optimiser({"optim": "adafactor"}, {}, True, 2)


# More ranks, every night


def several(rank: int, join: Callable[[], None], folder: Path, ranks: int) -> dict[str, Seen]:
    import torch

    join()
    found, start, rows = {}, as_model(folder / "tiny"), [folder / "rows.parquet"]
    for loss in ("sft", "dpo"):
        for shard in (False, True):
            out = folder / f"{loss}-{ranks}-{shard}"
            found[f"{loss}-{shard}"] = learn(start, rows, out, loss, trl=UNEVEN, numerics={"shard": shard})
            torch.distributed.barrier()
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_divided_or_not_learns_what_one_learns(folder, alone, ranks):
    everything = on_ranks(ranks, several, folder, ranks)
    whole = 16 * sum(tensor.numel() for tensor in weights(folder / "tiny").values())
    for loss in ("sft", "dpo"):
        for shard in (False, True):
            must_agree(everything[0][f"{loss}-{shard}"], alone[loss], folder / "tiny", 0.02)
        held = [found[f"{loss}-True"].held for found in everything]
        assert all(part < 1.2 * whole / ranks for part in held) and math.fsum(held) == pytest.approx(whole, rel=0.01)
