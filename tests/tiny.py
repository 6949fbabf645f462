"""A whole model that fits in a test: a two-layer Llama with one token per printable character."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from selfkd.backend import probe, tokens
from selfkd.core import digest
from selfkd.core.pool import Model

WORDS = ["hi", "2+2=?", "what now", "one two three", "abc", "tell me more", "zzz", "why?"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = ["\n", *map(chr, range(32, 127))]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer() -> Any:
    """One id per character; text that names a special token becomes that token, as in any chat tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: number for number, text in enumerate(SPECIAL + CHARACTERS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    pad, bos, eos, unk = SPECIAL
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk)
    tok.chat_template = TEMPLATE
    tok.clean_up_tokenization_spaces = False
    return tok


def tiny_model(folder: Path, tied: bool = True, seed: int = 0) -> Path:
    """A complete Hugging Face folder in fp32, the same bytes for the same seed.

    Heads of 32 are the smallest that vLLM's CPU attention takes; the weights are drawn wide (0.1 instead of 0.02), so that
    the next character is far from uniform and two models differ plainly.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        dtype="float32",
        **ids,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def on_the_grid(folder: Path, tied: bool) -> Path:
    """A tiny model whose every weight is a bf16 value, as published ones are."""
    tiny_model(folder, tied)
    weights = opened(folder)
    weights.bfloat16().float().save_pretrained(folder)
    return folder


def opened(folder: Path) -> Any:
    """The weights of a folder in transformers, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def as_model(folder: Path) -> Model:
    return Model("policy", str(folder), digest.weights(folder))


def save_child(parent: Path, weights: Any, folder: Path, sequences: Any = None) -> Path:
    """What a trainer leaves: fp32 weights, the parent's tokenizer, and a probe of `sequences`, else of WORDS."""
    weights.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "chat.json"):
        if (parent / name).exists():
            shutil.copy(parent / name, folder / name)
    tok = tokens.tokenizer(str(parent))
    sequences = sequences or probe.candidate_sequences(tok, [tokens.encode_prompt(tok, say(text)) for text in WORDS])
    before = probe.token_logprobs(opened(parent), sequences)
    probe.write_probe(folder, sequences, probe.token_logprobs(weights, sequences), before, digest.weights(parent))
    return folder


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
