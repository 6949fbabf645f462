"""What computes a model's attention wherever it is loaded: as a root, in training, and in the engine of transformers.

Knows configurations, no weights. Imports transformers only when called.
"""

from __future__ import annotations

from typing import Any

TORCH = "sdpa"  # torch's own: the quickest that is everywhere, in fp32 too
FORMULA = "eager"  # an architecture's own formula, with all that it says, slower and in more memory


def caps(config: Any) -> bool:
    """Whether a model caps its attention scores (Gemma 2). Torch's attention has no cap, and transformers leaves it out there without a word."""
    return bool(getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None))


def plain_attention(config: Any) -> str:
    """Return torch's attention, or the architecture's own formula where torch's computes something else, or is not written for it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return FORMULA if caps(config) or not getattr(model, "_supports_sdpa", True) else TORCH


def plain_attention_of(folder: str) -> str:
    """Return the attention of a model folder; see `plain_attention`."""
    from transformers import AutoConfig

    return plain_attention(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
