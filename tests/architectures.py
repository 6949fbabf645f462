"""Tiny random checkpoints of many architectures, each with what sets it apart switched on, and the tokenizer of `tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import CHARACTERS, SPECIAL, tiny_tokenizer

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
WHOLE_HEADS = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": None,
}  # of configurations that name no size of a head
# Caps so low, windows so short and weights so wide that leaving one of them out is seen at once.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},  # norms of queries and keys
    "gemma2": {
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 16,
        "query_pre_attn_scalar": 32,
    },
    "gemma3_text": {
        **{"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        **{"sliding_window": 16, "query_pre_attn_scalar": 32},
    },
    "phi3": WHOLE_HEADS,  # one matrix for queries, keys and values
    "phi": {**WHOLE_HEADS, "intermediate_size": 256, "partial_rotary_factor": 0.5},  # biases, attention beside the MLP
    "mistral": {"sliding_window": 16},
    "olmo2": WHOLE_HEADS,  # norms behind attention and MLP
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "n_inner": 128, **dict.fromkeys(SIZES)},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def architecture(kind: str, folder: Path, **more: Any) -> Path:
    """A complete Hugging Face folder in fp32: some hundred thousand numbers, the same for the same words."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    words = {"vocab_size": len(SPECIAL) + len(CHARACTERS), "initializer_range": 0.1, "dtype": "float32"}
    words = {**words, **SIZES, **IDS, **ARCHITECTURES.get(kind, {}), **more}
    config = AutoConfig.for_model(kind, **{name: value for name, value in words.items() if value is not None})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
    model.generation_config = GenerationConfig(**IDS)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
