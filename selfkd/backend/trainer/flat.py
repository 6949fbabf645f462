"""A micro-batch as one line of tokens: rows one behind the other, nothing padded, each row attending only to itself.

All of a model but its attention works token by token, so padding is only work there. Takes the padded batch that TRL's collators make and
gives the outputs back in that shape. Knows no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

ROW_BY_ROW = "selfkd_row_by_row"  # the name under which transformers finds `row_by_row`
PLAIN_LAYERS = {"full_attention", "sliding_attention"}  # others carry a state from token to token, over the border of two rows
SAME = 1e-3  # nats: two ways to compute attention in fp32 differ by 1e-5, a row that sees its neighbour by 0.1 and more
NOT_COMPUTED = (
    "position_bias",
    "s_aux",
)  # of the parts that transformers hands to attention: ALiBi's, and the sinks of gpt-oss
PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


def row_by_row(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Return causal attention, of each row of a flat batch on itself; transformers' interface for attention.

    A part of a model's formula that is not computed here is an error, not left out. Without borders the tensors are a batch padded on
    the right, where what follows a token cannot change it: no mask is needed.
    In fp32 also under autocast: backward in bf16 takes a CPU three times as long for rows of 80 to 170 tokens, and no less for 400.
    """
    if unknown := [name for name in NOT_COMPUTED if more.get(name) is not None]:
        raise NotImplementedError(f"attention with {unknown[0]}")
    kind, query, key, value = query.dtype, query.float(), key.float(), value.float()
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        rows = zip(queries, keys, values, strict=True)
        found = [_attend(*row, dropout, scaling, sliding_window, softcap) for row in rows]
    return torch.cat([row.transpose(1, 2) for row in found], dim=1).to(kind), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
    cap: float | None,
) -> torch.Tensor:
    length, shared = query.shape[2], query.shape[1] // key.shape[1]
    narrow = window is not None and length > window
    if cap is not None:
        return _attend_capped(query, key, value, dropout, scaling, _seen(length, window, query.device), cap)
    mask = _seen(length, window, query.device) if narrow else None
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=shared > 1
    )


def _attend_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    seen: torch.Tensor,
    cap: float,
) -> torch.Tensor:
    """Return attention whose scores never leave (-cap, cap), by the formula of Gemma 2 (arXiv 2408.00118); torch's own has no cap."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = torch.softmax((cap * torch.tanh(scores / cap)).masked_fill(~seen, -torch.inf), -1)
    return torch.nn.functional.dropout(weights, dropout) @ value


def _seen(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return which tokens of a row each of its tokens sees: those before it and itself, as far back as a window reaches."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() if window is None else ones.tril() & ones.triu(1 - window)


AttentionInterface.register(ROW_BY_ROW, row_by_row)


def may_be_flat(folder: str, longest: int) -> bool:
    """Whether a model's attention can be replaced and none of its layers carries a state, as far as its configuration says.

    A window shorter than the `longest` row needs padding: some models pass it in the mask only, which `row_by_row` is not given.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    text = config.get_text_config()
    if longest > (getattr(text, "sliding_window", None) or longest):
        return False
    kinds = getattr(text, "layer_types", None) or PLAIN_LAYERS
    model = AutoModelForCausalLM._model_mapping.get(type(config), None)
    replaceable = getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)
    return set(kinds) <= PLAIN_LAYERS and bool(replaceable)


def is_varlen(attention: str) -> bool:
    """Whether an implementation of attention keeps the rows of a flat batch apart by their borders, on a card."""
    return "flash" in attention


def same_as_padded(model: Any, sequences: Sequence[Sequence[int]], padded: Sequence[Sequence[float]]) -> bool:
    """Whether a model gives flat rows the log-probabilities that it gave them padded: the proof that it can be fed so."""
    device = next(model.parameters()).device
    ids = torch.tensor([token for row in sequences for token in row], device=device)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **_borders([len(row) for row in sequences], device)).logits[0].float()
    table, start = torch.log_softmax(logits, -1), 0
    for row, known in zip(sequences, padded, strict=True):
        found = table[start : start + len(row) - 1].gather(-1, torch.tensor(row[1:], device=device)[:, None])[:, 0].cpu()
        if not torch.allclose(found, torch.tensor(known), rtol=0.0, atol=SAME):
            return False
        start += len(row)
    return True


def forward(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, **more: Any) -> Any:
    """Return what TRL's output head gives for a padded batch, computed without its padding."""
    real = attention_mask.bool()
    following = torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    borders = _borders(attention_mask.sum(1).tolist(), input_ids.device)
    flat = {"input_ids": input_ids[real][None], "shift_labels": following[real][None], **borders}
    outputs = model(**{**more, **flat, "fused_lm_head": True})
    fields = {name: _padded(outputs[name], real) for name in PER_TOKEN if outputs.get(name) is not None}
    return type(outputs)(**{**outputs, **fields})


def _padded(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return values of a flat batch in the shape of the padded one, zero where there was padding, without the last position."""
    return values.new_zeros(real.shape).masked_scatter(real, values[0])[:, :-1]


def _borders(lengths: Sequence[int], device: Any) -> dict[str, Any]:
    """Return what models and kernels are told of the rows of a flat batch."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    longest = max(lengths)
    return {
        **{"position_ids": positions, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
        **{"max_length_q": longest, "max_length_k": longest},
    }
