"""Tiny models that read: classifiers of one or two texts, and of tokens, with the tokenizer of tests/tiny.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import CHARACTERS, SPECIAL, tiny_tokenizer


def classifier(folder: Path, labels: list[str], of: str = "Sequence", template: bool = True, pad: bool = True) -> Path:
    """A Llama that gives a sequence, or each token, as many numbers as there are labels; one of them is a single logit."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: number for number, name in enumerate(labels)},
        pad_token_id=0 if pad else None,
        bos_token_id=1,
        eos_token_id=2,
    )
    kind = {"Sequence": LlamaForSequenceClassification, "Token": LlamaForTokenClassification}[of]
    with torch.random.fork_rng():
        torch.manual_seed(len(labels))
        model = kind(config)
    model.save_pretrained(folder)
    tok = tiny_tokenizer()
    if not template:
        tok.chat_template = None
    tok.save_pretrained(folder)
    return folder


def logits_of(folder: Path, text: str) -> Any:
    """What a model gives a text of which every character is a token, `<s>` and `</s>` included: by a plain forward pass."""
    import torch
    import transformers
    from transformers import AutoConfig

    kind = getattr(transformers, AutoConfig.from_pretrained(folder).architectures[0])
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return kind.from_pretrained(folder, dtype=torch.float32).eval()(torch.tensor([ids])).logits[0]
