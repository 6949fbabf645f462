"""Adapters over weights in 4 bits, by bitsandbytes itself on tiny real models: what lies there, what learns, what is served, and how far the two lie apart."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import architecture
from hypothesis import given, settings
from hypothesis import strategies as st
from local_engines import asked, backend, scored
from ranks import on_ranks
from safetensors.torch import load_file
from tiny import as_model, opened, tiny_model
from updates import FAST, Enough, stopped_at, update, write_rows

from selfkd.backend import adapters, nf4, probe
from selfkd.backend.adapters import Weights
from selfkd.backend.base import LoraSpec, Saves, Trained, TrainSpec
from selfkd.backend.trainer import adapter, four_bits
from selfkd.backend.trainer import update as module
from selfkd.backend.trainer.four_bits import FourBits
from selfkd.backend.trainer.said import sequence_logprobs
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import UsageError

QLORA = LoraSpec(4, 8.0, quantise="nf4")
CURVED = {**FAST, "per_device_train_batch_size": 2, "num_train_epochs": 2, "lr_scheduler_type": "cosine"}
# The sixteen values of NF4, as Appendix E of the paper prints them.
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return as_model(tiny_model(tmp_path_factory.mktemp("root") / "root"))


def learn(start: Model, out: Path, lora: LoraSpec | None = QLORA, loss: str = "sft", **more: Any) -> Trained:
    return update(start, write_rows(out.parent), out, loss, **{"lora": lora, "precision": "fp32", **more})


def adapted(folder: Path, base: Model) -> Model:
    return Model("policy", str(folder), digest.weights(folder), "adapter", base.path)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight as NF4 keeps it, by hand: of each 64 in a row the largest, and the nearest level times it."""
    flat = weight.reshape(-1)
    blocks = torch.cat([flat, flat.new_zeros(-len(flat) % 64)]).view(-1, 64)
    most = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / most[..., None].clamp(min=1e-30) - LEVELS).abs().argmin(-1)
    return (LEVELS[nearest] * most).reshape(-1)[: len(flat)].view(weight.shape)


def four(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a folder, its layers in 4 bits."""
    four_bits.quantise(model, Weights(model.name_or_path), torch.device("cpu"), dtype)
    return model


# ---- a layer ----


@settings(max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(0, 99))
def test_a_weight_of_any_shape_lies_within_its_scales_rounding_of_nf4_by_hand(high: int, wide: int, seed: int) -> None:
    """The scales are kept in 8 bits of their spread around their mean: at most 1/64 of the widest scale apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = torch.nn.Linear(wide, high)
        x = torch.randn(3, wide)
    lies = FourBits(layer, torch.device("cpu"), torch.float32)
    by_hand = rounded(layer.weight.detach())
    found = lies.unpacked(torch.float32)
    assert found.shape == layer.weight.shape
    assert (found - by_hand).abs().max() <= layer.weight.detach().abs().max() / 64
    assert torch.allclose(lies(x), x @ found.t() + layer.bias, atol=1e-6)


def test_what_flows_back_is_that_of_the_weight_as_it_lies_and_autocast_computes_in_bf16() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 40, bias=False)
    lies, x = FourBits(layer, torch.device("cpu"), torch.float32), torch.randn(5, 96, requires_grad=True)
    lies(x).square().sum().backward()
    weight = lies.unpacked(torch.float32)
    assert torch.allclose(x.grad, 2 * (x.detach() @ weight.t()) @ weight, rtol=1e-4, atol=1e-5)
    half = FourBits(layer, torch.device("cpu"), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        given = half(x.detach())
    assert given.dtype == torch.bfloat16 and lies(x.detach()).dtype == torch.float32
    assert torch.equal(given, torch.nn.functional.linear(x.detach().bfloat16(), weight.bfloat16()))


# ---- a model ----


def test_linear_layers_lie_in_4_bits_and_head_embedding_and_norms_stay_as_they_are(tmp_path):
    model = four(opened(tiny_model(tmp_path / "root", tied=False)))
    before = opened(tmp_path / "root")
    lies = {name for name, part in model.named_modules() if isinstance(part, FourBits)}
    assert len(lies) == 14 and all(".layers." in name for name in lies)
    rest = {name: weight for name, weight in model.named_parameters() if name.removesuffix(".weight") not in lies}
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= rest.keys()
    assert all(torch.equal(weight, before.get_parameter(name)) for name, weight in rest.items())


def test_a_weight_takes_as_many_bytes_as_are_planned(root):
    """Half a byte, an eighth bit for 64 and four bytes for 16,384; two tables of 16 and of 256 numbers, and a mean, beside each layer."""
    model = four(opened(Path(root.path)))
    layers = [part for part in model.modules() if isinstance(part, FourBits)]
    linear = 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128)
    tables = len(layers) * 4 * (16 + 256 + 1)
    taken = sum(part.weight.nbytes for part in layers) + four_bits.scales(model) - tables
    assert pytest.approx(0.5159, abs=1e-4) == nf4.BYTES
    assert taken == pytest.approx(nf4.BYTES * linear, abs=4 * len(layers))  # a scale of scales is begun for each layer


def test_while_it_is_whole_a_model_in_4_bits_gives_what_the_full_weights_give_and_then_again_what_it_gave(root):
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    model, full = four(opened(Path(root.path))), opened(Path(root.path))
    with torch.no_grad():
        before = model(ids).logits
        with four_bits.whole(model, Weights(root.path)):
            assert torch.allclose(model(ids).logits, full(ids).logits, atol=1e-6)
        assert torch.equal(model(ids).logits, before) and (before - full(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "said"), [("gpt2", "keep their matrices as"), ("qwen3_moe", "experts"), ("mixtral", "experts")]
)
def test_what_could_not_lie_in_4_bits_is_refused_by_name_by_the_model_and_by_its_config(tmp_path, kind, said):
    folder = architecture(kind, tmp_path / kind)
    with pytest.raises(UsageError, match=rf"{kind}.*{said}|{said}.*{kind}") as error:
        four(opened(folder))
    assert error.value.where == "train.lora.quantise"
    assert kind in nf4.unfit(json.loads((folder / "config.json").read_text()))


def test_every_model_that_writes_text_with_transposed_layers_is_known_by_name():
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as WRITERS

    models = Path(transformers.__file__).parent / "models"
    users = {path.parent.name for path in models.glob("*/modeling_*.py") if "Conv1D(" in path.read_text("utf-8")}
    homes = {kind: kind.replace("-", "_").removesuffix("_gpt") for kind in WRITERS}
    assert "gpt2" in users and {kind for kind, home in homes.items() if home in users} == nf4.TRANSPOSED


def test_dense_models_are_fit_by_their_config(tmp_path):
    for kind in ("llama", "gemma3_text", "phi3"):
        assert nf4.unfit(json.loads((architecture(kind, tmp_path / kind) / "config.json").read_text())) == ""
    assert nf4.unfit({"model_type": "x", "text_config": {"model_type": "mixtral", "num_local_experts": 8}}) != ""


# ---- an update ----


def by_hand(root: Model, folder: Path, sequences: Any, lies: bool) -> np.ndarray:
    """Log-probabilities of an adapter's formula, over NF4 by the layers themselves or over full weights, of all tokens in a row."""
    net = opened(Path(root.path))
    found = adapters.read(folder)
    if lies:
        for name in [name for name, part in four(net).named_modules() if isinstance(part, FourBits)]:
            weight = net.get_submodule(name).unpacked(torch.float32)
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            net.set_submodule(name, layer)
    with torch.no_grad():
        for name in found.modules if found else ():
            net.get_parameter(f"{name}.weight").add_(found.change(name))
    return np.concatenate(probe.token_logprobs(net, sequences))


def test_it_learns_the_probe_is_of_what_is_served_and_the_gap_is_that_of_the_formulas(root, tmp_path, monkeypatch):
    chosen: list[Any] = []
    inner = probe.candidate_sequences
    monkeypatch.setattr(probe, "candidate_sequences", lambda *given: chosen.append(inner(*given)) or chosen[-1])
    trained = learn(root, tmp_path / "out", trl={**FAST, "num_train_epochs": 3})
    metrics, proof = trained.metrics, probe.read_probe(trained.folder)
    assert metrics["loss_last"] < metrics["loss_first"] and proof.parent == root.digest
    assert by_hand(root, trained.folder, proof.ids, False) == pytest.approx(proof.child, abs=1e-4)
    assert by_hand(root, Path(root.path), proof.ids, False) == pytest.approx(proof.before, abs=1e-4)
    was, now = (by_hand(root, Path(path), chosen[0], False) for path in (root.path, trained.folder))
    low, learned = (by_hand(root, Path(path), chosen[0], True) for path in (root.path, trained.folder))
    told = metrics["lora"]
    assert told["quantise"] == adapters.read(trained.folder).words["quantise"] == "nf4"
    assert told["gap_before"] == pytest.approx(np.sqrt(np.mean((low - was) ** 2)), rel=1e-3) and told["gap_before"] > 0.01
    assert told["gap"] == pytest.approx(np.sqrt(np.mean((learned - now) ** 2)), rel=1e-3)
    assert told["likelier"] == pytest.approx(float(np.mean(now - learned)), abs=1e-4)
    step = learned - low
    assert told["carried"] == pytest.approx(float((now - was) @ step / (step @ step)), rel=1e-3) and 0.5 < told["carried"] < 1.5


def test_the_gap_by_hand() -> None:
    """Learned: +1 and +1; served: +1 and +0. Half of it is carried; they lay 0 and 3 apart before, and 0 and 4 afterwards."""
    found = four_bits.gap([[0.0], [0.0]], [[1.0], [0.0]], [[0.0], [3.0]], [[1.0], [4.0]])
    apart = {"gap_before": pytest.approx(4.5**0.5), "gap": pytest.approx(8**0.5), "likelier": -2.0}
    assert found == {"quantise": "nf4", **apart, "carried": 0.5}
    assert four_bits.gap([[1.0]], [[1.0]], [[1.0]], [[1.0]])["carried"] is None


def test_beneath_the_adapter_lie_half_a_byte_and_the_scales_and_only_the_adapter_learns(root, tmp_path, monkeypatch):
    seen: list[dict[str, int]] = []

    def look(self: Any, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        seen.append(adapter.held(model, optimizer))

    monkeypatch.setattr(module.losses.StepReporter, "on_optimizer_step", look, raising=False)
    learn(root, tmp_path / "out", precision="bf16")
    linear = 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128)
    whole = sum(weight.numel() for weight in opened(Path(root.path)).parameters())
    tables = 14 * 4 * (16 + 256 + 1)
    assert seen[-1]["frozen"] == pytest.approx(nf4.BYTES * linear + 4 * (whole - linear) + tables, abs=4 * 14)
    assert seen[-1]["trained"] == 4 * 4 * 2 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 128))


def test_it_repeats_to_the_bit_and_learns_something_else_than_over_full_weights(root, tmp_path):
    found = [learn(root, tmp_path / name) for name in ("a", "b")]
    full = learn(root, tmp_path / "c", LoraSpec(4, 8.0))
    assert digest.weights(found[0].folder) == digest.weights(found[1].folder)
    low, high = (load_file(one.folder / adapters.TENSORS) for one in (found[0], full))
    assert any((low[name] - high[name]).abs().max() > 1e-4 for name in low)
    assert "quantise" not in full.metrics["lora"] and "quantise" not in adapters.read(full.folder).words


def test_a_new_adapter_over_another_learns_over_both_in_4_bits_and_continue_goes_on_over_the_base(root, tmp_path):
    first = adapted(learn(root, tmp_path / "one").folder, root)
    small = {"learning_rate": 1e-6}
    over = learn(first, tmp_path / "two", trl=small)
    on = learn(first, tmp_path / "three", LoraSpec(4, 8.0, goes_on=True, quantise="nf4"), trl=small)
    for trained in (over, on):
        proof = probe.read_probe(trained.folder)
        assert by_hand(root, Path(first.path), proof.ids, False) == pytest.approx(proof.before, abs=1e-4)
        assert by_hand(root, trained.folder, proof.ids, False) == pytest.approx(proof.child, abs=1e-4)
        assert proof.parent == first.digest and digest.base_of(trained.folder) == root.digest
    assert adapters.read(over.folder).rank == 8 and adapters.read(on.folder).rank == 4
    lies = learn(root, tmp_path / "four", trl=small).metrics["lora"]["gap_before"]
    assert on.metrics["lora"]["gap_before"] != pytest.approx(
        lies, rel=1e-3
    )  # of other tokens' probabilities, over the same 4 bits


# ---- the reference model ----


def test_the_reference_lies_in_the_same_4_bits_whoever_it_is(root, tmp_path):
    """Margins begin at zero only where policy and reference are the same model: the base and the base, the start and its twin."""
    twin = Model("policy", shutil.copytree(root.path, tmp_path / "twin"), "another digest")
    base = {name: learn(root, tmp_path / name, QLORA, "dpo", reference=one) for name, one in (("a", root), ("b", twin))}
    assert all(one.metrics["rewards/margins_first"] == pytest.approx(0, abs=1e-5) for one in base.values())
    assert digest.weights(base["a"].folder) == digest.weights(base["b"].folder)
    first = adapted(learn(root, tmp_path / "one").folder, root)
    same = Model("policy", shutil.copytree(first.path, tmp_path / "same"), "another digest", "adapter", root.path)
    for name, on in (("on", True), ("over", False)):
        spec = LoraSpec(4, 8.0, goes_on=on, quantise="nf4")
        margins = [
            learn(first, tmp_path / f"{name}-{number}", spec, "dpo", reference=one).metrics["rewards/margins_first"]
            for number, one in enumerate((same, root))
        ]
        assert margins[0] == pytest.approx(0, abs=1e-5) and abs(margins[1]) > 1e-3


def test_a_reference_of_another_rank_keeps_its_own(root, tmp_path):
    other = adapted(
        learn(root, tmp_path / "one", LoraSpec(2, 6.0, targets=("layers.0.self_attn.q_proj", "up_proj"))).folder, root
    )
    held = adapter.held_as(LoraSpec(4, 8.0, goes_on=True, quantise="nf4"), other)
    assert held.goes_on and (held.spec.r, held.spec.alpha) == (2, 6.0) and held.beneath.digest == root.digest
    first = adapted(learn(root, tmp_path / "two").folder, root)
    spec = LoraSpec(4, 8.0, goes_on=True, quantise="nf4")
    trained = learn(first, tmp_path / "three", spec, "dpo", reference=other)
    assert abs(trained.metrics["rewards/margins_first"]) > 1e-3
    assert adapter.held_as(LoraSpec(4, 8.0, goes_on=True, quantise="nf4"), root).goes_on is False


# ---- ranks, and going on ----


def _on_a_rank(rank: int, join: Any, folder: Path, path: str) -> None:
    join()
    spec = TrainSpec("sft", 2**40 + 7, trl=FAST, lora=QLORA)
    module.train_rank(as_model(Path(path)), None, [folder / "rows.parquet"], spec, folder / "two", {"threads": 1})


def test_two_ranks_learn_what_one_learns_within_rounding(root, tmp_path):
    one = learn(root, tmp_path / "one")
    on_ranks(2, _on_a_rank, tmp_path, root.path)
    first, second = (load_file(folder / adapters.TENSORS) for folder in (one.folder, tmp_path / "two"))
    assert all(torch.allclose(first[name], second[name], atol=2e-4) for name in first)
    assert any((first[name].abs() > 1e-3).any() for name in first if "lora_B" in name)


def test_a_divided_model_does_not_lie_in_4_bits_and_says_so():
    with pytest.raises(UsageError, match="shard: true divides each weight") as error:
        four_bits.refuse_shards(TrainSpec("sft", 5, lora=QLORA))
    assert error.value.where == "train.lora.quantise"
    four_bits.refuse_shards(TrainSpec("sft", 5, lora=LoraSpec(4, 8.0)))
    four_bits.refuse_shards(TrainSpec("sft", 5))


def test_stopped_in_the_middle_it_ends_on_the_same_bits(root, tmp_path):
    rows, kept = write_rows(tmp_path, 9), Saves(tmp_path / "update", "this update", 1e-9)
    with suppress(Enough):
        update(root, rows, tmp_path / "x", trl=CURVED, lora=QLORA, saves=kept, on_progress=stopped_at(7))
    went_on = update(root, rows, tmp_path / "b", trl=CURVED, lora=QLORA, saves=kept)
    whole = update(root, rows, tmp_path / "a", trl=CURVED, lora=QLORA)
    assert went_on.metrics["continued_at"] == [6]
    assert digest.weights(went_on.folder) == digest.weights(whole.folder)
    assert went_on.metrics["lora"] == whole.metrics["lora"]


# ---- serving ----


@pytest.mark.real
@pytest.mark.parametrize(
    ("generator", "serve"), [("transformers", "merged"), pytest.param("vllm", "adapter", marks=pytest.mark.nightly)]
)
def test_an_engine_serves_it_over_full_weights_and_the_swap_is_proved(tmp_path, generator, serve):
    with backend(tmp_path, generator) as local:
        local.load({"path": str(architecture("llama", tmp_path / "source"))}, tmp_path / "root", None)
        base = as_model(tmp_path / "root")
        answers = asked(local, base, tmp_path)
        spec = LoraSpec(4, 8.0, serve=serve, quantise="nf4")
        child = adapted(learn(base, tmp_path / "child", spec, numerics=local.numerics()).folder, base)
        asked(local, child, tmp_path)
        notes = local.swap_notes()
        assert notes["proved"] is True and notes["survived"] == pytest.approx(1, abs=1e-3)
        formula = sequence_logprobs(Path(child.path), answers, {"threads": 1}, base=Path(base.path))
        expected = np.array([value for _, value, _ in sorted(formula)])
        assert (abs(scored(local, child, answers) - expected) < 1e-5 * answers["tokens"].to_numpy()).all()
