"""The engine of transformers on a tiny model: proofs of weights, answers by their own seeds, and right values from a plain forward pass."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SPECIAL, WORDS, as_model, opened, save_child, say, tiny_model
from toys import chunk_of

from selfkd.backend import probe, tokens
from selfkd.backend.base import Sampling
from selfkd.backend.engine import root_model
from selfkd.backend.engine import transformers_engine as engine_module
from selfkd.backend.engine.transformers_engine import Answer, Ends, Engine, bytes_per_token
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.backend.trainer import batches
from selfkd.core.pool import Model, shape
from selfkd.errors import UsageError, WeightsError


def numerics(**changes: Any) -> dict[str, Any]:
    options = {"generator": "transformers", "threads": 1, "dtype": "float32", "max_model_len": 256, "max_num_seqs": 16}
    return fixed_numerics(Machine(**{**options, **changes}))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A root, and a child a few thousandths away from it."""
    folder = tmp_path_factory.mktemp("family")
    root = folder / "root"
    root_model.load_model({"path": str(tiny_model(folder / "source"))}, root, None)
    weights, noise = opened(root), torch.Generator().manual_seed(1)
    for tensor in weights.parameters():
        tensor.data += 0.003 * torch.randn(tensor.shape, generator=noise)
    return as_model(root), as_model(save_child(root, weights, folder / "child"))


@pytest.fixture
def engine(family: tuple[Model, Model]) -> Iterator[Engine]:
    """An engine that holds the root."""
    found = Engine(numerics(), family[0])
    found.swap(family[0])
    yield found
    found.close()


def answers(engine: Engine, folder: Path, words: list[str], number: int = 0, **sampling: Any) -> pl.DataFrame:
    """What the engine answers; `number` begins the seeds."""
    reply = engine.generate(chunk_of(folder, words, number), Sampling(**{"max_tokens": 24, **sampling}))
    return pl.read_parquet(reply.path)


# ---- weights ----


def test_a_chunk_generated_twice_is_the_same_file(engine: Engine, tmp_path: Path) -> None:
    replies = [engine.generate(chunk_of(tmp_path, WORDS), Sampling(max_tokens=24)) for _ in range(2)]
    assert replies[0].path == replies[1].path and replies[0].weights == engine.weights
    made = pl.read_parquet(replies[0].path)
    assert made.height == len(WORDS) and made["text"].n_unique() > 4 and replies[0].tokens == made["tokens"].sum() > 0


def test_a_swap_there_and_back_gives_the_first_answers_again(
    engine: Engine, family: tuple[Model, Model], tmp_path: Path
) -> None:
    root, child = family
    first = answers(engine, tmp_path, WORDS)
    there = engine.swap(child)
    other = answers(engine, tmp_path, WORDS)
    back = engine.swap(root)
    assert there["proved"] is True and back["proved"] is True and there["survived"] == pytest.approx(1, abs=0.01)
    assert answers(engine, tmp_path, WORDS)["text"].to_list() == first["text"].to_list() != other["text"].to_list()


def test_a_swap_to_the_weights_it_holds_is_free_unless_asked_for(engine: Engine, family: tuple[Model, Model]) -> None:
    assert engine.swap(family[0])["seconds"] == 0
    assert engine.swap(family[0], fresh=True)["seconds"] > 0


def test_other_weights_than_the_probe_tells_are_refused_and_nothing_is_generated_with_them(
    engine: Engine, family: tuple[Model, Model], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(family[1].path, wrong)
    tensors = load_file(wrong / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, wrong / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="does not hold"):
        engine.swap(as_model(wrong))
    with pytest.raises(WeightsError, match="no proved weights"):
        engine.generate(chunk_of(tmp_path, WORDS), Sampling())
    assert engine.swap(family[0])["proved"] is True


def test_an_engine_that_was_put_to_sleep_on_a_card_wakes_with_other_weights(
    engine: Engine, family: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.sleep()
    assert engine.weights == family[0].digest  # on a CPU there is no memory to give back
    monkeypatch.setattr(engine_module.Engine, "_load", lambda self, model, _: setattr(self, "_net", opened(Path(model.path))))
    engine.device = "cuda"
    engine.sleep()
    assert engine.weights == "" and engine._net is None
    assert engine.wake(family[1])["proved"] is True and engine.weights == family[1].digest


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that drops its weights in sleep, and on which everything is five per cent off, before an update and after it alike."""

    def load(engine: Engine, model: Model, attention: str | None) -> None:
        engine._net = opened(Path(model.path)).eval()
        engine._net.model.norm.weight.data *= 1.05

    monkeypatch.setattr(engine_module.Engine, "_load", load)


@pytest.fixture
def update(family: tuple[Model, Model], tmp_path: Path) -> tuple[Model, list[Path]]:
    """A child as far from the root as one update by preferences is, and the rows that it learned from."""
    root, rows = Path(family[0].path), [tmp_path / "rows.parquet"]
    shape("rows", [{"id": word, "messages": say(word), "chosen": f"{word}, they say"} for word in WORDS]).write_parquet(rows[0])
    weights, noise = opened(root), torch.Generator().manual_seed(1)
    embeddings = weights.get_input_embeddings().weight.data
    embeddings += 6e-4 * torch.randn(embeddings.shape, generator=noise)
    kept = batches.candidates(str(root), rows, False, 1024)
    return as_model(save_child(root, weights, tmp_path / "child", kept)), rows


def on_the_card(model: Model) -> Engine:
    engine = Engine(numerics(dtype="bfloat16"), model)
    engine.swap(model)
    engine.device = "cuda"
    return engine


def test_what_was_scored_before_the_sleep_proves_a_small_update(
    card: None, family: tuple[Model, Model], update: tuple[Model, list[Path]]
) -> None:
    engine, (child, rows) = on_the_card(family[0]), update
    earlier = engine.before_update(rows, False, 1024)
    engine.sleep()
    assert engine.wake(child)["proved"] == probe.INDISTINGUISHABLE
    engine.sleep()
    notes = engine.wake(child, earlier)
    assert (notes["proved"], notes["survived"]) == (True, pytest.approx(1, abs=0.1))
    assert earlier.weights == family[0].digest and len(earlier.scores) == len(WORDS)


def test_what_was_scored_before_the_sleep_proves_no_other_weights(
    card: None, family: tuple[Model, Model], update: tuple[Model, list[Path]], tmp_path: Path
) -> None:
    """The root once more under the child's probe, and weights from nowhere."""
    engine, (child, rows) = on_the_card(family[0]), update
    earlier = engine.before_update(rows, False, 1024)
    for name, tensors in {"stale": load_file(Path(family[0].path) / "model.safetensors"), "zero": {}}.items():
        shutil.copytree(child.path, tmp_path / name)
        found = tensors or {key: 0 * tensor for key, tensor in load_file(Path(child.path) / "model.safetensors").items()}
        save_file(found, tmp_path / name / "model.safetensors", {"format": "pt"})
        engine.sleep()
        with pytest.raises(WeightsError, match="before the swap" if tensors else "from the checkpoint's"):
            engine.wake(as_model(tmp_path / name), earlier)


# ---- answers ----


def test_without_temperature_it_writes_what_transformers_writes(
    engine: Engine, family: tuple[Model, Model], tmp_path: Path
) -> None:
    """Together in one batch, though the prompts differ in length and the answers end at different tokens."""
    tok, net = tokens.tokenizer(family[0].path), opened(Path(family[0].path))
    made = answers(engine, tmp_path, WORDS, temperature=0.0, max_tokens=40)
    for word, ids in made.select("id", "token_ids").iter_rows():
        prompt = tokens.encode_prompt(tok, say(WORDS[int(word.split("-")[1])]))
        whole = net.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=40, do_sample=False
        )
        assert ids == whole[0, len(prompt) :].tolist()


def test_log_probabilities_of_answers_and_of_rows_are_those_of_a_plain_forward_pass(engine: Engine, tmp_path: Path) -> None:
    tok, net = tokens.tokenizer(engine.model.path), opened(Path(engine.model.path))
    made = answers(engine, tmp_path, WORDS, temperature=0.7, top_k=20, extra={"logprobs": 0})
    rows = made.rename({"teacher_messages": "messages"})
    scores = engine.logprobs(rows)
    assert [score[0] for score in scores] == rows["id"].to_list()
    for row, (_, value, count) in zip(rows.iter_rows(named=True), scores, strict=True):
        prompt = tokens.encode_prompt(tok, row["messages"])
        logits = net(torch.tensor([prompt + row["token_ids"]])).logits[0].log_softmax(-1)
        by_hand = sum(logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(row["token_ids"]))
        assert (value, row["logprob"]) == (pytest.approx(by_hand, abs=1e-3), pytest.approx(by_hand, abs=1e-3))
        assert count == len(row["token_ids"])


def test_a_log_probability_that_nobody_asked_for_is_not_given(engine: Engine, tmp_path: Path) -> None:
    assert answers(engine, tmp_path, WORDS)["logprob"].null_count() == len(WORDS)


def test_an_answer_is_that_of_its_prompt_and_its_seed_whoever_is_in_the_batch(engine: Engine, tmp_path: Path) -> None:
    together = answers(engine, tmp_path, WORDS)["text"].to_list()
    engine.numerics["max_num_seqs"] = 3
    assert answers(engine, tmp_path, WORDS)["text"].to_list() == together
    assert answers(engine, tmp_path, WORDS[:1])["text"].to_list() == together[:1]
    assert answers(engine, tmp_path, WORDS, number=1)["text"].to_list() != together


def test_the_sampler_that_drew_is_the_one_that_the_run_is_fixed_to(engine: Engine) -> None:
    assert engine.facts["sampler"] == engine.numerics["sampler"] == "icdf-1"


def test_answers_that_ended_leave_the_batch(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = engine._forward
    monkeypatch.setattr(engine, "_forward", lambda step, *more: sizes.append(len(step)) or forward(step, *more))
    made = answers(engine, tmp_path, WORDS, max_tokens=100)
    lengths = made["tokens"].to_list()
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))] and min(lengths) < 100


def test_the_end_token_is_among_the_ids_where_the_model_stopped_itself(engine: Engine, tmp_path: Path) -> None:
    made = answers(engine, tmp_path, WORDS, max_tokens=100)
    assert {"stop"} < set(made["finish_reason"]) | {"length"} <= {"stop", "length"}
    for finish, ids, text in made.select("finish_reason", "token_ids", "text").iter_rows():
        assert (ids[-1] == 2) == (finish == "stop") and "</s>" not in text
        assert len(text) == sum(token >= len(SPECIAL) for token in ids)  # a character each


def test_ids_end_where_a_stop_text_ends_the_answer(engine: Engine, tmp_path: Path) -> None:
    greedy: dict[str, Any] = {"temperature": 0.0, "extra": {"logprobs": 0}}
    plain = answers(engine, tmp_path, ["hi"], **greedy)
    stop = plain["text"][0][3:5]
    cut = answers(engine, tmp_path, ["hi"], **greedy, stop=("never", stop))
    text, tok = plain["text"][0].split(stop)[0], tokens.tokenizer(engine.model.path)
    assert (cut["text"][0], cut["finish_reason"][0], cut["tokens"][0]) == (text, "stop", len(text))  # a token per character
    assert tok.decode(cut["token_ids"][0]) == text
    ((_, kept, _),) = engine.logprobs(cut.rename({"teacher_messages": "messages"}).with_columns(finish_reason=pl.lit("length")))
    assert cut["logprob"][0] == pytest.approx(kept, abs=1e-3)


def test_of_two_stop_texts_the_first_in_the_answer_ends_it_and_only_new_tokens_are_read(engine: Engine) -> None:
    tok = tokens.tokenizer(engine.model.path)
    prompt = tokens.encode_prompt(tok, say("hi"))
    ids = tok("x" * 400 + "ab", add_special_tokens=False)["input_ids"]
    ends = Ends(tok, Sampling(max_tokens=500, stop=("b", "ab")))
    assert ends.cut(prompt, ids[:-2]) is None and ends.cut(prompt, ids) == "x" * 400


def test_a_stop_text_inside_a_token_leaves_no_log_probability_of_what_nobody_drew(engine: Engine) -> None:
    tok = tokens.tokenizer(engine.model.path)
    answer = Answer([1], None, [70, 71, 72], [-1.0, -2.0, -4.0], "stop", "ab")
    assert tok.decode([70, 71, 72]) == "abc"
    assert answer.completion(tok, True).logprob == -3.0 and answer.completion(tok, False).logprob is None
    answer.text = "ax"
    assert (answer.completion(tok, True).token_ids, answer.completion(tok, True).logprob) == ([70, 93], None)


def test_special_tokens_are_in_a_text_where_they_are_asked_for_and_the_end_token_never_is(engine: Engine) -> None:
    tok = tokens.tokenizer(engine.model.path)
    answer = Answer([1], None, [70, 0, 71, 2], [-1.0] * 4, "stop")
    shown, plain = (answer.completion(tok, False, skip_special=skip) for skip in (False, True))
    assert (shown.text, plain.text) == ("a<pad>b", "ab") and shown.token_ids == plain.token_ids == [70, 0, 71, 2]
    ends = Ends(tok, Sampling(max_tokens=9, stop=("<pad>b",), extra={"skip_special_tokens": False}))
    assert ends.cut([1], [70, 0, 71]) == "a"


def test_an_answer_that_fills_the_context_is_scored_and_a_longer_prompt_is_named(engine: Engine, tmp_path: Path) -> None:
    prompt = len(tokens.encode_prompt(tokens.tokenizer(engine.model.path), say("hi")))
    row = answers(engine, tmp_path, ["hi"], max_tokens=256 - prompt).rename({"teacher_messages": "messages"})
    full = row.with_columns(token_ids=pl.lit([40] * (256 - prompt), pl.List(pl.Int32)), finish_reason=pl.lit("length"))
    assert engine.logprobs(full)[0][2] == 256 - prompt
    with pytest.raises(UsageError, match=r"the prompt 'x{60}…'  has \d+ tokens and 64 more .* holds 256"):
        engine.generate(chunk_of(tmp_path, ["hi", "x" * 190]), Sampling(max_tokens=64))


def test_a_prompt_longer_than_the_context_is_not_asked_where_it_may_be_left_out(engine: Engine, tmp_path: Path) -> None:
    asked = replace(chunk_of(tmp_path, ["x" * 190, "hi", "y" * 190]), drop_long=True)
    found = pl.read_parquet(engine.generate(asked, Sampling(max_tokens=64, temperature=0)).path).sort("number")
    assert [reason == "too long" for reason in found["finish_reason"]] == [True, False, True]
    alone = pl.read_parquet(engine.generate(chunk_of(tmp_path, ["hi"], 1), Sampling(max_tokens=64, temperature=0)).path)
    assert found["text"].to_list() == ["", alone["text"][0], ""] and found["tokens"].to_list() == [0, alone["tokens"][0], 0]


def test_progress_is_told_and_an_interrupted_chunk_is_answered_anew(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "REPORT_SECONDS", 0.0)
    told: list[tuple[int, ...]] = []
    whole = engine.generate(chunk_of(tmp_path, WORDS), Sampling(max_tokens=24), lambda *numbers: told.append(numbers))
    assert told == sorted(told) and told[-1][:2] == (len(WORDS), whole.tokens)
    assert [steps for _, _, steps in told] == list(range(len(told))) and 1 < len(told) <= 1 + 24

    def interrupt(done: int, count: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(chunk_of(tmp_path, WORDS), Sampling(max_tokens=24), interrupt)
    assert engine.generate(chunk_of(tmp_path, WORDS), Sampling(max_tokens=24)).path == whole.path


def test_each_batch_counts_its_steps_from_the_pass_that_reads_its_prompts(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that pass takes, an engine at step 0 is not taken for a hanging one."""
    monkeypatch.setitem(engine.numerics, "max_num_seqs", 1)
    told: list[tuple[int, ...]] = []
    engine.generate(chunk_of(tmp_path, WORDS[:2]), Sampling(max_tokens=3), lambda *numbers: told.append(numbers))
    assert [steps for _, _, steps in told] == [0, 0]  # within a second: only the beginnings
    monkeypatch.setattr(engine_module, "REPORT_SECONDS", 0.0)
    told.clear()
    engine.generate(chunk_of(tmp_path, WORDS[:2], 1), Sampling(max_tokens=3), lambda *numbers: told.append(numbers))
    second = [steps for _, _, steps in told].index(0, 1)
    for batch in (told[:second], told[second:]):
        assert [steps for _, _, steps in batch] == list(range(len(batch))) and len(batch) > 1


def test_words_that_only_vllm_knows_are_named_and_the_engine_lives_on(engine: Engine, tmp_path: Path) -> None:
    extra = {"logprobs": 0, "min_p": 0.1, "logit_bias": {"40": 1}}
    with pytest.raises(UsageError, match=r"sample\.vllm  the generator transformers does not know min_p, logit_bias"):
        engine.generate(chunk_of(tmp_path, WORDS), Sampling(extra=extra))
    assert answers(engine, tmp_path, WORDS).height == len(WORDS)


def test_a_batch_takes_no_more_memory_than_the_machine_file_gives(engine: Engine, tmp_path: Path) -> None:
    """Two layers, two heads of 32 for keys and for values, four bytes each: 1024 bytes a token."""
    assert bytes_per_token(engine._net.config, 4) == 2 * 2 * 2 * 32 * 4 == 1024
    made = [Answer([1] * 100, None) for _ in range(10)]
    engine.numerics["kv_cache_gb"] = 4 * 128 * 1024 / 2**30
    assert [len(batch) for batch in engine._batches(made, 28)] == [4, 4, 2]
