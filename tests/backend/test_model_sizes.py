"""How large a model is, from its description alone: against counts that are known, and in words where it is not known."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from selfkd.backend import gguf_header
from selfkd.backend.model_sizes import Sizes, Unknown, of_config, parameters, sizes_of

QWEN = {
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "intermediate_size": 8960, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {
    "model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000,
}  # fmt: skip
MIXTURE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "billions"),  # as their publishers count them
    [
        (QWEN, 1.5437),
        (MISTRAL, 7.2417),
        ({**MISTRAL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}, 46.703),
        (GEMMA, 2.6143),
        (MIXTURE, 30.532),
        ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}, 0.1244),
    ],
)
def test_parameters_are_worked_out_from_the_config(config: dict[str, Any], billions: float) -> None:
    found = of_config(config)
    assert isinstance(found, Sizes)
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_sizes_of_attention_and_of_what_one_token_goes_through() -> None:
    gemma, mixture = of_config(GEMMA), of_config(MIXTURE)
    assert isinstance(gemma, Sizes) and isinstance(mixture, Sizes)
    assert (gemma.attended, gemma.kept, gemma.embedding, gemma.tied) == (2048, 1024, 589_824_000, True)
    assert (mixture.attended, mixture.kept, mixture.inner, mixture.tied) == (4096, 512, 8 * 768, False)


def test_mixtures_and_transposed_layers_do_not_fit_into_4_bits() -> None:
    kinds = {
        "gemma": GEMMA,
        "mixture": MIXTURE,
        "mistral": MISTRAL,
        "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 9},
    }
    found = {name: of_config(config) for name, config in kinds.items()}
    fit = {name for name, sizes in found.items() if isinstance(sizes, Sizes) and sizes.fits_four_bits}
    assert fit == {"gemma", "mistral"} and not any(isinstance(sizes, Unknown) for sizes in found.values())


def test_a_model_that_is_more_than_its_text_is_read_in_its_text() -> None:
    found = of_config({"model_type": "gemma3", "text_config": {**GEMMA, "model_type": "gemma3_text"}})
    assert found == of_config({**GEMMA, "model_type": "gemma3_text"})


def test_a_folder_is_counted_by_its_headers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    header = json.dumps({"a": {"dtype": "F32", "shape": [10, 20], "data_offsets": [0, 800]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    found = sizes_of({"path": str(tmp_path)})
    assert isinstance(found, Sizes) and found.parameters == 200 == parameters(str(tmp_path))


def test_what_is_not_known_is_said_with_its_reason(tmp_path: Path) -> None:
    def gated(name: str, revision: str | None) -> dict[str, Any]:
        raise OSError(f"401 for {name}@{revision}")

    found = sizes_of({"path": "meta/llama", "revision": "abc"}, gated)
    assert isinstance(found, Unknown)
    assert "the config.json of meta/llama is not here (401 for meta/llama@abc); fetch it: hf download meta/llama" in found.why
    assert sizes_of({"path": "package:no_such_package"}) == sizes_of({"path": "./no/such/folder"})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    found = sizes_of({"path": str(tmp_path)})
    assert isinstance(found, Unknown) and found.why == "its config.json does not say layers, heads, vocabulary"
    (tmp_path / "config.json").write_text("no json")
    assert isinstance(sizes_of({"path": str(tmp_path)}), Unknown)


def test_a_hub_is_asked_for_a_config_alone() -> None:
    found = sizes_of({"path": "Qwen/Qwen2.5-1.5B", "revision": None}, lambda name, revision: QWEN)
    assert isinstance(found, Sizes) and found.layers == 28


# ---- GGUF ----


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(words: dict[str, int | str | list[str] | list[float]], tensors: dict[str, tuple[int, ...]]) -> bytes:
    """The header of a GGUF file, version 3."""
    said = b""
    for name, value in words.items():
        said += text(name)
        if isinstance(value, int):
            said += struct.pack("<II", 4, value)
        elif isinstance(value, str):
            said += struct.pack("<I", 8) + text(value)
        elif isinstance(value[0], str):
            said += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(str(one)) for one in value)
        else:
            said += struct.pack("<IIQ", 9, 6, len(value)) + struct.pack(f"<{len(value)}f", *value)
    for name, sizes in tensors.items():
        said += text(name) + struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(words)) + said


def test_a_gguf_file_is_read_by_its_header(tmp_path: Path) -> None:
    words: dict[str, Any] = {
        "general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "bc", ""], "tokenizer.ggml.scores": [0.5, 1.5],
        "llama.block_count": 2, "llama.embedding_length": 64, "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
    }  # fmt: skip
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf(words, {"token_embd.weight": (64, 99), "blk.0.attn_q.weight": (64, 64)}) + b"weights")
    found = sizes_of({"path": str(file)})
    assert found == Sizes(64 * 99 + 64 * 64, 2, 64, 128, 4, 2, 16, 99, tied=True)
    file.write_bytes(file.read_bytes()[:60])
    found = sizes_of({"path": str(file)})
    assert isinstance(found, Unknown) and "ends early" in found.why
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="no GGUF file"):
        gguf_header.read(file)
    assert parameters(str(file)) is None
