"""A copy in bf16 holds, bit by bit, what torch makes of the fp32 weights; all else of the folder stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.core import digest
from selfkd.core.rounding import is_rounded, round_folder, to_bf16

torch = pytest.importorskip("torch")
MATRIX = {"dtype": "F32", "shape": [2, 3]}


def bits_of(text: str) -> list[str]:
    return [f"{one:04x}" for one in to_bf16(np.array([int(text, 16)], np.uint32))]


def test_halfway_goes_to_the_even_neighbour_and_all_else_to_the_nearest() -> None:
    assert bits_of("3f808000") == ["3f80"]  # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7; 1 is even
    assert bits_of("3f818000") == ["3f82"]
    assert bits_of("3f808001") == ["3f81"]
    assert bits_of("bf807fff") == ["bf80"]
    assert bits_of("7f7fffff") == ["7f80"]  # the largest number rounds to infinity
    assert bits_of("80000001") == ["8000"]  # the smallest one to minus zero
    assert bits_of("7f800001") == ["7fc0"]  # no number stays none


def test_every_bf16_value_and_its_borders_round_as_in_torch() -> None:
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | low).ravel()
    numbers = bits[~np.isnan(bits.view(np.float32))]
    expected = torch.from_numpy(numbers.view(np.float32).copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (to_bf16(numbers) == expected).all()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_any_numbers_round_as_in_torch(values: list[float]) -> None:
    numbers = np.array(values, np.float32)
    expected = torch.from_numpy(numbers.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (to_bf16(numbers.view(np.uint32)) == expected).all()


@pytest.mark.parametrize(
    ("name", "entry", "rounded"),
    [
        ("model.layers.0.mlp.gate_proj.weight", MATRIX, True),
        ("model.layers.0.mlp.experts.gate_up_proj", {"dtype": "F32", "shape": [4, 2, 3]}, True),
        ("model.layers.0.input_layernorm.weight", {"dtype": "F32", "shape": [3]}, False),
        ("model.layers.0.mlp.gate.weight", MATRIX, False),
        ("model.layers.0.mlp.router.weight", MATRIX, False),
        ("backbone.layers.0.mixer.A_log", MATRIX, False),
        ("model.layers.0.mlp.gate_proj.weight", {"dtype": "F16", "shape": [2, 3]}, False),
        ("rotary.table", {"dtype": "I64", "shape": [2, 3]}, False),
    ],
)
def test_matrices_are_rounded_but_not_what_engines_hold_in_fp32(name: str, entry: dict, rounded: bool) -> None:
    assert is_rounded(name, entry) is rounded


def model_folder(folder: Path) -> dict:
    from safetensors.torch import save_file

    made = torch.Generator().manual_seed(1)
    tensors = {
        "layer.a.weight": torch.randn(3, 5, generator=made),  # 15 numbers of 2 bytes: what follows must begin at its own width
        "layer.norm.weight": torch.randn(7, generator=made),
        "layer.mlp.gate.weight": torch.randn(2, 3, generator=made),
        "table": torch.arange(6).view(2, 3),
    }
    folder.mkdir()
    save_file(dict(list(tensors.items())[:2]), folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(dict(list(tensors.items())[2:]), folder / "model-00002-of-00002.safetensors")
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "dtype": None}, "hidden_size": 5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 160}, "weight_map": {"table": "b"}})
    )
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool.jinja").write_text("{{ x }}")
    return tensors


def test_a_folder_is_copied_with_its_matrices_in_bf16_and_the_library_reads_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors, out = model_folder(tmp_path / "fp32"), tmp_path / "bf16"
    round_folder(tmp_path / "fp32", out)
    found = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert {name: str(tensor.dtype) for name, tensor in found.items()} == {
        "layer.a.weight": "torch.bfloat16",
        "layer.norm.weight": "torch.float32",
        "layer.mlp.gate.weight": "torch.float32",
        "table": "torch.int64",
    }
    assert all(torch.equal(tensor, tensors[name].to(tensor.dtype)) for name, tensor in found.items())
    config = json.loads((out / "config.json").read_text())
    assert config == {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "dtype": None}, "hidden_size": 5}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 2 * 15 + 4 * 7 + 4 * 6 + 8 * 6}, "weight_map": {"table": "b"}}
    assert (out / "chat_templates" / "tool.jinja").read_text() == "{{ x }}"
    assert digest.weights(out) != digest.weights(tmp_path / "fp32")


def test_a_file_that_ends_inside_a_tensor_is_an_error(tmp_path: Path) -> None:
    model_folder(tmp_path / "fp32")
    shard = tmp_path / "fp32" / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(EOFError, match="ends inside a tensor"):
        round_folder(tmp_path / "fp32", tmp_path / "bf16")
