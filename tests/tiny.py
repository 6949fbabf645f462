"""A whole model that fits in a test: a two-layer Llama with one token per printable character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
