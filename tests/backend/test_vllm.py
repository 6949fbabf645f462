"""The real vLLM on a tiny model: proofs of weights and canonical chunks.

Measured for the limits in selfkd/backend/probe.py (root mean square over the probe's tokens, engine against transformers in fp32):
tiny model fp32 4e-7, SmolLM2-135M fp32 1e-5 to 3e-5, SmolLM2-135M bf16 0.06 to 0.10.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WORDS, as_model, on_the_grid, opened, save_child, say, tiny_model

from selfkd.backend import probe, tokens
from selfkd.backend.base import REQUESTS, Chunk, Sampling
from selfkd.backend.engine import lots, root_model, vllm
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import UsageError, WeightsError


def numerics(**changes: Any) -> dict[str, Any]:
    options = {"threads": 1, "dtype": "float32", "kv_cache_gb": 0.05, "max_model_len": 256, "max_num_seqs": 16}
    return fixed_numerics(Machine(**{**options, **changes}))


def chunk(folder: Path, words: list[str], key: str = "k") -> Chunk:
    rows = [
        {
            "id": f"s-{text}",
            "prompt": text,
            "number": 0,
            "seed": digest.seed("test", text),
            "tiebreak": 0.5,
            "teacher_messages": say(text),
        }
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


def test_a_chunk_that_follows_is_begun_before_it_is_asked_and_each_request_enters_once(
    engine: vllm.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[int] = []
    enter = engine._lots.enter
    monkeypatch.setattr(engine._lots, "enter", lambda prompts, *more: entered.append(len(prompts)) or enter(prompts, *more))
    first, second = chunk(tmp_path, WORDS), chunk(tmp_path, WORDS[:3], "other")
    sampling = Sampling(max_tokens=64)
    alone = [pl.read_parquet(engine.generate(one, sampling).path)["text"].to_list() for one in (first, second)]
    monkeypatch.setattr(engine, "_encoder", Immediately())
    replies = [engine.generate(first, sampling, following=second)]
    assert engine._ahead is not None and entered == [len(WORDS), 3, len(WORDS), 3]
    replies.append(engine.generate(second, sampling))
    assert entered == [len(WORDS), 3, len(WORDS), 3] and engine._ahead is None
    assert [pl.read_parquet(reply.path)["text"].to_list() for reply in replies] == alone  # in fp32 on this model


def test_a_chunk_that_was_begun_leaves_nothing_behind_where_something_else_is_asked(
    engine: vllm.Engine, family: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = chunk(tmp_path, WORDS), chunk(tmp_path, WORDS[:3], "other")
    monkeypatch.setattr(engine, "_encoder", Immediately())
    engine.generate(first, Sampling(max_tokens=8), following=second)
    assert engine.llm.llm_engine.has_unfinished_requests() or engine._ahead
    engine.swap(family[1])
    assert not engine.llm.llm_engine.has_unfinished_requests() and engine._ahead is None


class Immediately:
    """An executor whose work is done when it was handed in."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


def test_the_end_token_is_among_the_ids_where_the_model_stopped_itself(engine: vllm.Engine, tmp_path: Path) -> None:
    answers = pl.read_parquet(engine.generate(chunk(tmp_path, WORDS * 1), Sampling(max_tokens=100)).path)
    assert set(answers["finish_reason"]) <= {"stop", "length"} and "stop" in set(answers["finish_reason"])
    for finish, ids, text in answers.select("finish_reason", "token_ids", "text").iter_rows():
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
    rows = rows.with_columns(pl.lit(None, pl.List(pl.Int32)).alias("token_ids"), finish_reason=pl.lit("stop"))
    for (name, value, count), text in zip(engine.logprobs(rows), rows["text"], strict=True):
        prompt, completion = tokens.encode_prompt(tok, say(name)), tokens.encode_completion(tok, text)
        expected = probe.token_logprobs(weights, [prompt + completion])[0][-len(completion) :]
        assert count == len(completion) and value == pytest.approx(sum(expected), abs=1e-4 * count)


def test_log_probabilities_asked_for_while_sampling_are_those_of_scoring(engine: vllm.Engine, tmp_path: Path) -> None:
    answers = pl.read_parquet(engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24, extra={"logprobs": 0})).path)
    scored = engine.logprobs(answers.rename({"teacher_messages": "messages"}))
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


def test_weights_whose_proof_failed_are_loaded_anew_though_they_have_the_same_digest(
    engine: vllm.Engine, family: tuple[Model, Model], tmp_path: Path
) -> None:
    bad = damaged(family[1], tmp_path / "bad", lambda tensors: tensors["model.norm.weight"].zero_())
    refused(engine, bad, tmp_path, "does not hold")
    engine.swap(family[1])  # the folder was restored from a copy
    assert engine.weights == family[1].digest


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
    monkeypatch.setattr(lots, "REPORT_SECONDS", 0.0)
    seen: list[tuple[int, int, int]] = []
    whole = engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24), lambda *counts: seen.append(counts))
    assert seen == sorted(seen) and seen[-1] == (len(WORDS), whole.tokens, 24)
    assert [steps for _, _, steps in seen] == list(range(1, 25))  # the first makes a token too

    def interrupt(done: int, count: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24), interrupt)
    assert engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24)).path == whole.path


def test_an_engine_on_a_cpu_says_that_our_sampler_drew(engine: vllm.Engine) -> None:
    assert engine.facts["sampler"] == numerics()["sampler"] == "icdf-1"
    assert engine.facts["sequences"] == 16 and engine.facts["batch_tokens"] == 4096 and engine.facts["kv_blocks"] > 0


def test_answers_without_chance_are_those_of_any_sampler(
    engine: vllm.Engine, family: tuple[Model, Model], tmp_path: Path
) -> None:
    greedy = pl.read_parquet(engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24, temperature=0.0)).path)
    one = pl.read_parquet(engine.generate(chunk(tmp_path, WORDS, "k2"), Sampling(max_tokens=24, top_k=1)).path)
    assert greedy["text"].to_list() == one["text"].to_list()


def test_filters_leave_no_other_token_to_draw(engine: vllm.Engine, tmp_path: Path) -> None:
    """Each answer is scored again: with top_k 3 every token is one of the three likeliest."""
    extra = {"logprobs": 3}
    answers = pl.read_parquet(
        engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24, top_k=3, top_p=0.95, extra=extra)).path
    )
    weights = opened(Path(engine.model.path))
    tok = tokens.tokenizer(engine.model.path)
    for messages, ids in answers.select("teacher_messages", "token_ids").iter_rows():
        prompt = tokens.encode_prompt(tok, messages)
        with torch.no_grad():
            logits = weights(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        likeliest = logits.topk(3).indices
        assert all(one in three for one, three in zip(ids, likeliest.tolist(), strict=True))


def test_a_prompt_longer_than_the_context_is_named_and_nothing_is_generated(engine: vllm.Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the prompt 'x{60}…'  has \d+ tokens and 64 more .* holds 256"):
        engine.generate(chunk(tmp_path, ["hi", "x" * 190]), Sampling(max_tokens=64))
    assert not (tmp_path / "data").exists()


def test_a_prompt_longer_than_the_context_is_not_asked_where_it_may_be_left_out(engine: vllm.Engine, tmp_path: Path) -> None:
    asked = replace(chunk(tmp_path, ["x" * 190, "hi", "y" * 190]), drop_long=True)
    found = pl.read_parquet(engine.generate(asked, Sampling(max_tokens=64, temperature=0)).path)
    assert [reason == "too long" for reason in found["finish_reason"]] == [True, False, True]
    alone = pl.read_parquet(engine.generate(chunk(tmp_path, ["hi"], key="l"), Sampling(max_tokens=64, temperature=0)).path)
    assert found["text"].to_list() == ["", alone["text"][0], ""] and found["tokens"].to_list() == [0, alone["tokens"][0], 0]


def test_a_chunk_of_which_nothing_fits_is_answered_without_a_step(engine: vllm.Engine, tmp_path: Path) -> None:
    asked = replace(chunk(tmp_path, ["x" * 190]), drop_long=True)
    following = replace(chunk(tmp_path, ["y" * 190], key="l"), drop_long=True)
    for one, then in ((asked, following), (following, None)):
        reply = engine.generate(one, Sampling(max_tokens=64), following=then)
        assert pl.read_parquet(reply.path)["finish_reason"].to_list() == ["too long"]


def test_ids_end_where_a_stop_text_ends_the_answer_and_the_end_token_comes_once(engine: vllm.Engine, tmp_path: Path) -> None:
    greedy = {"max_tokens": 24, "temperature": 0.0, "extra": {"logprobs": 0}}
    plain = pl.read_parquet(engine.generate(chunk(tmp_path, ["hi"]), Sampling(**greedy)).path)
    stop = plain["text"][0][3:5]
    cut = pl.read_parquet(engine.generate(chunk(tmp_path, ["hi"]), Sampling(**greedy, stop=(stop,))).path)
    text, tok = plain["text"][0].split(stop)[0], tokens.tokenizer(engine.model.path)
    assert (cut["text"][0], cut["finish_reason"][0], cut["tokens"][0]) == (text, "stop", len(text))  # a token per character
    assert tok.decode(cut["token_ids"][0]) == text
    assert tok.decode(tokens.encode_completion(tok, text, cut["token_ids"][0])) == f"{text}</s>"
    rows = cut.rename({"teacher_messages": "messages"})
    ((_, whole, count),) = engine.logprobs(rows)
    ((_, kept, _),) = engine.logprobs(rows.with_columns(finish_reason=pl.lit("length")))
    assert count == len(text) + 1 and whole < kept == pytest.approx(cut["logprob"][0], abs=1e-3)


def test_an_answer_that_fills_the_context_is_scored(engine: vllm.Engine, tmp_path: Path) -> None:
    prompt = len(tokens.encode_prompt(tokens.tokenizer(engine.model.path), say("hi")))
    sampling = Sampling(max_tokens=256 - prompt, extra={"logprobs": 0, "bad_words": ["</s>"], "min_tokens": 256 - prompt})
    answers = pl.read_parquet(engine.generate(chunk(tmp_path, ["hi"]), sampling).path)
    assert answers.row(0, named=True)["tokens"] == 256 - prompt and answers["finish_reason"][0] == "length"
    ((_, value, count),) = engine.logprobs(answers.rename({"teacher_messages": "messages"}))
    assert count == 256 - prompt and value == pytest.approx(answers["logprob"][0], abs=0.01)


def test_a_stop_text_inside_a_token_leaves_no_log_probability_of_what_nobody_drew(engine: vllm.Engine) -> None:
    tok, drawn = tokens.tokenizer(engine.model.path), {70: -1.0, 71: -2.0, 72: -4.0}
    entries = [{token: SimpleNamespace(logprob=value)} for token, value in drawn.items()]
    answer = {"token_ids": list(drawn), "logprobs": entries, "cumulative_logprob": -7.0, "finish_reason": "stop"}
    asked = SimpleNamespace(skip_special_tokens=True)

    def completed(text: str) -> tuple[list[int], float | None]:
        output = SimpleNamespace(prompt_token_ids=[1], outputs=[SimpleNamespace(**answer, text=text, stop_reason="x")])
        found = vllm._completion(tok, output, asked)
        return list(found.token_ids), found.logprob

    assert tok.decode(list(drawn)) == "abc"
    assert completed("ab") == ([70, 71], -3.0) and completed("") == ([], 0)
    assert completed("ax") == ([70, 93], None)


def test_words_for_vllm_are_converted_from_plain_values(engine: vllm.Engine, tmp_path: Path) -> None:
    extra = {"structured_outputs": {"choice": ["yes", "no"]}, "logit_bias": {"40": 1}}
    answers = pl.read_parquet(engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=24, extra=extra)).path)
    assert set(answers["text"]) <= {"yes", "no"} and answers["finish_reason"].unique().to_list() == ["stop"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"temprature": 0.5}, r"sample\.vllm\.temprature  vllm has no field 'temprature' here\. Did you mean 'temperature'\?"),
        ({"seed": 1}, r"sample\.vllm\.seed  vllm\.seed is not passed on: each answer has a seed"),
        ({"n": 4}, r"sample\.vllm\.n  vllm\.n is not passed on"),
        ({"stop_token_ids": [2]}, r"sample\.vllm\.stop_token_ids  .*is not passed on"),
        ({"min_p": "high"}, r"sample\.vllm\.min_p  .*should be a number, not 'high'"),
        ({"min_p": 7}, r"sample\.vllm\.min_p  .*at most 1"),
        ({"min_tokens": 9}, r"sample\.vllm\.min_tokens  vLLM refuses it: .*max_tokens=4, got 9"),
        ({"logit_bias": {"a": 1}}, r"sample\.vllm\.logit_bias  vLLM refuses it: .*valid integer.* not 'a'"),
        ({"structured_outputs": {"chioce": ["a"]}}, r"sample\.vllm\.structured_outputs  .*Did you mean 'choice'"),
        ({"structured_outputs": {"regex": "("}}, r"sample\.vllm\.?.*structured_outputs"),
        ({"allowed_token_ids": [10**6]}, r"sample\.vllm\.allowed_token_ids  "),
    ],
)
def test_what_vllm_does_not_take_is_named_and_the_engine_lives_on(
    engine: vllm.Engine, tmp_path: Path, extra: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=4, extra=extra))
    assert engine.generate(chunk(tmp_path, WORDS), Sampling(max_tokens=4)).tokens > 0


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


def test_a_run_that_was_made_before_there_was_our_sampler_keeps_vllms(tmp_path: Path) -> None:
    root_model.load_model({"path": str(tiny_model(tmp_path / "source"))}, tmp_path / "root", None)
    root, said, texts = as_model(tmp_path / "root"), [], []
    older = {name: value for name, value in numerics().items() if name != "sampler"}
    for words in (older, numerics()):
        engine = vllm.Engine(words, root)
        engine.swap(root)
        made = engine.generate(chunk(tmp_path / str(len(said)), WORDS), Sampling(max_tokens=24))
        said.append(engine.facts["sampler"])
        texts.append(pl.read_parquet(made.path)["text"].to_list())
        engine.close()
    assert said == ["Sampler.forward_cpu", "icdf-1"] and texts[0] != texts[1]


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
