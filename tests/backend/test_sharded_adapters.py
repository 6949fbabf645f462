"""An adapter on a model that is divided over ranks: what lies still is divided too, and what is learned is what one rank learns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from architectures import architecture
from divided import SHARD, Seen, experts_model, learn, weights
from ranks import on_ranks
from safetensors.torch import load_file
from tiny import as_model, opened, tiny_model
from updates import UNEVEN, Enough, stopped_at, update, write_rows

from selfkd.backend import adapters
from selfkd.backend.adapters import Weights
from selfkd.backend.base import LoraSpec, OptimiserState, Saves, Trained
from selfkd.backend.trainer import sealed
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import SelfkdError

R4, ON = LoraSpec(4, 8.0), LoraSpec(4, 8.0, goes_on=True)
THRIFTY = {**UNEVEN, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
BF16 = {"precision": "bf16", "numerics": {"dtype": "bfloat16"}}
ATTENTION = LoraSpec(4, 8.0, targets=("q_proj", "o_proj"))
# of the tiny model: the products of its two blocks, and the two matrices of rank 4 beside each of them
LINEAR = 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128)
LEARNED = 4 * 2 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 128))
# {name: start, loss and words of an update}; each is made by one rank, and by two that divide the model
UPDATES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("tiny", "sft", {}),
    "dpo": ("tiny", "dpo", {}),
    "bf16": ("tiny", "sft", BF16),
    "thrifty": ("tiny", "dpo", {"trl": THRIFTY}),
    "rank 1": ("tiny", "sft", {"lora": LoraSpec(1, 2.0, targets=("layers.1.self_attn.q_proj",))}),
    "experts": ("experts", "sft", {"lora": ATTENTION}),
    "norms behind": ("gemma2", "sft", {"trl": THRIFTY}),
    "transposed": ("gpt2", "sft", {}),
    "over another": ("first", "sft", {}),
    "going on": ("first", "dpo", {"lora": ON, "reference": "tiny"}),
    "all weights": ("first", "sft", {"lora": None}),
}


def started(folder: Path, name: str) -> Model:
    """A model of these tests; `first` is an adapter of the tiny one."""
    if name != "first":
        return as_model(folder / name)
    return Model("policy", str(folder / name), digest.weights(folder / name), "adapter", str(folder / "tiny"))


def made(folder: Path, name: str, out: Path, **more: Any) -> Seen:
    begin, loss, words = UPDATES[name]
    options = {"lora": R4, "trl": UNEVEN, **words, **more}
    options["numerics"] = {**words.get("numerics", {}), **more.get("numerics", {})}
    if reference := options.pop("reference", None):
        options["reference"] = started(folder, reference)
    return learn(started(folder, begin), [folder / "rows.parquet"], out, loss, **options)


def work(rank: int, join: Callable[[], None], folder: Path) -> dict[str, Any]:
    """One of two ranks: every update that these tests look at."""
    import torch

    from selfkd.backend.trainer import update as module

    join()

    def nobody(path: str, *_: Any) -> Any:
        raise AssertionError(f"{path} was loaded whole")

    module._load = nobody
    found: dict[str, Any] = {}
    for name in UPDATES:
        found[name] = made(folder, name, folder / f"{name}-2", numerics=SHARD)
        torch.distributed.barrier()
    try:
        made(folder, "experts", folder / "none", lora=LoraSpec(4, 8.0, targets=("experts",)), numerics=SHARD)
    except SelfkdError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded-adapters")
    tiny_model(folder / "tiny")
    experts_model(folder / "experts")
    architecture("gemma2", folder / "gemma2")
    architecture("gpt2", folder / "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # ranks draw apart
    write_rows(folder, 9)
    update(as_model(folder / "tiny"), [folder / "rows.parquet"], folder / "first", lora=R4, trl=UNEVEN)
    return folder


@pytest.fixture(scope="module")
def group(folder: Path) -> list[dict[str, Any]]:
    return on_ranks(2, work, folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Seen]:
    """The same updates in this process, the model whole."""
    return {name: made(folder, name, folder / f"{name}-alone") for name in UPDATES}


def merged(folder: Path, base: Path) -> dict[str, Any]:
    return dict(Weights(folder, base))


def apart(one: Path, other: Path, parent: Mapping[str, Any], base: Path) -> float:
    """How far two children lie apart, as a share of what the update moved."""
    ours, theirs = merged(one, base), merged(other, base)
    away = sum((ours[name] - theirs[name]).square().sum().item() for name in theirs)
    moved = sum((theirs[name] - parent[name]).square().sum().item() for name in theirs)
    return float((away / moved) ** 0.5)


# ---- what a rank holds ----


@pytest.mark.parametrize("name", ["sft", "dpo", "thrifty", "bf16", "all weights"])
def test_each_rank_reads_and_holds_its_part_of_what_lies_still_and_of_what_learns(folder, group, name):
    """fp32: 4 bytes of each weight; bf16: 2 of each weight of a product. 16 of each number that learns."""
    whole = sum(tensor.numel() for tensor in weights(folder / "tiny").values())
    read = 2 * LINEAR + 4 * (whole - LINEAR) if name == "bf16" else 4 * whole
    everything = 16 * whole if name == "all weights" else read + 16 * LEARNED
    for found in group:
        assert found[name].kinds == {"DTensor"}
        assert 0.4 * read < found[name].read < 0.6 * read
        assert 0.4 * everything < found[name].held < 0.6 * everything
        assert found[name].trained.metrics["shard"] == 2
        assert found[name].trained.metrics["shard_held"] == pytest.approx(found[name].held / everything, abs=0.01)
    assert sum(found[name].held for found in group) == pytest.approx(everything, rel=0.01)


# ---- what is learned ----


@pytest.mark.parametrize("name", [name for name in UPDATES if name != "bf16"])
def test_two_ranks_that_divide_the_model_learn_what_one_learns(folder, group, alone, name):
    ours, theirs, start = group[0][name], alone[name], started(folder, UPDATES[name][0])
    assert ours.curve == pytest.approx(theirs.curve, rel=1e-3) and len(ours.curve) > 1
    assert ours.trained.metrics["steps"] == theirs.trained.metrics["steps"]
    for figure in ("update_norm", "grad_norm_max"):
        assert ours.trained.metrics[figure] == pytest.approx(theirs.trained.metrics[figure], rel=0.02)
    base = Path(start.base or start.path)
    assert apart(ours.trained.folder, theirs.trained.folder, merged(Path(start.path), base), base) < 0.02


@pytest.mark.parametrize("name", [name for name in UPDATES if name != "all weights"])
def test_an_adapter_is_committed_with_the_files_and_words_that_one_rank_commits(folder, group, alone, name):
    ours, theirs = group[0][name].trained, alone[name].trained
    assert {path.name for path in ours.folder.iterdir()} == {path.name for path in theirs.folder.iterdir()}
    for file in (adapters.WORDS, digest.ADAPTER, "config.json"):
        assert json.loads((ours.folder / file).read_text()) == json.loads((theirs.folder / file).read_text())
    left, right = (load_file(one.folder / adapters.TENSORS) for one in (ours, theirs))
    assert {key: (one.shape, one.dtype) for key, one in left.items()} == {
        key: (one.shape, one.dtype) for key, one in right.items()
    }
    ours_lora, theirs_lora = ours.metrics["lora"], theirs.metrics["lora"]
    assert ours_lora["survived"] == pytest.approx(theirs_lora["survived"], abs=0.01)
    assert {**ours_lora, "survived": 0} == {**theirs_lora, "survived": 0}


def test_in_bf16_it_learns_what_a_whole_model_learns_and_is_proved_in_fp32(folder, group, alone):
    import torch

    from selfkd.backend.probe import read_probe, token_logprobs

    divided, whole = group[0]["bf16"], alone["bf16"]
    assert divided.curve == pytest.approx(whole.curve, rel=0.01)
    assert divided.curve != pytest.approx(group[0]["sft"].curve, rel=1e-5)
    found, net = read_probe(divided.trained.folder), opened(folder / "tiny")
    for part in net.modules():  # as the base lies there
        if isinstance(part, torch.nn.Linear) and part.weight is not net.get_input_embeddings().weight:
            part.weight.data = part.weight.data.bfloat16().float()
    scored = [value for row in token_logprobs(net, found.ids) for value in row]
    assert scored == pytest.approx(found.before.tolist(), abs=1e-4)
    adapter = adapters.read(divided.trained.folder)
    for name in adapter.modules:
        net.get_submodule(name).weight.data += adapter.change(name)
    scored = [value for row in token_logprobs(net, found.ids) for value in row]
    assert scored == pytest.approx(found.child.tolist(), abs=1e-4)


def test_the_reference_without_the_adapter_is_the_one_that_it_lies_on(folder, group, alone):
    """The start has an adapter already, so its answers are likelier than the reference's before the first step."""
    first = group[0]["going on"].trained.metrics["rewards/margins_first"]
    assert abs(first) > 1e-3 and first == pytest.approx(alone["going on"].trained.metrics["rewards/margins_first"], rel=1e-3)


def test_experts_get_no_adapter_and_say_so_on_a_divided_model_too(folder, group):
    for found in group:
        assert "no linear layer of Qwen3MoeForCausalLM is called 'experts'" in found["refused"]
        assert "Experts of a mixture lie in one tensor" in found["refused"]
    assert not (folder / "none").exists()


# ---- an update in pieces ----

CURVED = {
    **{"learning_rate": 2e-3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "num_train_epochs": 2},
    **{"lr_scheduler_type": "cosine", "warmup_steps": 2},
}  # 9 rows in steps of 4, 2 epochs: 6 steps


def saves(folder: Path, minutes: float = 1e-9) -> Saves:
    return Saves(folder, "this update", minutes)


def in_pieces(rank: int, join: Callable[[], None], folder: Path, place: Path, loss: str) -> dict[str, Any]:
    """One of several ranks: an update whole; one that all leave at its fourth step, and its continuation; one in segments; and a second
    one with the optimiser of the first."""
    import torch

    join()
    start, rows, keep = as_model(folder / "tiny"), [folder / "rows.parquet"], {"lora": R4, "trl": CURVED, "numerics": SHARD}

    def make(name: str, begin: Model = start, **more: Any) -> Trained | None:
        done = None
        with suppress(Enough):
            done = update(begin, rows, place / name, loss, **keep, **more)
        torch.distributed.barrier()
        return done

    found = {"whole": make("whole", keeps_state=True)}
    make("begun", saves=saves(place / "update"), on_progress=stopped_at(4))
    if rank == 0:
        shutil.copytree(place / "update", place / "kept")
    torch.distributed.barrier()
    found["went on"] = make("went on", saves=saves(place / "update"))
    for until in (2, 4, 20):
        make(f"until-{until}", saves=saves(place / "segments", 1e9), until=until)
    begun = Model("policy", str(place / "whole"), digest.weights(place / "whole"), "adapter", start.path)
    keep["lora"], state = ON, OptimiserState(place / "whole-state", "")
    make("second", begun, state=state)
    make("anew", begun)
    return found


@pytest.fixture(scope="module")
def pieces(folder: Path) -> tuple[Path, dict[str, Any]]:
    place = folder / "pieces"
    place.mkdir()
    return place, on_ranks(2, in_pieces, folder, place, "sft")[0]


def test_two_ranks_go_on_from_a_checkpoint_to_the_same_bits_and_it_holds_what_learns_alone(folder, pieces):
    place, found = pieces
    step, newest = sealed.steps(place / "kept")[0]
    assert step == 3 and {path.name[:6] for path in newest.glob("part-*")} == {"part-0", "part-1"}
    parts = [load_file(next(newest.glob(f"part-{rank}-*"))) for rank in range(2)]
    assert all("lora_" in name for part in parts for name in part)
    numbers = [sum(tensor.numel() for tensor in part.values()) for part in parts]
    assert sum(numbers) == 3 * LEARNED + 28 and max(numbers) < 0.6 * sum(
        numbers
    )  # AdamW's two moments, and a count of each tensor
    assert found["went on"].metrics["continued_at"] == [3]
    assert digest.weights(place / "went on") == digest.weights(place / "whole")


def test_segments_end_on_the_bits_of_one_piece(pieces):
    place, _ = pieces
    assert digest.weights(place / "until-20") == digest.weights(place / "whole")
    assert len({digest.weights(place / f"until-{until}") for until in (2, 4, 20)}) == 3


def test_what_two_ranks_began_divided_one_goes_on_with_whole(folder, pieces, tmp_path):
    place, _ = pieces
    start, rows = as_model(folder / "tiny"), [folder / "rows.parquet"]
    shutil.copytree(place / "kept", tmp_path / "update")
    one = update(start, rows, tmp_path / "one", lora=R4, trl=CURVED, saves=saves(tmp_path / "update"))
    base = folder / "tiny"
    assert one.metrics["continued_at"] == [3]
    assert apart(one.folder, place / "whole", weights(base), base) < 1e-3
    state = OptimiserState(place / "whole-state", "")
    begun = Model("policy", str(place / "whole"), digest.weights(place / "whole"), "adapter", start.path)
    second = update(begun, rows, tmp_path / "second", lora=ON, trl=CURVED, state=state)
    before = merged(place / "whole", base)
    assert apart(second.folder, place / "second", before, base) < 1e-3
    assert apart(place / "anew", place / "second", before, base) > 0.05  # the moments of the first one are felt


# ---- more ranks, every night ----


@pytest.mark.nightly
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_four_ranks_learn_what_one_learns_and_two_and_one_go_on_with_what_they_began(folder, tmp_path, loss):
    start, rows, base = as_model(folder / "tiny"), [folder / "rows.parquet"], folder / "tiny"
    found = on_ranks(4, in_pieces, folder, tmp_path, loss)
    assert found[0]["went on"].metrics["continued_at"] == [3]
    for name in ("went on", "until-20"):
        assert digest.weights(tmp_path / name) == digest.weights(tmp_path / "whole")
    whole = update(start, rows, tmp_path / "alone", loss, lora=R4, trl=CURVED).folder
    assert apart(tmp_path / "whole", whole, weights(base), base) < 1e-3
    for ranks in (1, 2):
        shutil.copytree(tmp_path / "kept", tmp_path / str(ranks) / "update")
        out = tmp_path / str(ranks) / "out"
        if ranks == 1:
            update(start, rows, out, loss, lora=R4, trl=CURVED, saves=saves(out.with_name("update")))
        else:
            on_ranks(ranks, going_on, folder, out, loss)
        assert apart(out, whole, weights(base), base) < 1e-3


def going_on(rank: int, join: Callable[[], None], folder: Path, out: Path, loss: str) -> None:
    join()
    more = {"lora": R4, "trl": CURVED, "numerics": SHARD, "saves": saves(out.with_name("update"))}
    assert update(as_model(folder / "tiny"), [folder / "rows.parquet"], out, loss, **more).metrics["continued_at"] == [3]


@pytest.mark.nightly
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_divided_or_not_learns_what_one_learns(folder, alone, ranks):
    everything = on_ranks(ranks, several, folder, ranks)
    whole = 4 * sum(tensor.numel() for tensor in weights(folder / "tiny").values()) + 16 * LEARNED
    base = folder / "tiny"
    for loss in ("sft", "dpo"):
        for shard in (False, True):
            ours = everything[0][f"{loss}-{shard}"]
            assert ours.curve == pytest.approx(alone[loss].curve, rel=1e-3)
            assert apart(ours.trained.folder, alone[loss].trained.folder, weights(base), base) < 0.02
        held = [found[f"{loss}-True"].held for found in everything]
        assert all(part < 1.2 * whole / ranks for part in held) and sum(held) == pytest.approx(whole, rel=0.01)


def several(rank: int, join: Callable[[], None], folder: Path, ranks: int) -> dict[str, Seen]:
    import torch

    join()
    found = {}
    for loss in ("sft", "dpo"):
        for shard in (False, True):
            found[f"{loss}-{shard}"] = made(folder, loss, folder / f"{loss}-{ranks}-{shard}", numerics={"shard": shard})
            torch.distributed.barrier()
    return found
