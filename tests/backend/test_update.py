"""The trainer on a model that fits in a test: what it learns, what it refuses, that it repeats, and that ranks change nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from architectures import architecture
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from tiny import opened, tiny_model
from updates import FAST, UNEVEN, update, write_rows

from selfkd.backend import tokens
from selfkd.backend.base import Trained, TrainSpec
from selfkd.backend.trainer import batches, trl_options
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import GuardError, UsageError


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny_model(tmp_path_factory.mktemp("tiny"))
    return Model("policy", str(folder), digest.weights(folder))


# What is learned


def test_a_row_has_one_beginning_and_learns_its_end(start):
    tok = tokens.tokenizer(start.path)
    messages = [{"role": "user", "content": "hello"}]
    row = batches.encode(
        tok, {"id": "a", "weight": None, "messages": messages, **completion("hi"), **completion("", "rejected")}, False
    )
    fields = batches.collator_record(row, 1.0, False)
    assert fields["input_ids"].count(tok.bos_token_id) == 1
    assert fields["input_ids"][-1] == fields["labels"][-1] == tok.eos_token_id
    assert tok.decode([token for token in fields["labels"] if token != -100]) == "hi</s>"
    cut = batches.encode(tok, {"id": "a", "weight": None, "messages": messages, **completion("hi", ended=False)}, False)
    assert cut.chosen.tolist() == row.chosen.tolist()[:-1]


def completion(text: str, side: str = "chosen", ended: bool = True) -> dict[str, Any]:
    return {side: text, f"{side}_ids": None, f"{side}_ended": ended}


def test_sampled_ids_are_learned_as_they_are(start):
    tok = tokens.tokenizer(start.path)
    record = {"id": "a", "weight": 1.0, "messages": [{"role": "user", "content": "x"}]}
    sampled = {"chosen": "ab", "chosen_ids": [40, 41, 2], "chosen_ended": True}
    assert batches.encode(tok, {**record, **sampled}, False).chosen.tolist() == [40, 41, 2]


def test_an_answer_that_a_stop_string_ended_is_learned_and_scored_with_one_end_token(start):
    """vLLM draws no end token there; its ids end where the text ends."""
    tok = tokens.tokenizer(start.path)
    record = {"id": "a", "weight": 1.0, "messages": [{"role": "user", "content": "x"}]}
    sampled = {"chosen": "ab", "chosen_ids": [70, 71], "chosen_ended": True}
    assert batches.encode(tok, {**record, **sampled}, False).chosen.tolist() == [70, 71, 2]
    assert tok.decode([70, 71, 2]) == "ab</s>"


def test_a_gold_answer_that_names_the_end_token_is_learned_as_text(start):
    tok = tokens.tokenizer(start.path)
    record = {"id": "a", "weight": 1.0, "messages": [{"role": "user", "content": "x"}]}
    learned = batches.encode(tok, {**record, **completion("</s> ends")}, False).chosen.tolist()
    assert learned.count(2) == 1 and learned[-1] == 2 and tok.decode(learned) == "</s> ends</s>"


@pytest.fixture(scope="module")
def taught(start: Model, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("taught")
    reported: list[dict[str, Any]] = []
    trl = {"learning_rate": 5e-3, "num_train_epochs": 25}
    found = update(start, write_rows(folder, 4), folder / "out", trl=trl, precision="bf16", on_progress=reported.append)
    (folder / "reported.json").write_text(json.dumps(reported))
    return found


def test_auto_computes_in_what_the_run_chose_and_says_so(start, tmp_path):
    rows = write_rows(tmp_path, 4)
    found = {
        (word, chosen): update(
            start, rows, tmp_path / f"{word}-{chosen}", precision=word, numerics={"precision": chosen} if chosen else {}
        )
        for word, chosen in (("auto", "fp32"), ("auto", "bf16"), ("auto", ""), ("fp32", "bf16"))
    }
    assert [one.metrics["precision"] for one in found.values()] == ["fp32", "bf16", "bf16", "fp32"]
    digests = [digest.weights(one.folder) for one in found.values()]
    assert digests[0] == digests[3] != digests[1] == digests[2]


def test_what_an_update_says_of_itself_can_be_recorded(taught):
    """TRL logs an entropy of SFT that is not computed here: NaN, which no record may hold."""
    assert digest.of(dict(taught.metrics))
    assert "entropy_first" not in taught.metrics


def test_answers_and_their_end_are_learned(start, taught):
    import torch
    from transformers import AutoModelForCausalLM

    assert taught.metrics["loss_last"] < 0.2 < taught.metrics["loss_first"]
    tok = tokens.tokenizer(start.path)
    prompt = tokens.encode_prompt(tok, [{"role": "user", "content": "2 + 1 = ?"}])
    model = AutoModelForCausalLM.from_pretrained(taught.folder)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, len(prompt) :]
    assert tok.decode(answer) == "Answer: 3</s>"


def test_progress_is_reported_after_each_step(taught):
    reported = json.loads((taught.folder.parent / "reported.json").read_text())
    assert [entry["step"] for entry in reported] == list(range(1, 26))
    assert reported[-1].keys() == {"step", "steps", "loss", "tokens", "seconds"}
    assert (reported[-1]["steps"], reported[-1]["tokens"]) == (25, taught.metrics["tokens"])


def test_the_child_is_its_parent_but_for_the_weights(start, taught):
    parent, child = Path(start.path), taught.folder
    assert {path.name for path in child.iterdir()} == {path.name for path in parent.iterdir()} | {"probe.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (child / name).read_bytes() == (parent / name).read_bytes()
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (parent, child))
    assert new == {**old, "dtype": "float32"}
    assert digest.weights(child) != digest.weights(parent)


def test_a_child_has_every_text_of_its_parent_that_a_digest_of_weights_covers(start, tmp_path):
    from selfkd.backend.trainer import checkpoint

    parent, child = Path(shutil.copytree(start.path, tmp_path / "parent")), tmp_path / "child"
    texts = ("merges.txt", "spiece.model", "qwen.tiktoken", "chat_templates/tools.jinja", "tokenizer.json")
    (parent / "chat_templates").mkdir()
    for name in texts[:4]:
        (parent / name).write_text(f"that of {name}")
    checkpoint.write(opened(parent), parent, child)
    assert [(child / name).read_bytes() for name in texts] == [(parent / name).read_bytes() for name in texts]
    assert digest.weights(child) == digest.weights(parent)  # the same tensors, and all the texts


def test_the_probe_tells_parent_from_child(start, taught):
    import torch
    from transformers import AutoModelForCausalLM

    from selfkd.backend.probe import read_probe, token_logprobs

    found = read_probe(taught.folder)
    assert found.parent == start.digest
    for folder, recorded in ((start.path, found.before), (taught.folder, found.child)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        scored = [value for row in token_logprobs(model, found.ids) for value in row]
        assert scored == pytest.approx(recorded.tolist(), abs=1e-4)


def test_a_probe_keeps_of_the_candidates_that_an_engine_can_score_before_it_sleeps(start, taught):
    from selfkd.backend.probe import read_probe

    drawn = batches.candidates(start.path, [taught.folder.parent / "rows.parquet"], False, 1024)
    kept = read_probe(taught.folder).ids
    assert kept and all(ids in drawn for ids in kept)


def test_what_the_update_did_is_measured(taught):
    import torch
    from safetensors.torch import load_file

    metrics = taught.metrics
    assert metrics["steps"] == 25 and metrics["rows"] == 4 and metrics["epochs"] == 25
    assert metrics["update_norm"] > 0 and 0 < metrics["update_ratio"] < 1
    assert json.dumps(metrics, allow_nan=False) and "entropy_first" not in metrics  # nobody computes one for likelihood
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
    weights = load_file(taught.folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_dpo_widens_the_margin(start, tmp_path):
    trl = {"learning_rate": 1e-3, "num_train_epochs": 4}
    metrics = update(start, write_rows(tmp_path), tmp_path / "out", "dpo", trl=trl).metrics
    assert metrics["rewards/margins_first"] == pytest.approx(0, abs=1e-4)
    assert metrics["rewards/margins_last"] > 0.1 and metrics["rewards/accuracies_last"] == 1.0
    assert metrics["loss_last"] < metrics["loss_first"]


def test_log_probabilities_of_given_answers_are_those_of_the_model(start):
    import torch
    from transformers import AutoModelForCausalLM

    from selfkd.backend.trainer.said import sequence_logprobs

    messages = [{"role": "user", "content": "say"}]
    asked = [("one", "yes", None), ("two", "a longer answer", None), ("three", "no", [80, 81, 2])]
    rows = [{"id": name, "messages": messages, "text": text, "token_ids": ids} for name, text, ids in asked]
    rows = pl.DataFrame(rows).with_columns(finish_reason=pl.lit("stop"))
    tok, model = tokens.tokenizer(start.path), AutoModelForCausalLM.from_pretrained(start.path)
    prompt = tokens.encode_prompt(tok, messages)
    for (name, value, count), (asked_name, text, ids) in zip(sequence_logprobs(Path(start.path), rows, {"threads": 1}), asked):
        answer = ids or tokens.encode_completion(tok, text)
        with torch.no_grad():
            table = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0], -1)
        expected = sum(table[len(prompt) + at - 1, token].item() for at, token in enumerate(answer))
        assert (name, count) == (asked_name, len(answer))
        assert value == pytest.approx(expected, abs=1e-4)


def test_what_spreads_tokens_over_experts_is_added_to_the_loss(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = architecture("qwen3_moe", tmp_path / "source")
    experts, rows = Model("policy", str(folder), digest.weights(folder)), write_rows(tmp_path, 1)
    losses = [
        update(experts, rows, tmp_path / "out", precision="fp32", trl={**FAST, "router_aux_loss_coef": share}).metrics[
            "loss_first"
        ]
        for share in (0.0, 0.5)
    ]
    tok, model = tokens.tokenizer(str(folder)), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = [*tokens.encode_prompt(tok, [{"role": "user", "content": "0 + 1 = ?"}]), *tokens.encode_completion(tok, "Answer: 1")]
    with torch.no_grad():
        spread = model(input_ids=torch.tensor([ids]), output_router_logits=True).aux_loss.item()
    assert losses[1] - losses[0] == pytest.approx(0.5 * spread, rel=1e-3) and spread > 1


def test_a_loss_for_experts_is_refused_where_there_are_none(start, tmp_path):
    with pytest.raises(UsageError, match="llama is none that tells of its router") as error:
        update(start, write_rows(tmp_path), tmp_path / "out", trl={"router_aux_loss_coef": 0.1})
    assert error.value.where == "train.trl.router_aux_loss_coef"


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Any]:
    """Return a list that fills with the arguments of each call of a function from now on."""
    calls, inner = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **more: calls.append(given) or inner(*given, **more))
    return calls


def test_a_prompt_that_many_rows_share_is_encoded_once(start, tmp_path, monkeypatch):
    calls = counted(monkeypatch, tokens, "encode_prompt")
    rows = pl.read_parquet(write_rows(tmp_path, 6)[0])
    first, other = ([{"role": "user", "content": text}] for text in ("one", "two"))
    shared = pl.Series("messages", [first, other] * 3, rows.schema["messages"])
    rows.with_columns(shared).write_parquet(tmp_path / "rows.parquet")
    found, _ = batches.read_rows(tokens.tokenizer(start.path), [tmp_path / "rows.parquet"], False, 1024)
    assert [messages for _, messages in calls] == [first, other]
    assert found[0].prompt.tolist() == found[2].prompt.tolist() != found[1].prompt.tolist()


def test_a_reference_that_is_the_start_is_loaded_once_and_gives_the_same_bits(start, tmp_path, monkeypatch):
    from selfkd.backend.trainer import opened
    from selfkd.backend.trainer import update as module

    twin = Model("policy", shutil.copytree(start.path, tmp_path / "twin"), "another digest")
    spec = TrainSpec("dpo", 3, precision="bf16", trl=FAST)
    found = {}
    for name, reference, loads in (("same", start, 1), ("apart", twin, 2)):
        calls = counted(monkeypatch, opened, "load")
        done = module.train_rank(start, reference, write_rows(tmp_path), spec, tmp_path / name, {"threads": 1})
        assert len(calls) == loads
        monkeypatch.undo()
        found[name] = (digest.weights(done.folder), done.metrics["loss_first"], done.metrics["logps/chosen_last"])
    assert found["same"] == found["apart"]


def test_a_reference_model_lies_in_bf16_where_its_products_are_computed_in_it_and_scores_the_same(start, tmp_path, monkeypatch):
    import torch

    from selfkd.backend.trainer import losses, opened
    from selfkd.backend.trainer import update as module

    twin = Model("policy", shutil.copytree(start.path, tmp_path / "twin"), "another digest")
    inner, seen = losses.completion_logprobs, []

    def look(model: Any, *more: Any) -> list[float]:
        linear = {str(part.weight.dtype) for part in model.model.layers.modules() if isinstance(part, torch.nn.Linear)}
        seen.append((linear, inner(model, *more)))
        return seen[-1][1]

    monkeypatch.setattr(losses, "completion_logprobs", look)
    for precision, rounds in (("bf16", True), ("bf16", False), ("fp32", True)):
        if not rounds:
            monkeypatch.setattr(opened, "round_linear_weights", lambda model: None)
        spec = TrainSpec("dpo", 3, precision=precision, trl=FAST)
        module.train_rank(start, twin, write_rows(tmp_path), spec, tmp_path / "out", {"threads": 1})
    (first, rounded), (second, whole), (third, in_fp32) = seen
    assert (first, second, third) == ({"torch.bfloat16"}, {"torch.float32"}, {"torch.float32"})
    assert rounded == whole != in_fp32


@pytest.mark.parametrize("is_flat", [False, True])
def test_each_distinct_side_is_scored_once_in_batches_by_tokens(start, monkeypatch, is_flat):
    import numpy as np

    from selfkd.backend.trainer import flat, losses

    model = opened(Path(start.path))
    if is_flat:
        model.set_attn_implementation(flat.ROW_BY_ROW)
    sides = [(np.array([1, 40, 41], np.int32), np.arange(50, 50 + n, dtype=np.int32)) for n in (5, 2, 9, 5, 2, 20)]
    alone = [losses.completion_logprobs(model, [side], False, is_flat)[0] for side in sides]
    calls = counted(monkeypatch, losses, "_sums")
    monkeypatch.setitem(losses.REFERENCE_TOKENS, "cpu", 20)
    assert losses.completion_logprobs(model, sides, False, is_flat) == pytest.approx(alone, rel=1e-4)
    assert [[len(side) for _, side in pairs] for _, pairs, *_ in calls] == [[2, 5], [9], [20]]


def test_a_loss_takes_of_a_machine_what_it_knows():
    machine = {"gradient_checkpointing": True, "disable_dropout": False, "padding_free": True, "attn_implementation": "sdpa"}
    assert trl_options.for_loss("sft", machine) == {"gradient_checkpointing": True, "padding_free": True}
    assert trl_options.for_loss("dpo", machine) == {"gradient_checkpointing": True, "disable_dropout": False}


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_padded_batches_teach_what_flat_ones_teach(start, tmp_path, loss):
    """A machine that names an attention gets it, on padded batches; 12 rows of three lengths, weights and all."""
    from selfkd.backend.trainer.update import train_rank

    rows = pl.read_parquet(write_rows(tmp_path)[0]).with_columns(weight=pl.int_range(1, 13).cast(pl.Float64))
    rows.write_parquet(tmp_path / "rows.parquet")
    found = {}
    for name, machine in (
        ("flat", {}),
        ("padded", {"attn_implementation": "sdpa"}),
        ("eager", {"attn_implementation": "eager"}),
    ):
        numerics = {"threads": 1, "trainer": machine}
        spec = TrainSpec(loss, 3, trl=FAST)
        found[name] = train_rank(start, start, [tmp_path / "rows.parquet"], spec, tmp_path / name, numerics).metrics
    assert [one["padding_free"] for one in found.values()] == [True, False, False]
    for other in ("padded", "eager"):
        for what in ("loss_first", "loss_last", "tokens", "grad_norm_max"):
            assert found["flat"][what] == pytest.approx(found[other][what], rel=1e-4)
        assert found["flat"]["update_norm"] == pytest.approx(found[other]["update_norm"], rel=1e-2)


# What is refused


def test_rows_that_are_too_long_or_empty_are_dropped_with_their_reason(start, tmp_path):
    rows = pl.read_parquet(write_rows(tmp_path, 6)[0])
    long = pl.when(pl.col("id") == "row-01").then(pl.lit("x" * 300)).otherwise(pl.col("chosen"))
    empty = pl.when(pl.col("id") == "row-04").then(pl.lit("")).otherwise(long)
    rows.with_columns(empty.alias("chosen")).write_parquet(tmp_path / "rows.parquet")
    found = update(start, [tmp_path / "rows.parquet"], tmp_path / "out", max_length=100)
    length = len(tokens.encode_prompt(tokens.tokenizer(start.path), [{"role": "user", "content": "1 + 1 = ?"}])) + 301
    assert found.drops == {"row-01": f"{length} tokens, limit 100", "row-04": "empty completion"}
    assert found.metrics["rows"] == 4


def test_a_row_that_just_fits_is_kept(start, tmp_path):
    rows = write_rows(tmp_path, 1)
    tok = tokens.tokenizer(start.path)
    length = len(tokens.encode_prompt(tok, [{"role": "user", "content": "0 + 1 = ?"}])) + len("Answer: 1") + 1
    assert update(start, rows, tmp_path / "out", max_length=length).drops == {}
    with pytest.raises(GuardError, match="all 1 rows were refused: 1 longer than"):
        update(start, rows, tmp_path / "out", max_length=length - 1)


def test_without_a_row_left_no_model_is_loaded(tmp_path):
    """The folder has a tokenizer and no weights: loading them would fail otherwise."""
    folder = tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(GuardError, match="all 3 rows were refused: 3 empty"):
        update(Model("policy", str(folder), "digest"), write_rows(tmp_path, 3, chosen=""), tmp_path / "out")


def test_a_loss_that_is_not_a_number_stops_and_leaves_nothing(start, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "left over").touch()
    with pytest.raises(GuardError, match="at optimiser step 2 the gradient norm is nan"):
        update(start, write_rows(tmp_path, 24), tmp_path / "out", trl={"learning_rate": 1e30})
    assert not (tmp_path / "out").exists()


def test_weights_ruined_by_the_last_step_are_not_written(start, tmp_path):
    with pytest.raises(GuardError, match="not finite"):
        update(start, write_rows(tmp_path, 4), tmp_path / "out", trl={"learning_rate": 1e30})
    assert not (tmp_path / "out").exists()


def test_an_update_that_moves_nothing_is_refused(start, tmp_path):
    with pytest.raises(GuardError, match="training changed no weight"):
        update(start, write_rows(tmp_path, 4), tmp_path / "out", trl={"learning_rate": 0.0})
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_exist_or_are_decided_elsewhere_are_named():
    problems = trl_options.check_trl(
        "sft", {"learning_rat": 1, "seed": 3, "beta": 0.1, "label_smoothing": 0.1, "loss_type": "nl"}
    )
    assert "Did you mean 'learning_rate'?" in problems[0]
    assert "run's seed" in problems[1] and "field `beta`" in problems[2]
    assert problems[3] == "trl.label_smoothing has no meaning for loss sft"
    assert "Did you mean 'nll'?" in problems[4]
    assert "write it like 1.0e-5" in trl_options.check_trl("dpo", {"learning_rate": "1e-5"})[0]
    assert trl_options.check_trl("dpo", {"loss_type": ["ipo", "sft"], "num_train_epochs": 2, "max_grad_norm": 0.5}) == []


def test_the_table_of_options_is_the_installed_one():
    from transformers.trainer_utils import SchedulerType
    from trl import DPOConfig, SFTConfig

    fields = {config.__name__: {field.name for field in dataclasses.fields(config)} for config in (SFTConfig, DPOConfig)}
    passed = {config: set(table) for config, table in trl_options.PASSED.items()}
    for config, names in fields.items():
        assert passed[config] <= names
        assert names <= set().union(*passed.values(), trl_options.OWNED)
        assert not passed[config] & set(trl_options.OWNED)
    assert set(trl_options.OWNED) <= set().union(*fields.values())
    assert "constant" in {kind.value for kind in SchedulerType}


def test_the_names_of_optimisers_and_schedules_are_those_of_transformers():
    utils, arguments = pytest.importorskip("transformers.trainer_utils"), pytest.importorskip("transformers.training_args")
    assert {one.value for one in arguments.OptimizerNames} == set(trl_options.OF_TRANSFORMERS["optim"])
    schedules = {*trl_options.OF_TRANSFORMERS["lr_scheduler_type"], *trl_options.MEASURED_SCHEDULES}
    assert {one.value for one in utils.SchedulerType} == schedules


def test_an_attention_that_this_machine_lacks_is_named(start, tmp_path):
    from selfkd.backend.trainer.update import train_rank

    numerics = {"threads": 1, "trainer": {"attn_implementation": "flash_attention_9"}}
    with pytest.raises(UsageError, match="cannot compute attention by flash_attention_9"):
        train_rank(start, None, write_rows(tmp_path, 2), TrainSpec("sft", 3), tmp_path / "out", numerics)


def test_a_wrong_option_stops_before_anything_is_loaded(tmp_path):
    with pytest.raises(UsageError, match="trl has no field 'epochs'"):
        update(Model("policy", "/nowhere", "digest"), [], tmp_path / "out", trl={"epochs": 1})


# That it repeats


def plain(weight: float = 1.0, lengths: Any = (3, 9, 5, 7, 1, 8, 2)) -> list[batches.Row]:
    import numpy as np

    ids = [np.arange(length, dtype=np.int32) for length in lengths]
    return [batches.Row(f"row-{number}", weight, ids[0], own, ids[number - 1]) for number, own in enumerate(ids)]


def test_every_row_is_seen_once_an_epoch_whatever_the_files_order():
    rows = plain()
    for epoch in range(3):
        steps = batches.plan(rows, 3, 7, epoch)
        assert sorted(number for step in steps for number in step) == list(range(7))
        turned = batches.plan(rows[::-1], 3, 7, epoch)
        assert [[rows[i].id for i in step] for step in steps] == [[rows[::-1][i].id for i in step] for step in turned]
    assert batches.plan(rows, 3, 7, 0) != batches.plan(rows, 3, 7, 1)
    assert batches.plan(rows, 3, 7, 0) != batches.plan(rows, 3, 8, 0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_divide_the_same_steps(ranks):
    rows = plain()
    split = batches.share(4, 1, ranks)
    feeds = [batches.Feed(rows, split, 7, rank, lambda records: records) for rank in range(ranks)]
    parts = [[[entry["id"] for entry in part if entry.get("scale") != 0.0] for part in feed] for feed in feeds]
    assert len({len(feed) for feed in feeds}) == 1
    for number, step in enumerate(batches.plan(rows, 4, 7, 0)):
        assert sorted(name for part in parts for name in part[number]) == sorted(rows[i].id for i in step)


@pytest.mark.parametrize(
    ("ranks", "accumulation", "tokens"),
    [(1, 8, [10]), (2, 4, [10, 2]), (3, 3, [10, 2, 2])],  # the row, and what keeps a rank in step that has none
)
def test_a_step_with_one_row_computes_no_other_ones(ranks, accumulation, tokens):
    split, rows = batches.Share(8, ranks, accumulation, 1), plain(lengths=(2, 8))[1:]
    feeds = [
        batches.Feed([batches.Row("row", 1.0, rows[0].prompt, rows[0].chosen)], split, 7, rank, list) for rank in range(ranks)
    ]
    made = [[sum(len(entry["input_ids"]) for entry in part) for part in feed] for feed in feeds]
    assert [len(feed) for feed in feeds] == [1] * ranks and made == [[count] for count in tokens]


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_a_last_step_without_the_rows_that_are_not_there_ends_on_the_same_bits(start, tmp_path, monkeypatch, loss):
    """9 rows in steps of 6: the last one has three rows, and had three micro-batches of nothing behind them."""
    trl = {**FAST, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 6, "num_train_epochs": 2}
    rows, lengths = write_rows(tmp_path, 9), []
    inner = batches.Feed._records

    def look(self: Any, part: list[int], *more: Any) -> list[dict[str, Any]]:
        lengths.append(len(part))
        return inner(self, part, *more)

    monkeypatch.setattr(batches.Feed, "_records", look)
    now = update(start, rows, tmp_path / "now", loss, trl=trl)
    assert lengths == [1] * 18 and now.metrics["steps"] == 4 and now.metrics["epochs"] == 2
    monkeypatch.setattr(batches.Feed, "_turns", lambda self, rows: 6 if rows else 0)
    before = update(start, rows, tmp_path / "before", loss, trl=trl)
    assert lengths.count(0) == 6 and before.metrics["loss_last"] == now.metrics["loss_last"]
    assert digest.weights(now.folder) == digest.weights(before.folder)


def test_what_divides_evenly_is_divided_as_it_always_was():
    assert batches.share(8, 2, 2) == batches.Share(16, 2, 2, 4)
    assert batches.share(3, 4, 2) == batches.Share(12, 2, 2, 3)


def test_only_the_product_of_batch_and_accumulation_counts():
    assert batches.share(4, 4, 8) == batches.Share(16, 8, 1, 2)
    assert batches.share(10, 8, 16) == batches.Share(80, 16, 1, 5)
    assert batches.share(6, 2, 4) == batches.Share(12, 4, 1, 3)
    assert batches.share(3, 1, 2) == batches.Share(3, 2, 1, 2)
    assert batches.share(2, 3, 4) == batches.Share(6, 4, 1, 2)


def test_more_ranks_than_rows_of_a_step_are_refused_with_the_numbers():
    with pytest.raises(UsageError, match="2 x 2 = 4 rows, and 8 ranks are to share them") as caught:
        batches.share(2, 2, 8)
    assert "at most 4 ranks" in caught.value.fix


def part_of_the_loss(record: dict[str, Any], part: list[Any], parts: int) -> float:
    """What one row's loss is multiplied with on its way to the optimiser: TRL takes the mean of each micro-batch, and of all of them."""
    return record["scale"] / parts if "scale" in record else 1 / (len(part) * parts)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1.0, 1.0, 0.5, 3.0])), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_a_recipe_means_the_same_on_any_number_of_ranks(rows, batch, accumulation, epoch):
    """Each optimiser step sees the same pairs, each with its share of the loss, and no rank waits for another."""
    import numpy as np

    pairs = [
        batches.Row(f"row-{number}", weight, np.zeros(2, np.int32), np.arange(length, dtype=np.int32), np.zeros(1, np.int32))
        for number, (length, weight) in enumerate(rows)
    ]
    seen = []
    for ranks in [ranks for ranks in (1, 2, 3, 4, 8) if ranks <= batch * accumulation]:
        split = batches.share(batch, accumulation, ranks)
        assert split.micro <= batch
        feeds = [batches.Feed(pairs, split, 7, rank, lambda records: records) for rank in range(ranks)]
        for feed in feeds:
            feed.set_epoch(epoch)
        parts = [list(feed) for feed in feeds]
        assert {len(of_rank) for of_rank in parts} == {len(feeds[0])}
        steps: list[dict[str, float]] = []
        for at in range(0, len(feeds[0]), split.accumulation):
            learned: dict[str, float] = {}
            for of_rank in parts:
                for part in of_rank[at : at + split.accumulation]:
                    for record in part:
                        if share := part_of_the_loss(record, part, ranks * split.accumulation):
                            assert record["id"] not in learned
                            learned[record["id"]] = share
            steps.append(learned)
        seen.append(steps)
    for step, first in enumerate(seen[0]):
        whole = sum(pairs[int(name[4:])].weight for name in first)
        assert first == pytest.approx({name: pairs[int(name[4:])].weight / whole for name in first})
        assert all(other[step] == pytest.approx(first) for other in seen)


def test_ranks_exchange_gradients_where_they_lie(start, tmp_path, monkeypatch):
    import trl

    seen, train = [], trl.SFTTrainer.train

    def look(self, **more):
        seen.append(self.accelerator.ddp_handler.gradient_as_bucket_view)
        return train(self, **more)

    monkeypatch.setattr(trl.SFTTrainer, "train", look)
    update(start, write_rows(tmp_path, 4), tmp_path / "out")
    assert seen == [True]


def test_the_plan_takes_as_many_rows_at_once_as_the_trainer_does():
    from selfkd.backend.trainer.update import TRL_DEFAULTS
    from selfkd.recipe import fit

    assert TRL_DEFAULTS["per_device_train_batch_size"] == fit.BATCH
    assert (TRL_DEFAULTS["gradient_accumulation_steps"], TRL_DEFAULTS["gradient_checkpointing"]) == (1, False)


def test_long_rows_go_through_a_processor_a_few_at_a_time():
    split = batches.share(8, 2, 1)
    assert batches.finer(split, plain(lengths=[10] * 4), 256) == split  # 8 pairs of 26 to 32 tokens are fewer than that
    assert batches.finer(split, plain(lengths=[40] * 4), 256) == batches.Share(16, 1, 8, 2)
    assert batches.finer(split, plain(lengths=[400] * 4), 256) == batches.Share(16, 1, 16, 1)


def work(rank: int, join: Callable[[], None], start: Model, folder: Path) -> dict[str, Any]:
    """One of two processes: an update alone, then updates as a rank of two; return what they returned or raised."""
    import torch

    rows, found = [folder / "rows.parquet"], {}
    found["alone"] = update(start, rows, folder / f"alone-{rank}", precision="bf16")
    join()
    for loss in ("sft", "dpo"):
        found[loss] = update(start, rows, folder / f"{loss}-2", loss, trl=UNEVEN)
        torch.distributed.barrier()
    for name, trl in (("nothing", {"learning_rate": 0.0}), ("infinite", {"learning_rate": 1e30})):
        try:
            update(start, rows, folder / name, trl=trl)
        except GuardError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def group(start: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("group")
    write_rows(folder, 9)
    return folder, on_ranks(2, work, start, folder)


def test_the_same_update_in_three_processes_gives_the_same_bits(start, group, tmp_path):
    folder, _ = group
    here = update(start, [folder / "rows.parquet"], tmp_path / "here", precision="bf16").folder
    assert {digest.weights(path) for path in (here, folder / "alone-0", folder / "alone-1")} == {digest.weights(here)}
    other = update(start, [folder / "rows.parquet"], tmp_path / "other", precision="bf16", seed=8).folder
    assert digest.weights(other) != digest.weights(here)


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_two_ranks_learn_what_one_learns(start, group, tmp_path, loss):
    """9 rows in steps of 4: the last step has a row for one rank only."""
    import torch
    from safetensors.torch import load_file

    folder, found = group
    alone = update(start, [folder / "rows.parquet"], tmp_path / "alone", loss, trl=UNEVEN)
    metrics = found[0][loss].metrics
    assert metrics["steps"] == alone.metrics["steps"] == 6
    for name in ("loss_first", "loss_last", "loss_mean", "update_norm"):
        assert metrics[name] == pytest.approx(alone.metrics[name], rel=1e-3)
    ours, theirs, before = (
        load_file(path / "model.safetensors") for path in (alone.folder, folder / f"{loss}-2", Path(start.path))
    )
    for name, tensor in ours.items():
        moved = torch.linalg.vector_norm(tensor - before[name])
        assert torch.linalg.vector_norm(theirs[name] - tensor) < 0.02 * moved


def test_a_failure_reaches_every_rank_and_leaves_nothing(group):
    folder, found = group
    for each in found:
        assert "training changed no weight" in each["nothing"]
        assert "at optimiser step 2" in each["infinite"]
    assert not (folder / "nothing").exists() and not (folder / "infinite").exists()
