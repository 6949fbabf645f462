"""Models beyond Llama, whole: loaded, asked, taught, swapped, proved and asked again, by the real engine and the real trainer.

What must be true is computed beside them by each architecture's own formula, in fp32.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from architectures import ARCHITECTURES, SIZES, architecture
from local_engines import asked, backend, machine, scored
from safetensors.torch import load_file, save_file
from tiny import WORDS, as_model

from selfkd.backend import probe, tokens
from selfkd.backend.base import Trained, TrainSpec
from selfkd.backend.engine import vllm
from selfkd.backend.local import LocalBackend
from selfkd.backend.machine import fixed_numerics
from selfkd.backend.trainer.said import sequence_logprobs
from selfkd.core.pool import Model, shape
from selfkd.errors import UsageError, WeightsError

PER_TOKEN = {"float32": 1e-5, "bfloat16": probe.TOLERANCE["bfloat16"]}  # nats by which an engine may differ from the formula
BEYOND_LLAMA = sorted(set(ARCHITECTURES) - {"llama", "qwen3"})


def taught(local: LocalBackend, root: Model, answers: pl.DataFrame, folder: Path, dtype: str) -> Trained:
    """The model learns its own answers, as sampled."""
    names = {"text": "chosen", "token_ids": "chosen_ids"}
    ended = (pl.col("finish_reason") == "stop").alias("chosen_ended")
    rows = answers.select("id", "messages", "text", "token_ids", ended, pl.lit(1.0).alias("weight")).rename(names)
    shape("rows", rows).write_parquet(folder / "rows.parquet")
    spec = TrainSpec("sft", 5, precision="fp32", trl={"learning_rate": 2e-3, "num_train_epochs": 2})
    return local.train(root, None, [folder / "rows.parquet"], spec, folder / "child")


def by_formula(model: Model, answers: pl.DataFrame) -> np.ndarray:
    """The log-probability of each answer, a prompt at a time, without padding, by the architecture's own code."""
    from transformers import AutoModelForCausalLM

    tok = tokens.tokenizer(model.path)
    net = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    for messages, ids in answers.select("messages", "token_ids").iter_rows():
        prompt = tokens.encode_prompt(tok, messages)
        with torch.no_grad():
            table = net(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        found.append(sum(table[len(prompt) - 1 + at, token].item() for at, token in enumerate(ids)))
    return np.array(found)


def moved(root: Model, child: Model) -> dict[str, bool]:
    old, new = (load_file(Path(model.path) / "model.safetensors") for model in (root, child))
    assert old.keys() == new.keys()
    return {name: not torch.equal(tensor, new[name]) for name, tensor in old.items()}


def wrong_ones(root: Model, child: Model, folder: Path, dtype: str) -> Iterator[Model]:
    """The parent's weights under the child's name; in fp32 also the child with one matrix of its second layer upside down.

    Doubled it would do for Gemma and OLMo, whose norms stand behind their matrices.
    """
    right, old = (load_file(Path(model.path) / "model.safetensors") for model in (child, root))
    matrices = [name for name, tensor in right.items() if ".1." in name and tensor.ndim == 2 and "experts" not in name]
    chosen = matrices[:3] if dtype == "float32" else []
    changed = {"stale": old, **{name: {**right, name: right[name].flip(0).contiguous()} for name in chosen}}
    for name, tensors in changed.items():
        shutil.copytree(child.path, folder / name)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        yield Model("policy", str(folder / name), child.digest)


def goes_round(kind: str, folder: Path, generator: str, dtype: str = "float32") -> None:
    """Assert all that a round needs of an architecture."""
    near = PER_TOKEN[dtype]
    with backend(folder, generator, dtype) as local:
        local.load({"path": str(architecture(kind, folder / "source"))}, folder / "root", None)
        root = as_model(folder / "root")
        answers = asked(local, root, folder)
        lengths, formula = answers["tokens"].to_numpy(), by_formula(root, answers)
        assert local.facts()["engine-0"]["runner"].startswith(generator)
        assert local.swap_notes()["proved"] is True and answers["text"].n_unique() > 8
        assert (abs(answers["logprob"].to_numpy() - formula) < near * lengths).all()
        assert (abs(scored(local, root, answers) - formula) < near * lengths).all()
        trainers = {name: value for name, value, _ in sequence_logprobs(Path(root.path), answers, {"threads": 1})}
        assert (abs(np.array([trainers[name] for name in answers["id"]]) - formula) < 1e-5 * lengths).all()

        metrics = taught(local, root, answers, folder, dtype).metrics
        child = as_model(folder / "child")
        assert metrics["loss_last"] < metrics["loss_first"] and child.digest != root.digest
        assert all(found or "experts" in name for name, found in moved(root, child).items())

        after = asked(local, child, folder)
        notes = local.swap_notes()
        assert notes["proved"] is True and after["text"].to_list() != answers["text"].to_list()
        assert notes["survived"] == pytest.approx(1, abs=1e-3 if dtype == "float32" else 0.3)
        learned = by_formula(child, answers)
        assert (abs(scored(local, child, answers) - learned) < near * lengths).all()
        assert abs(learned - formula).mean() > 1

        assert asked(local, root, folder)["text"].to_list() == answers["text"].to_list()
        for wrong in wrong_ones(root, child, folder / "wrong", dtype):
            with pytest.raises(WeightsError, match="does not hold"):
                asked(local, wrong, folder)
        assert asked(local, root, folder)["text"].to_list() == answers["text"].to_list()


@pytest.mark.real
def test_qwen3_goes_round_by_vllm(tmp_path: Path) -> None:
    goes_round("qwen3", tmp_path, "vllm")


@pytest.mark.nightly
@pytest.mark.real
@pytest.mark.parametrize("kind", BEYOND_LLAMA)
def test_every_architecture_goes_round_by_vllm(tmp_path: Path, kind: str) -> None:
    goes_round(kind, tmp_path, "vllm")


@pytest.mark.nightly
@pytest.mark.real
@pytest.mark.parametrize("kind", ["gemma2", "qwen3_moe"])
def test_in_bfloat16_an_engine_lies_within_its_rounding(tmp_path: Path, kind: str) -> None:
    goes_round(kind, tmp_path, "vllm", "bfloat16")


@pytest.mark.real
@pytest.mark.parametrize(
    "kind", ["gemma2", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ARCHITECTURES if kind != "gemma2")]
)
def test_every_architecture_goes_round_by_transformers(tmp_path: Path, kind: str) -> None:
    goes_round(kind, tmp_path, "transformers")


# ---- what vLLM lacks ----


@pytest.mark.real
def test_an_architecture_that_vllm_lacks_is_named_with_the_way_out(tmp_path: Path) -> None:
    folder = architecture("codegen", tmp_path / "source", n_embd=64, n_layer=1, n_head=2, rotary_dim=16, **dict.fromkeys(SIZES))
    numerics = fixed_numerics(machine("vllm"))
    with pytest.raises(UsageError, match=r"vLLM cannot run CodeGenForCausalLM: .*not supported") as error:
        vllm.Engine(numerics, as_model(folder))
    assert error.value.where == str(folder) and "generator: transformers" in error.value.fix


@pytest.mark.nightly
@pytest.mark.real
def test_weights_that_vllm_cannot_take_are_told_with_the_way_out(tmp_path: Path) -> None:
    """It makes Phi's MLP four times as wide as the model, whatever the configuration says (0.31)."""
    with backend(tmp_path, "vllm") as local:
        local.load({"path": str(architecture("phi", tmp_path / "source", intermediate_size=128))}, tmp_path / "root", None)
        root = as_model(tmp_path / "root")
        with pytest.raises(UsageError, match=r"vLLM cannot take the weights of PhiForCausalLM: .*exceeds") as error:
            asked(local, root, tmp_path)
    assert "generator: transformers" in error.value.fix
    with backend(tmp_path, "transformers") as local:
        assert asked(local, root, tmp_path).height == 2 * len(WORDS) and local.swap_notes()["proved"] is True
