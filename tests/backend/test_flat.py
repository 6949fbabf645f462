"""Rows without padding: every architecture gives them what it gives them alone, and the head of a CPU is what the formula says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selfkd.backend.attention import plain_attention

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Grouped heads, a bias, soft caps with a window of 4, a window, experts.
FLAT = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 4},
    "gemma2": {
        **{"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
        **{"final_logit_softcapping": 5.0, "attn_logit_softcapping": 0.5, "initializer_range": 0.3},
    },
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4, "head_dim": 8},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}


def tiny(kind: str, **more: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **more)
    return AutoModelForCausalLM.from_config(config, attn_implementation=plain_attention(config)).float()


def batch() -> dict[str, Any]:
    """Three rows of 12, 7 and 1 tokens, padded on the right; the middle ones are learned."""
    import torch

    lengths, draw = (12, 7, 1), torch.Generator().manual_seed(1)
    mask = torch.tensor([[int(at < length) for at in range(12)] for length in lengths])
    ids = torch.randint(3, 50, (3, 12), generator=draw) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (torch.arange(12) < 3), -100)}


@pytest.mark.parametrize("kind", FLAT)
def test_rows_give_flat_what_they_give_padded_and_so_do_gradients(kind):
    import torch
    import trl.trainer.utils

    from selfkd.backend.trainer import flat, losses

    assert losses.flat is flat  # imported for what it changes in TRL
    model, data = tiny(kind, **FLAT[kind]), batch()
    trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    padded = model(**data, fused_lm_head=True)
    padded.log_probs.sum().backward()
    wanted = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    model.zero_grad()
    model.set_attn_implementation(flat.ROW_BY_ROW)
    found = flat.forward(model, **data)
    found.log_probs.sum().backward()
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(found[name], padded[name], rtol=1e-4, atol=1e-5)
    assert found.label_mask.equal(padded.label_mask) and found.is_top1.equal(padded.is_top1)
    for name, part in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(part.grad, wanted[name], rtol=1e-3, atol=1e-5)


def test_capped_attention_is_the_formula_in_double_precision():
    import torch

    from selfkd.backend.trainer import flat

    draw = torch.Generator().manual_seed(4)
    query, key, value = (3 * torch.randn(1, heads, 9, 8, generator=draw) for heads in (4, 2, 2))
    found, _ = flat.row_by_row(
        None, query, key, value, scaling=0.5, softcap=1.5, sliding_window=3, cu_seq_lens_q=torch.tensor([0, 4, 9])
    )
    for begin, end in ((0, 4), (4, 9)):
        for head in range(4):
            for at in range(begin, end):
                seen = range(max(begin, at - 2), at + 1)
                scores = [0.5 * query[0, head, at].double() @ key[0, head // 2, one].double() for one in seen]
                weights = torch.softmax(1.5 * torch.tanh(torch.stack(scores) / 1.5), 0)
                wanted = sum(weight * value[0, head // 2, one].double() for weight, one in zip(weights, seen, strict=True))
                torch.testing.assert_close(found[0, at, head].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["position_bias", "s_aux"])
def test_a_part_of_a_formula_that_is_not_computed_here_is_an_error(part):
    import torch

    from selfkd.backend.trainer import flat

    query = torch.randn(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match=part):
        flat.row_by_row(None, query, query, query, **{part: torch.ones(2)})


def test_attention_is_computed_in_fp32_under_autocast_too(monkeypatch):
    import torch

    from selfkd.backend.trainer import flat

    seen, inner = [], torch.nn.functional.scaled_dot_product_attention
    told = lambda query, *given, **more: seen.append(query.dtype) or inner(query, *given, **more)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", told)
    query = torch.randn(1, 2, 9, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = flat.row_by_row(None, query, query, query, cu_seq_lens_q=torch.tensor([0, 4, 9]))
        alone = inner(query[:, :, 4:].float(), query[:, :, 4:].float(), query[:, :, 4:].float(), is_causal=True)
    assert seen == [torch.float32, torch.float32] and found.dtype == torch.bfloat16
    torch.testing.assert_close(found[:, 4:], alone.transpose(1, 2).bfloat16(), rtol=0.02, atol=0.02)


def test_a_model_that_would_mix_rows_is_noticed():
    """Attention that takes no notice of borders, as that of a model whose layers carry a state would be."""
    import torch
    from transformers import AttentionInterface

    from selfkd.backend import probe
    from selfkd.backend.trainer import flat

    def blind(*arguments: Any, cu_seq_lens_q: Any = None, **more: Any) -> Any:
        return flat.row_by_row(*arguments, **more)

    AttentionInterface.register("selfkd_blind", blind)
    model = tiny("llama", num_key_value_heads=2)
    for part in model.parameters():
        part.data.mul_(3.0)
    rows = [[5, 7, 9, 11, 13], [21, 22, 23, 24, 25, 26]]
    padded = probe.token_logprobs(model, rows)
    for attention, same in ((flat.ROW_BY_ROW, True), ("selfkd_blind", False)):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            assert flat.same_as_padded(model, rows, padded) is same


@pytest.mark.parametrize(
    ("kind", "more", "flat"),
    [
        ("llama", {}, True),
        ("bloom", {}, False),  # its attention cannot be replaced
        ("gpt_oss", {"head_dim": 8, "num_key_value_heads": 2}, False),  # attends also to what is no token
        ("gemma2", {"head_dim": 8, "num_key_value_heads": 2}, True),
        ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, False),
    ],
)
def test_layers_with_a_state_are_never_fed_flat_rows(tmp_path, kind, more, flat):
    from transformers import AutoConfig

    from selfkd.backend.trainer.flat import may_be_flat

    AutoConfig.for_model(kind, **SMALL, **more).save_pretrained(tmp_path)
    assert may_be_flat(str(tmp_path), longest=100) is flat


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mixtral", {"num_local_experts": 8}),
        ("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 16}),
        ("olmoe", {"num_experts": 8}),
    ],
)
def test_experts_that_no_token_asked_have_a_gradient_too(kind, more):
    """Of zeros: ranks that wait for every gradient need not look for those that will never come."""
    import torch

    model = tiny(kind, num_key_value_heads=2, num_experts_per_tok=1, **more)
    model(input_ids=torch.tensor([[5, 6]])).logits.square().mean().backward()
    parts = dict(model.named_parameters())
    assert all(part.grad is not None for part in parts.values())
    asked = [part.grad.abs().flatten(1).sum(1) > 0 for name, part in parts.items() if "experts" in name]
    assert asked and all(0 < chosen.sum() <= 2 for chosen in asked)


def test_rows_longer_than_a_window_of_attention_are_padded(tmp_path):
    from transformers import AutoConfig

    from selfkd.backend.trainer.flat import may_be_flat

    AutoConfig.for_model("mistral", **SMALL, sliding_window=64).save_pretrained(tmp_path)
    assert may_be_flat(str(tmp_path), longest=64) and not may_be_flat(str(tmp_path), longest=65)


# The head


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_head_of_a_cpu_is_the_formula_in_double_precision(scale):
    import torch

    from selfkd.backend.trainer.cpu_head import Head

    draw = torch.Generator().manual_seed(2)
    hidden, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((9, 16), (40, 16), (40,)))
    targets, upstream = torch.randint(0, 40, (9,), generator=draw), torch.randn(9, generator=draw)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    wanted = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    found = Head.apply(*ours, targets, 1.0, 32768, None, scale, wanted)
    logits = (exact[0] @ exact[1].t() + exact[2]) * scale
    table = torch.log_softmax(logits, -1)
    picked = table[torch.arange(9), targets]
    (found[0] * upstream).sum().backward()
    (picked * upstream.double()).sum().backward()
    expected = (picked, -(table.exp() * table).sum(-1), (2 * table).logsumexp(-1), logits.mean(-1))
    for one, other in zip(found[:4], expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert found[4].equal(logits.argmax(-1) == targets)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_the_head_in_bf16_lies_no_further_from_the_formula_than_trls(monkeypatch):
    import torch

    from selfkd.backend.trainer import cpu_head

    draw = torch.Generator().manual_seed(3)
    hidden, weight, targets = torch.randn(64, 32, generator=draw), torch.randn(96, 32, generator=draw) / 4, torch.arange(64)

    def distances() -> list[float]:
        ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16):
            picked = cpu_head.Head.apply(*ours[:2], None, targets, 1.0, 32768, None, 1.0, ())[0]
        picked.sum().backward()
        exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
        torch.log_softmax(exact[0] @ exact[1].t(), -1)[torch.arange(64), targets].sum().backward()
        return [float((one.grad - other.grad).norm() / other.grad.norm()) for one, other in zip(ours, exact, strict=True)]

    found = distances()
    monkeypatch.setattr(cpu_head, "MOST_ELEMENTS", 0)
    for ours, trls in zip(found, distances(), strict=True):
        assert ours < 1.5 * trls < 0.05


def test_without_a_learned_token_the_head_gives_a_gradient_of_zero():
    import torch

    from selfkd.backend.trainer.cpu_head import Head

    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(6, 4, requires_grad=True)
    picked = Head.apply(hidden, weight, None, torch.zeros(0, dtype=torch.long), 1.0, 32768, None, 1.0, ("entropy", "is_top1"))[
        0
    ]
    picked.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_what_is_changed_in_trl_by_name_is_still_there_and_called(monkeypatch):
    """TRL's names may move with a release: then a CPU would silently take twice the time, or a cache would be hashed for nothing."""
    import torch
    import trl.trainer.dpo_trainer
    import trl.trainer.utils

    from selfkd.backend.trainer import cpu_head, losses

    called: list[str] = []
    apply = cpu_head.LabelLogProbs.apply
    monkeypatch.setattr(cpu_head.LabelLogProbs, "apply", lambda *given: called.append("head") or apply(*given))
    asked = trl.trainer.utils._use_triton
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: called.append(device.type) or asked(device))
    model, data = tiny("llama", num_key_value_heads=2), batch()
    trl.trainer.utils.add_fused_lm_head(model)
    model(**data, fused_lm_head=True)
    assert called == ["cpu", "head"]
    assert asked(torch.device("cuda")) is losses.HAS_TRITON(torch.device("cuda"))  # a card without Triton keeps TRL's own way
    assert trl.trainer.utils._ChunkedLogProbFunction is cpu_head.Head
    assert "hash_module(" in Path(trl.trainer.dpo_trainer.__file__).read_text()
    assert trl.trainer.dpo_trainer.hash_module(model) == ""
