"""An optimiser whose state lies in the machine's memory learns what it learns with the state beside the weights, to the bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from divided import SHARD
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from tiny import as_model, tiny_model
from updates import UNEVEN, Enough, stopped_at, update, write_rows

from selfkd.backend.base import LoraSpec, OptimiserState, Saves
from selfkd.backend.trainer import offload
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import UsageError

OFFLOADED = {"trainer": {"offload_optimiser": True}}
MAKERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda weights: torch.optim.AdamW(weights, lr=1e-2, foreach=True),
    "adamw fused": lambda weights: torch.optim.AdamW(weights, lr=1e-2, fused=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-2),
    "sgd with momentum": lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=1e-2, initial_accumulator_value=0.1),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lots and blocks that cut the weights of these tests; whole vectors of a processor, as the real ones are."""
    monkeypatch.setattr(offload, "BLOCK", 64)
    monkeypatch.setattr(offload, "LOT", 160)


def trained(make: Callable[[Any], Any], steps: int, wrap: Callable[[Any], Any]) -> tuple[list[torch.Tensor], Any]:
    """Weights after some steps with drawn gradients; the last weight gets none."""
    draw = torch.Generator().manual_seed(5)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((30, 17), (64,), (3,), (), (5, 2, 7), (4,))]
    groups = [{"params": weights[:2]}, {"params": weights[2:], "lr": 3e-3}]
    optimiser = wrap(make(groups))
    for _ in range(steps):
        for weight in weights[:-1]:
            weight.grad = torch.randn(weight.shape, generator=draw)
        optimiser.step()
        optimiser.zero_grad()
    return weights, optimiser


@pytest.mark.parametrize("name", MAKERS)
def test_every_optimiser_that_may_be_offloaded_steps_as_it_does_beside_its_weights(small, name):
    plain, beside = trained(MAKERS[name], 4, lambda optimiser: optimiser)
    away, optimiser = trained(MAKERS[name], 4, offload.offload)
    assert all(torch.equal(one, other) for one, other in zip(plain, away, strict=True))
    assert type(optimiser).__name__ == type(beside).__name__ and not optimiser.state
    for one, other in zip(plain, away, strict=True):
        kept, whole = optimiser.kept(other), beside.state.get(one, {})
        assert kept.keys() == whole.keys()
        for key, value in whole.items():
            assert torch.equal(kept[key], value) if isinstance(value, torch.Tensor) else kept[key] == value, key


def test_at_most_one_lot_is_beside_the_weights_and_what_lies_away_is_a_copy(small, monkeypatch):
    most, inner = [], torch.optim.AdamW.step

    def counted(self: Any, *arguments: Any) -> Any:
        found = inner(self, *arguments)
        tables = [value for state in self.state.values() for name, value in state.items() if name != "step"]
        most.append(sum(table.numel() for table in tables))
        away = {
            block.data_ptr()
            for kept in self.rest.values()
            for name in ("exp_avg", "exp_avg_sq")
            for block in kept.get(name, {}).values()
        }
        assert not away & {table.data_ptr() for table in tables}
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    weights, optimiser = trained(MAKERS["adamw"], 2, offload.offload)
    assert max(most) <= 2 * 160 and len(most) == 2 * (5 + 1)
    blocks = [block for kept in optimiser.rest.values() for block in kept["exp_avg"].values()]
    assert max(block.numel() for block in blocks) == 64
    assert sum(block.numel() for block in blocks) == sum(weight.numel() for weight in weights[:-1])


@settings(max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 16), st.integers(1, 64))
def test_lots_hold_every_number_once_and_no_more_than_they_may(counts, block, lot):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "BLOCK", block)
        patch.setattr(offload, "LOT", lot)
        weights = [torch.zeros(count) for count in counts]
        for weight in weights[::2]:
            weight.grad = torch.zeros_like(weight)
        found = list(offload.lots(weights))
    for few in found:
        sizes = [piece.numbers.stop - piece.numbers.start for piece in few]
        assert len(few) == 1 or sum(sizes) <= lot
        assert max(sizes) <= block
    whole = [piece for few in found for piece in few]
    for weight in weights[::2]:
        numbers = [i for piece in whole if piece.weight is weight for i in range(piece.numbers.start, piece.numbers.stop)]
        assert numbers == list(range(len(weight)))
    assert {id(piece.weight) for piece in whole} == {id(weight) for weight in weights[::2]}


def test_a_step_that_fails_leaves_the_weights_and_groups_that_there_were(small, monkeypatch):
    weights, optimiser = trained(MAKERS["adamw"], 1, offload.offload)
    groups = copy.copy(optimiser.param_groups)

    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    weights[0].grad = torch.ones_like(weights[0])
    with pytest.raises(MemoryError):
        optimiser.step()
    assert optimiser.param_groups == groups and optimiser.param_groups[0]["params"][0] is weights[0] and not optimiser.state


# ---- updates ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    tiny_model(folder / "tiny")
    write_rows(folder, 9)
    return folder


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    allow(monkeypatch)
    yield


def allow(patch: pytest.MonkeyPatch) -> None:
    from selfkd.backend.trainer import update as module

    patch.setattr(module.refused, "offloading", lambda *_: None)
    patch.setattr(offload, "BLOCK", 1024)
    patch.setattr(offload, "LOT", 4096)


@pytest.mark.parametrize("lora", [None, LoraSpec(4, 8.0)])
def test_an_update_ends_on_the_same_weights_and_on_the_same_state(folder, tmp_path, as_on_a_card, lora):
    start, rows = as_model(folder / "tiny"), [folder / "rows.parquet"]
    more: dict[str, Any] = {"trl": UNEVEN, "lora": lora, "keeps_state": True}
    plain = update(start, rows, tmp_path / "plain", **more)
    away = update(start, rows, tmp_path / "away", numerics=OFFLOADED, **more)
    assert digest.weights(away.folder) == digest.weights(plain.folder)
    assert contents(away.state) == contents(plain.state)
    two, again = (
        update(
            child(start, plain.folder, lora), rows, tmp_path / name, numerics=numerics, state=OptimiserState(state, ""), **more
        )
        for name, numerics, state in (("two", {}, away.state), ("again", OFFLOADED, plain.state))
    )
    assert digest.weights(two.folder) == digest.weights(again.folder) and contents(two.state) == contents(again.state)


def child(start: Model, folder: Path, lora: Any) -> Model:
    return Model("policy", str(folder), digest.weights(folder), "adapter", start.path) if lora else as_model(folder)


def contents(state: Path | None) -> dict[str, Any]:
    assert state
    return {
        path.name: json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes() for path in state.iterdir()
    }


def test_an_update_that_was_stopped_goes_on_to_the_same_bits(folder, tmp_path, as_on_a_card):
    start, rows, saves = as_model(folder / "tiny"), [folder / "rows.parquet"], Saves(tmp_path / "update", "this one", 1e-9)
    plain = update(start, rows, tmp_path / "plain", trl=UNEVEN)
    with pytest.raises(Enough):
        update(start, rows, tmp_path / "begun", trl=UNEVEN, numerics=OFFLOADED, saves=saves, on_progress=stopped_at(4))
    went_on = update(start, rows, tmp_path / "went on", trl=UNEVEN, numerics=OFFLOADED, saves=saves)
    assert went_on.metrics["continued_at"] == [3]
    assert digest.weights(went_on.folder) == digest.weights(plain.folder)


def together(rank: int, join: Callable[[], None], folder: Path, place: Path) -> dict[str, Any]:
    """One of two ranks that divide a model: an update with the state beside the weights, one with it away, and one that is stopped."""
    join()
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        allow(patch)
        more: dict[str, Any] = {"trl": UNEVEN, "keeps_state": True}
        for lora in (None, LoraSpec(1, 2.0)):
            name = "lora" if lora else "whole"
            for way, numerics in (("plain", SHARD), ("away", {**SHARD, **OFFLOADED})):
                args = (as_model(folder / "tiny"), [folder / "rows.parquet"], place / f"{name}-{way}")
                found[f"{name}-{way}"] = update(*args, numerics=numerics, lora=lora, **more)
    return found


def test_ranks_that_divide_a_model_keep_the_state_of_their_part_away(folder, tmp_path):
    found = on_ranks(2, together, folder, tmp_path)
    for name in ("whole", "lora"):
        plain, away = (found[0][f"{name}-{way}"] for way in ("plain", "away"))
        assert digest.weights(away.folder) == digest.weights(plain.folder)
        assert contents(away.state) == contents(plain.state)
        assert {path.name[:6] for path in away.state.glob("part-*")} == {"part-0", "part-1"}


# ---- what is refused ----


def test_without_a_card_it_is_refused_before_anything_is_read(folder, tmp_path):
    with pytest.raises(UsageError, match="moves the optimiser's state from a card") as caught:
        update(as_model(folder / "tiny"), [folder / "rows.parquet"], tmp_path / "out", numerics=OFFLOADED)
    assert caught.value.where == "machine.trainer.offload_optimiser" and not (tmp_path / "out").exists()
