"""An engine in bfloat16 cannot tell a checkpoint that `keep: {as: bf16}` left from the whole one: the same proof, the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from architectures import architecture
from tiny import WORDS, as_model, opened, save_child, say

from selfkd.backend.engine import root_model
from selfkd.backend.engine.held_engine import ENGINES, resolve
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.core import digest
from selfkd.core.rounding import round_folder

pytestmark = pytest.mark.real
SIZES = {"threads": 1, "kv_cache_gb": 0.05, "max_model_len": 256, "max_num_seqs": 16}


def serves_the_copy_as_the_whole(kind: str, folder: Path, generator: str) -> None:
    root, child, copy = folder / "root", folder / "child", folder / "copy"
    root_model.load_model({"path": str(architecture(kind, folder / "source"))}, root, 7)
    weights, noise = opened(root), torch.Generator().manual_seed(1)
    for tensor in weights.parameters():
        tensor.data += 0.02 * torch.randn(tensor.shape, generator=noise)
    whole = as_model(save_child(root, weights, child))
    round_folder(child, copy)
    assert digest.weights(copy) != whole.digest and len(list(copy.iterdir())) == len(list(child.iterdir()))
    rows = [
        {"id": f"r{at}", "messages": say(text), "text": f"{text} or not", "token_ids": None, "finish_reason": "stop"}
        for at, text in enumerate(WORDS)
    ]
    engine = resolve(ENGINES[generator])(
        fixed_numerics(Machine(generator=generator, dtype="bfloat16", **SIZES)), as_model(root)
    )
    try:
        found = []
        for model in (whole, replace(whole, path=str(copy))):
            engine.swap(as_model(root))
            notes = engine.swap(model)
            del notes["seconds"]
            found.append((notes, engine.logprobs(pl.DataFrame(rows))))
    finally:
        engine.close()
    assert found[0] == found[1]
    assert found[0][0]["proved"] is True and found[0][0]["survived"] > 0.5


def test_the_copy_is_served_as_the_whole(tmp_path: Path) -> None:
    serves_the_copy_as_the_whole("llama", tmp_path, "transformers")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "qwen3_moe", "mixtral"])
def test_vllm_serves_the_copy_as_the_whole(tmp_path: Path, kind: str) -> None:
    serves_the_copy_as_the_whole(kind, tmp_path, "vllm")
