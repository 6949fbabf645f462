"""Updates of models that are divided over ranks, looked at: what each rank reads, what it holds, and how its loss goes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer
from updates import update

from selfkd.backend.base import Trained
from selfkd.core.pool import Model

SHARD = {"shard": True}


def experts_model(folder: Path) -> Path:
    """A mixture of experts: its files hold each expert apart, the model in memory all of a layer's in one weight; five over two ranks."""
    import torch
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **{"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2},
        **{"max_position_embeddings": 512, "initializer_range": 0.1, "tie_word_embeddings": False, "dtype": "float32"},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@dataclasses.dataclass
class Seen:
    """What an update did on one rank."""

    trained: Trained
    curve: list[float]
    read: int  # bytes of weights that were read
    kinds: set[str]  # of the model's weights
    held: int  # bytes of weights, gradients and optimiser at the first step


def learn(start: Model, rows: list[Path], out: Path, loss: str = "sft", **more: Any) -> Seen:
    """Make an update, looking at what it reads and holds."""
    from transformers.distributed.sharding_utils import DtensorShardOperation

    from selfkd.backend.trainer import sharded

    curve, read, seen = [], [], []
    inner, reader = sharded.held, DtensorShardOperation.shard_tensor

    def held(model: Any, optimiser: Any) -> float:
        seen.append(counted(model, optimiser))
        return inner(model, optimiser)

    def reading(self: Any, *arguments: Any, **named: Any) -> Any:
        part = reader(self, *arguments, **named)
        read.append(0 if part is None else part.nbytes)
        return part

    sharded.held, DtensorShardOperation.shard_tensor = held, reading
    try:
        trained = update(start, rows, out, loss, on_progress=lambda step: curve.append(step["loss"]), **more)
    finally:
        sharded.held, DtensorShardOperation.shard_tensor = inner, reader
    return Seen(trained, curve, sum(read), *(seen[0] if seen else (set(), 0)))


def counted(model: Any, optimiser: Any) -> tuple[set[str], int]:
    """Count by hand what a rank holds."""
    weights = list(model.parameters())
    states = [value for weight in weights if weight.requires_grad for value in optimiser.state[weight].values()]
    tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *states]
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return {type(weight).__name__ for weight in weights}, sum(part.numel() * part.element_size() for part in parts)


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
