"""Adapters on tiny real models: what learns and what lies still, what is committed, how engines serve them, and how a wrong one is found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, WHOLE_HEADS, architecture
from local_engines import asked, backend, scored
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from tiny import as_model, on_the_grid, opened, tiny_model
from updates import FAST, write_rows

from selfkd.backend import adapters, probe, tokens
from selfkd.backend.adapters import Weights
from selfkd.backend.base import LoraSpec, Trained, TrainSpec
from selfkd.backend.model_files import engine_kind
from selfkd.backend.trainer import adapter
from selfkd.backend.trainer import update as module
from selfkd.backend.trainer.said import sequence_logprobs
from selfkd.backend.trainer.update import train_rank
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import UsageError, WeightsError
from selfkd.steps.train import TrainStep

R4 = LoraSpec(4, 8.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return as_model(tiny_model(tmp_path_factory.mktemp("root") / "root"))


def learn(start: Model, out: Path, lora: LoraSpec | None = R4, loss: str = "sft", **more: Any) -> Trained:
    numerics, reference = more.pop("numerics", {}), more.pop("reference", start if loss == "dpo" else None)
    spec = TrainSpec(**{"loss": loss, "seed": 5, "trl": FAST, "lora": lora, **more})
    return train_rank(start, reference, write_rows(out.parent), spec, out, {"threads": 1, **numerics})


def adapted(folder: Path, base: Model) -> Model:
    return Model("policy", str(folder), digest.weights(folder), "adapter", base.path)


def merged(model: Model) -> dict[str, torch.Tensor]:
    return dict(Weights(model.path, model.base))


# ---- what is learned, and what is written ----


def test_only_the_adapter_has_gradients_and_state_and_the_base_lies_still_in_bf16(root, tmp_path, monkeypatch):
    """The tiny model: 14 layers of blocks, (64 + 128) twice for q and o, (64 + 64) twice for k and v, (64 + 128) three times, in two blocks."""
    seen: list[dict[str, int]] = []

    def look(self: Any, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        seen.append(adapter.held(model, optimizer))

    monkeypatch.setattr(module.losses.StepReporter, "on_optimizer_step", look, raising=False)
    metrics = learn(root, tmp_path / "out", precision="bf16", trl={**FAST, "num_train_epochs": 2}).metrics
    numbers = 4 * 2 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 128))
    linear = 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128)
    whole = sum(weight.numel() for weight in opened(Path(root.path)).parameters())
    last = seen[-1]
    assert last["trained"] == last["gradients"] == 4 * numbers
    assert 8 * numbers <= last["optimiser"] <= 8 * numbers + 4 * 28  # AdamW's two, and a count for each of 28 tensors
    assert last["frozen"] == 2 * linear + 4 * (whole - linear)
    assert metrics["lora"]["learning_rate"] == FAST["learning_rate"] and metrics["update_norm"] > 0


def test_the_default_learning_rate_is_ten_times_that_of_all_weights_and_is_recorded(root, tmp_path):
    rates = [learn(root, tmp_path / loss, loss=loss, trl={}).metrics["lora"]["learning_rate"] for loss in ("sft", "dpo")]
    assert rates == pytest.approx([1e-4, 5e-6])


def test_the_folder_holds_what_peft_reads_and_nothing_of_this_machine(root, tmp_path):
    from peft import PeftModel

    trained = learn(root, tmp_path / "out", precision="fp32")
    child = adapted(trained.folder, root)
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    by_peft = PeftModel.from_pretrained(opened(Path(root.path)), trained.folder).eval()
    ours = opened(Path(root.path))
    Weights(child.path, child.base).merge_into(ours)
    with torch.no_grad():
        assert torch.allclose(by_peft(ids).logits, ours(ids).logits, atol=1e-5)
        assert (by_peft(ids).logits - opened(Path(root.path))(ids).logits).abs().max() > 1e-2
    assert str(tmp_path) not in "".join(path.read_text() for path in trained.folder.glob("*.json"))
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (trained.folder / name).read_bytes() == (Path(root.path) / name).read_bytes()


def test_the_digest_covers_tensors_words_the_base_and_how_it_is_served(root, tmp_path):
    folder = learn(root, tmp_path / "out").folder
    whole = digest.weights(folder)
    assert digest.base_of(folder) == root.digest and digest.base_of(Path(root.path)) is None
    said, words = json.loads((folder / digest.ADAPTER).read_text()), json.loads((folder / adapters.WORDS).read_text())
    for name, content in (
        (digest.ADAPTER, {**said, "base": "0" * 64}),
        (digest.ADAPTER, {**said, "serve": "adapter"}),
        (adapters.WORDS, {**words, "lora_alpha": 9}),
    ):
        kept = (folder / name).read_text()
        (folder / name).write_text(json.dumps(content))
        assert digest.weights(folder) != whole
        (folder / name).write_text(kept)
    tensors = load_file(folder / adapters.TENSORS)
    save_file({**tensors, sorted(tensors)[1]: tensors[sorted(tensors)[1]] * 2}, folder / adapters.TENSORS)
    assert digest.weights(folder) != whole


def test_a_new_adapter_over_another_is_committed_as_one_that_does_what_both_do(root, tmp_path):
    first = adapted(learn(root, tmp_path / "one", precision="fp32").folder, root)
    trained = learn(first, tmp_path / "two", LoraSpec(2, 2.0, targets=("q_proj", "up_proj")), precision="fp32")
    second = adapted(trained.folder, root)
    assert digest.base_of(trained.folder) == root.digest and adapters.read(trained.folder).rank == 6
    before, after = merged(first), merged(second)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} >= {"q_proj", "up_proj"}
    others = [name for name in after if name.split(".")[-2] not in ("q_proj", "up_proj")]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in others)
    update = sum((after[name] - before[name]).square().sum().item() for name in after) ** 0.5
    assert trained.metrics["update_norm"] == pytest.approx(update, rel=1e-3)
    proof = probe.read_probe(trained.folder)
    net = opened(Path(root.path))
    Weights(second.path, second.base).merge_into(net)
    now = [value for row in probe.token_logprobs(net, proof.ids) for value in row]
    assert now == pytest.approx(proof.child.tolist(), abs=1e-4) and proof.parent == first.digest


def test_continue_goes_on_with_the_same_matrices_and_names_words_that_differ(root, tmp_path):
    first = adapted(learn(root, tmp_path / "one", precision="fp32").folder, root)
    on = LoraSpec(4, 8.0, goes_on=True)
    second = learn(first, tmp_path / "two", on, precision="fp32", trl={"learning_rate": 1e-6})
    old, new = load_file(Path(first.path) / adapters.TENSORS), load_file(second.folder / adapters.TENSORS)
    assert old.keys() == new.keys()
    assert all(0 < (new[name] - old[name]).abs().max() < 1e-4 for name in old)  # a fresh A would be another draw
    with pytest.raises(UsageError, match=r"r 8 and 4.*") as error:
        learn(first, tmp_path / "three", LoraSpec(8, 8.0, goes_on=True))
    assert error.value.where == "train.continue" and not (tmp_path / "three").exists()
    assert adapters.read(learn(root, tmp_path / "four", on).folder).rank == 4  # nothing to go on with: fresh


def test_continue_at_other_layers_of_the_same_names_is_refused(root, tmp_path):
    first = adapted(learn(root, tmp_path / "one", LoraSpec(4, 8.0, targets=("layers.0.self_attn.q_proj",))).folder, root)
    with pytest.raises(UsageError, match=r"at the same layers.*model\.layers\.0\.self_attn\.q_proj") as error:
        learn(first, tmp_path / "two", LoraSpec(4, 8.0, targets=("layers.1.self_attn.q_proj",), goes_on=True))
    assert error.value.where == "train.continue"


def test_two_adapters_at_different_layers_are_committed_with_the_rank_that_their_words_say(root, tmp_path):
    from peft import PeftModel

    first = adapted(learn(root, tmp_path / "one", LoraSpec(4, 8.0, targets=("q_proj",)), precision="fp32").folder, root)
    folder = learn(first, tmp_path / "two", LoraSpec(2, 2.0, targets=("up_proj",)), precision="fp32").folder
    tensors, words = load_file(folder / adapters.TENSORS), json.loads((folder / adapters.WORDS).read_text())
    assert {min(tensor.shape) for tensor in tensors.values()} == {6} == {words["r"]}
    ours = opened(Path(root.path))
    Weights(str(folder), root.path).merge_into(ours)
    ids = torch.tensor([[1, 20, 30, 40, 50]])
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(opened(Path(root.path)), folder).eval()
        assert torch.allclose(by_peft(ids).logits, ours(ids).logits, atol=1e-5)


def test_full_training_opens_an_adapter_merged_and_writes_full_weights(root, tmp_path):
    first = adapted(learn(root, tmp_path / "one", precision="fp32").folder, root)
    trained = learn(first, tmp_path / "two", None, precision="fp32", trl={"learning_rate": 1e-5})
    assert digest.base_of(trained.folder) is None and not (trained.folder / adapters.WORDS).exists()
    before, after = merged(first), dict(Weights(trained.folder))
    assert max((before[name] - after[name]).abs().max().item() for name in after) < 2e-4
    update = sum((after[name] - before[name]).square().sum().item() for name in after) ** 0.5
    assert trained.metrics["update_norm"] == pytest.approx(update, rel=1e-3)


def test_it_repeats_to_the_bit_and_another_seed_draws_another_adapter(root, tmp_path):
    found = [digest.weights(learn(root, tmp_path / name, seed=seed).folder) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert found[0] == found[1] != found[2]


def test_a_layer_that_is_not_there_is_named_with_those_that_are(root, tmp_path):
    with pytest.raises(
        UsageError, match=r"no linear layer of LlamaForCausalLM is called 'q_prj'. Did you mean 'q_proj'"
    ) as error:
        learn(root, tmp_path / "out", LoraSpec(4, 8.0, targets=("q_prj",)))
    assert "gate_proj" in error.value.fix and "lm_head" not in error.value.fix


# ---- the reference model ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_base_as_reference_is_the_adapter_off_and_gives_what_loading_it_gives(root, tmp_path, monkeypatch, precision):
    first = adapted(learn(root, tmp_path / "one", precision="fp32").folder, root)
    twin = Model("policy", shutil.copytree(root.path, tmp_path / "twin"), "another digest")
    on, loads, inner = LoraSpec(4, 8.0, goes_on=True), [], module.opened.load
    monkeypatch.setattr(module.opened, "load", lambda *given: loads.append(given) or inner(*given))
    found = {
        name: learn(first, tmp_path / name, on, "dpo", reference=reference, precision=precision)
        for name, reference in (("off", root), ("loaded", twin), ("start", first))
    }
    assert len(loads) == 1 + 2 + 1
    assert (
        digest.weights(found["off"].folder) == digest.weights(found["loaded"].folder) != digest.weights(found["start"].folder)
    )
    assert found["start"].metrics["rewards/margins_first"] == pytest.approx(0, abs=1e-4)
    assert abs(found["off"].metrics["rewards/margins_first"]) > 1e-3


# ---- ranks ----


def _on_a_rank(rank: int, join: Any, folder: Path, path: str) -> None:
    join()
    start = as_model(Path(path))
    spec = TrainSpec("sft", 5, trl=FAST, lora=R4)
    train_rank(start, None, [folder / "rows.parquet"], spec, folder / "two", {"threads": 1})


def test_two_ranks_learn_what_one_learns_within_rounding(root, tmp_path):
    one = learn(root, tmp_path / "one")
    on_ranks(2, _on_a_rank, tmp_path, root.path)
    first, second = (load_file(folder / adapters.TENSORS) for folder in (one.folder, tmp_path / "two"))
    assert all(torch.allclose(first[name], second[name], atol=2e-4) for name in first)
    assert any((first[name].abs() > 1e-3).any() for name in first if "lora_B" in name)


# ---- serving ----


def by_hand(base: torch.Tensor, change: torch.Tensor) -> tuple[float, float]:
    left = (base + change).bfloat16().double() - base.bfloat16().double()
    return (left * change).sum().item(), change.double().square().sum().item()


def test_the_share_that_rounding_leaves_is_measured_and_decides_how_it_is_served(tmp_path):
    """Weights on the bf16 grid, and a change far below a step of it: nothing is left of most of it."""
    root = as_model(on_the_grid(tmp_path / "root", tied=True))
    small, numerics = {"learning_rate": 1e-5}, {"dtype": "bfloat16", "generator": "vllm"}
    trained = learn(root, tmp_path / "out", trl=small, numerics=numerics)
    weights = Weights(trained.folder, root.path)
    parts = [by_hand(weights.of_base(name), weights.change(name)) for name in weights.changed]
    share = sum(kept for kept, _ in parts) / sum(whole for _, whole in parts)
    assert trained.metrics["lora"]["survived"] == pytest.approx(share, abs=1e-3) and share < 0.9
    assert trained.metrics["lora"]["serve"] == adapters.read(trained.folder).serve == "adapter"
    by_transformers = {"dtype": "bfloat16", "generator": "transformers"}
    for name, more, served in (("a", by_transformers, "merged"), ("b", {"dtype": "float32"}, "merged")):
        assert learn(root, tmp_path / name, trl=small, numerics=more).metrics["lora"]["serve"] == served
    told = learn(root, tmp_path / "c", LoraSpec(4, 8.0, serve="merged"), trl=small, numerics=numerics)
    assert adapters.read(told.folder).serve == "merged"


def test_beside_the_weights_is_refused_where_no_engine_can(root, tmp_path):
    with pytest.raises(UsageError, match="only vLLM serves an adapter beside"):
        learn(root, tmp_path / "out", LoraSpec(4, 8.0, serve="adapter"), numerics={"generator": "transformers"})


def test_ranks_that_add_up_to_more_than_vllm_has_room_for_are_refused_before_anything_learns(root, tmp_path):
    whole = LoraSpec(510, 510.0, targets=("q_proj",))
    first = adapted(learn(root, tmp_path / "one", whole).folder, root)
    with pytest.raises(UsageError, match="room for ranks up to 512, and this one has 514") as error:
        learn(first, tmp_path / "two", LoraSpec(4, 8.0, serve="adapter"))
    assert "continue: true" in error.value.fix and error.value.where == "train.lora.serve"
    for spec in (replace(whole, serve="adapter", goes_on=True), LoraSpec(2, 2.0, serve="adapter"), LoraSpec(4, 8.0)):
        adapter.refuse_unserved(TrainSpec("sft", 1, lora=spec), first, {})
    (said,) = TrainStep(name="train", lora={"r": 513, "serve": "adapter"}).problems()
    assert said == ("lora.serve", "vLLM has room for ranks up to 512, and r is 513: write serve: merged, or leave it out")


def goes_round(kind: str, folder: Path, generator: str, serve: str, **words: Any) -> None:
    """Assert that an adapter is learned, served with the log-probabilities of its formula, told from its base, and left again."""
    near = 1e-5
    with backend(folder, generator) as local:
        local.load({"path": str(architecture(kind, folder / "source", **words))}, folder / "root", None)
        base = as_model(folder / "root")
        answers = asked(local, base, folder)
        trained = learn(base, folder / "child", LoraSpec(4, 8.0, serve=serve), precision="fp32", numerics=local.numerics())
        child = adapted(trained.folder, base)
        metrics = trained.metrics
        assert metrics["loss_last"] < metrics["loss_first"] and metrics["lora"]["serve"] == serve
        after = asked(local, child, folder)
        notes = local.swap_notes()
        assert notes["proved"] is True and notes["survived"] == pytest.approx(1, abs=1e-3)
        assert after["text"].to_list() != answers["text"].to_list()
        said = sequence_logprobs(Path(child.path), answers, {"threads": 1}, base=Path(base.path))
        formula = np.array([value for _, value, _ in sorted(said)])
        was = np.array([value for _, value, _ in sorted(sequence_logprobs(Path(base.path), answers, {"threads": 1}))])
        lengths = answers["tokens"].to_numpy()
        assert (abs(scored(local, child, answers) - formula) < near * lengths).all() and abs(formula - was).max() > 0.1
        wrong = shutil.copytree(child.path, folder / "wrong")
        tensors = load_file(wrong / adapters.TENSORS)
        save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, wrong / adapters.TENSORS)
        with pytest.raises(WeightsError, match="does not hold"):
            asked(local, Model("policy", str(wrong), "f" * 64, "adapter", base.path), folder)
        assert asked(local, child, folder)["text"].to_list() == after["text"].to_list()
        assert asked(local, base, folder)["text"].to_list() == answers["text"].to_list()


@pytest.mark.real
@pytest.mark.parametrize("serve", ["merged", "adapter"])
def test_vllm_serves_an_adapter_either_way_and_a_wrong_one_is_found_out(tmp_path, serve):
    goes_round("llama", tmp_path, "vllm", serve)


@pytest.mark.real
def test_transformers_serves_an_adapter_merged(tmp_path):
    goes_round("llama", tmp_path, "transformers", "merged", tie_word_embeddings=True)


@pytest.mark.nightly
@pytest.mark.real
@pytest.mark.parametrize("kind", sorted(set(ARCHITECTURES) - {"llama"}))
def test_every_architecture_learns_an_adapter_that_vllm_serves_merged(tmp_path, kind):
    goes_round(kind, tmp_path, "vllm", "merged")


@pytest.mark.nightly
@pytest.mark.real
@pytest.mark.parametrize("kind", sorted(adapter.NATIVE - {"llama"}))
def test_every_architecture_that_is_said_to_be_is_served_beside_its_weights(tmp_path, kind):
    goes_round(kind, tmp_path, "vllm", "adapter", **(WHOLE_HEADS if kind == "qwen2" else {}))


def test_engines_with_room_for_an_adapter_are_another_kind(root, tmp_path):
    trained = learn(root, tmp_path / "out")
    kinds = []
    for serve in ("merged", "adapter"):
        said = json.loads((trained.folder / digest.ADAPTER).read_text())
        (trained.folder / digest.ADAPTER).write_text(json.dumps({**said, "serve": serve}))
        kinds.append(engine_kind(trained.folder, serve, "float32"))
    assert kinds[0] == engine_kind(Path(root.path), root.digest, "float32") != kinds[1]


def test_an_adapter_whose_base_nobody_names_is_refused(root, tmp_path):
    folder = learn(root, tmp_path / "out").folder
    with pytest.raises(WeightsError, match="its base is not named"):
        Weights(folder)
    assert tokens.tokenizer(str(folder)).vocab_size == tokens.tokenizer(root.path).vocab_size
