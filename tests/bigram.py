"""A model of two letters whose probabilities can be chosen, and rows for it: losses are then worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

from selfkd.core.pool import Model, shape

START = {"a": 0.3, "b": 0.6}  # the probability that the next token is b, after a and after b
REFERENCE = {"a": 0.45, "b": 0.2}


def bigram(folder: Path, after: dict[str, float]) -> Model:
    """A Llama without layers: the next token depends on the last one only, with the probability of b given by `after`."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=3, hidden_size=2, intermediate_size=2, num_hidden_layers=0, num_attention_heads=1, rms_norm_eps=0.0
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(
            torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        )  # normalised: sqrt(2) in the place of the token, 0 in the other
        odds = [math.log(after[token] / (1 - after[token])) / math.sqrt(2) for token in "ab"]
        model.lm_head.weight.copy_(torch.tensor([[0.0, 0.0], odds, [-40.0, -40.0]]))  # the end never comes
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="a"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>", pad_token="<e>").save_pretrained(folder)
    return Model("policy", str(folder), folder.name)


def logprob(after: dict[str, float], prompt: str, completion: str) -> float:
    total, last = 0.0, prompt[-1]
    for token in completion:
        total, last = total + math.log(after[last] if token == "b" else 1 - after[last]), token
    return total


# (prompt, chosen, rejected), of unequal lengths, so that padding and masks matter.
PAIRS = [("ab", "ba", "aab"), ("a", "bbbba", "a"), ("bba", "b", "ab"), ("b", "abab", "bb"), ("aa", "bab", "aaaab")]


def written(
    folder: Path, weights: list[float] | None = None, count: int = len(PAIRS), columns: list[dict[str, float]] | None = None
) -> list[Path]:
    """The pairs as rows. `columns` are the numbers of each; `label` among them is the row's label."""
    numbers = columns or [{}] * count
    rows = [
        {
            "id": f"row-{number}",
            "weight": (weights or [1.0] * count)[number],
            "messages": [{"role": "user", "content": prompt}],
            **{"chosen": chosen, "chosen_ended": False, "rejected": rejected, "rejected_ended": False},
            "label": numbers[number].get("label"),
            "columns": [{"name": name, "value": value} for name, value in numbers[number].items() if name != "label"],
        }
        for number, (prompt, chosen, rejected) in enumerate(PAIRS[:count])
    ]
    shape("rows", rows).write_parquet(folder / "rows.parquet")
    return [folder / "rows.parquet"]
