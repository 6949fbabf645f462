"""Per-token distillation in the trainer: its loss by hand, its teachers, what is refused, and that nothing about cutting a step changes it."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from bigram import REFERENCE, START, bigram, logprob
from ranks import on_ranks
from tiny import as_model, opened, tiny_model
from updates import Enough, stopped_at

from selfkd.backend import tokens
from selfkd.backend.base import DivergenceSpec, LoraSpec, Saves, Trained, TrainSpec, nobody_listens
from selfkd.backend.trainer import sealed
from selfkd.core import digest
from selfkd.core.files import builtin_folder
from selfkd.core.pool import Function, Model, shape
from selfkd.core.source_code import code_digest
from selfkd.errors import GuardError, UsageError

KD = builtin_folder() / "loss" / "kd.py"
# (prompt of the student, of the teacher, completion): lengths differ, so that padding, masks and the two prompts' ends matter.
ROWS = [("ab", "bba", "ba"), ("a", "ab", "bbbba"), ("bba", "a", "b"), ("b", "abab", "abab"), ("aa", "b", "bab")]
WEIGHTS = [1.0, 2.0, 0.5, 3.0, 0.25]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("start"), START)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("teacher"), REFERENCE)


def written(folder: Path, rows: Any = ROWS, weights: list[float] | None = None, **more: Any) -> list[Path]:
    folder.mkdir(exist_ok=True)
    table = [
        {
            **{"id": f"row-{number}", "kind": "kd", "weight": (weights or [1.0] * len(rows))[number]},
            "messages": [{"role": "user", "content": prompt}],
            "teacher_messages": [{"role": "user", "content": told}],
            **{"chosen": text, "chosen_ended": False, **{name: values[number] for name, values in more.items()}},
        }
        for number, (prompt, told, text) in enumerate(rows)
    ]
    shape("rows", table).write_parquet(folder / "rows.parquet")
    return [folder / "rows.parquet"]


def trained(folder: Path, start: Model, teacher: Model | None, rows: list[Path] | None = None, **more: Any) -> Trained:
    from selfkd.backend.trainer.update import train_rank

    folder.mkdir(exist_ok=True)
    trl = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, **more.pop("trl", {})}
    numerics, on_progress = {"threads": 1, **more.pop("numerics", {})}, more.pop("on_progress", nobody_listens)
    loss = more.pop("loss", Function("kd", KD, code_digest(KD), more.pop("params", {})))
    how = DivergenceSpec(**more.pop("how", {}))
    name = f"{loss.path.name}:{loss.name}" if loss.name != "kd" else "kd"
    spec = TrainSpec(name, 3, trl=trl, function=loss, rows="kd", divergence=how, **more)
    return train_rank(start, teacher, rows or written(folder), spec, folder / "out", numerics, on_progress)


# ---- by hand: two letters, so a distribution is (1 - b, b), and each depends on the letter before alone ----


def distributions(after: dict[str, float], prompt: str, text: str) -> list[list[float]]:
    return [[1 - after[last], after[last]] for last in prompt[-1] + text[:-1]]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def jsd(p: list[float], q: list[float], beta: float) -> float:
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def heated(p: list[float], temperature: float) -> list[float]:
    raised = [a ** (1 / temperature) for a in p]
    return [a / sum(raised) for a in raised]


def clipped(p: list[float], q: list[float], most: float) -> float:
    return sum(min(a * math.log(a / b), most) for a, b in zip(p, q, strict=True))


WAYS: dict[str, tuple[dict[str, Any], Any]] = {
    "forward": ({}, kl),
    "reverse": ({"kind": "reverse"}, lambda p, q: kl(q, p)),
    "jsd": ({"kind": "jsd", "beta": 0.2}, lambda p, q: jsd(p, q, 0.2)),
    "temperature": ({"temperature": 2.0}, lambda p, q: kl(heated(p, 2), heated(q, 2))),
    "clip": ({"clip": 0.1}, lambda p, q: min(kl(p, q), 0.1)),
    "clip_entry": ({"clip_entry": 0.2}, lambda p, q: clipped(p, q, 0.2)),
    "top_k": ({"top_k": 1}, kl),  # of two letters one, and the other (with the end, which has e^-28) is the rest
}


@pytest.mark.parametrize(("way", "weights"), [*((way, None) for way in WAYS), ("forward", WEIGHTS)])
def test_a_step_is_the_weighted_mean_over_rows_of_the_mean_over_tokens(tmp_path, start, teacher, way, weights):
    how, between = WAYS[way]
    values = []
    for prompt, told, text in ROWS:
        pairs = zip(distributions(REFERENCE, told, text), distributions(START, prompt, text), strict=True)
        each = [between(p, q) for p, q in pairs]
        values.append(sum(each) / len(each))
    used = weights or [1.0] * 5
    found = trained(tmp_path, start, teacher, written(tmp_path, weights=weights), how=how).metrics
    assert found["loss_first"] == pytest.approx(sum(w * v for w, v in zip(used, values)) / sum(used), rel=2e-5)


def test_tokens_that_are_skipped_and_those_behind_the_first_do_not_count(tmp_path, start, teacher):
    """Of completions of 2, 5, 1, 4 and 3 letters the second and the third count; the row of one letter has none, and is dropped."""
    values = []
    for prompt, told, text in (row for row in ROWS if len(row[2]) > 1):
        pairs = list(zip(distributions(REFERENCE, told, text), distributions(START, prompt, text)))[1:3]
        values.append([kl(p, q) for p, q in pairs])
    found = trained(tmp_path, start, teacher, how={"skip": 1, "first": 3})
    assert found.drops == {"row-2": "1 tokens, and the first 1 do not count"}
    assert found.metrics["loss_first"] == pytest.approx(sum(sum(row) / len(row) for row in values) / 4, rel=2e-5)
    total = trained(tmp_path / "b", start, teacher, how={"skip": 1, "first": 3}, params={"total": True}, average="tokens")
    each = [value for row in values for value in row]
    assert total.metrics["loss_first"] == pytest.approx(sum(each) / len(each), rel=2e-5)


def test_a_step_follows_the_gradient_of_that_formula(tmp_path, start, teacher):
    """One step of SGD without momentum moves the head's weights by the learning rate times the gradient, here of the formula itself."""
    before, rate = opened(Path(start.path)), 0.5
    weight = before.lm_head.weight.detach().double().requires_grad_()
    with torch.no_grad():
        hidden = {
            letter: before.model(torch.tensor([[number]])).last_hidden_state[0, 0].double()
            for number, letter in enumerate("ab")
        }
        told_weight = opened(Path(teacher.path)).lm_head.weight.double()
    loss = torch.zeros((), dtype=torch.float64)
    for prompt, told, text in ROWS:
        for at in range(len(text)):
            last, told_last = (prompt + text)[len(prompt) + at - 1], (told + text)[len(told) + at - 1]
            p = torch.log_softmax(told_weight @ hidden[told_last], -1)
            q = torch.log_softmax(weight @ hidden[last], -1)
            loss = loss + (p.exp() * (p - q)).sum() / len(text) / len(ROWS)
    (gradient,) = torch.autograd.grad(loss, weight)
    trl = {"optim": "sgd", "learning_rate": rate, "max_grad_norm": 0.0}
    found = trained(tmp_path, start, teacher, trl=trl)
    after = opened(found.folder).lm_head.weight.detach().double()
    torch.testing.assert_close(after, weight.detach() - rate * gradient, rtol=1e-5, atol=1e-6)


def test_what_a_function_is_given_of_each_token(tmp_path, start, teacher):
    seen = tmp_path / "seen.pt"
    body = f"torch.save((divergence, logps, teacher_logps, mask), {str(seen)!r}); return (divergence - 0.1 * logps).sum(1)"
    (tmp_path / "mine.py").write_text(f"import torch\n\ndef mine(divergence, logps, teacher_logps, mask):\n    {body}\n")
    loss = Function("mine", tmp_path / "mine.py", "", {})
    trained(tmp_path, start, teacher, loss=loss, trl={"per_device_train_batch_size": 5})
    divergence, logps, teacher_logps, mask = torch.load(seen)
    by_length = {len(text): (prompt, told, text) for prompt, told, text in ROWS}
    for row, count in enumerate(mask.sum(1).tolist()):
        prompt, told, text = by_length[count]
        for values, model, words in ((logps, START, prompt), (teacher_logps, REFERENCE, told)):
            steps = [logprob(model, (words + text[:at])[-1:], letter) for at, letter in enumerate(text)]
            assert values[row, :count].tolist() == pytest.approx(steps, rel=1e-5)
            assert not values[row, count:].any()
        pairs = zip(distributions(REFERENCE, told, text), distributions(START, prompt, text))
        assert divergence[row, :count].tolist() == pytest.approx([kl(p, q) for p, q in pairs], rel=1e-4)


def test_a_function_that_mixes_rows_is_refused(tmp_path, start, teacher):
    (tmp_path / "mine.py").write_text("def mine(divergence, mask):\n    return divergence.sum(1) / mask.sum()\n")
    with pytest.raises(UsageError, match="cannot be split"):
        trained(tmp_path, start, teacher, loss=Function("mine", tmp_path / "mine.py", "", {}))


def test_how_far_a_model_is_from_who_sampled_the_completions_is_noted(tmp_path, start, teacher):
    """Sampled by the start itself, token for token: 0 before the first step, and above it once the model has moved."""
    ids = [["ab".index(letter) for letter in text] for _, _, text in ROWS]
    sums = [logprob(START, prompt, text) for prompt, _, text in ROWS]
    rows = written(tmp_path, chosen_ids=ids, chosen_logprob=sums)
    found = trained(tmp_path, start, teacher, rows, trl={"num_train_epochs": 40, "learning_rate": 0.05}).metrics
    assert found["staleness_first"] == pytest.approx(0, abs=1e-6)
    assert found["divergence_last"] < found["divergence_first"]
    assert found["staleness_last"] != pytest.approx(0, abs=1e-3)
    unknown = trained(tmp_path / "b", start, teacher, rows, how={"first": 2}).metrics
    assert "staleness_first" in unknown  # of the rows that are no longer than that
    assert "staleness_first" not in trained(tmp_path / "c", start, teacher, written(tmp_path / "c")).metrics


def test_a_step_without_a_row_of_which_the_sampler_is_known_leaves_staleness_out(tmp_path, start, teacher):
    """Rows one by one, of which the first alone was sampled: the last step has nothing to compare with."""
    order = sorted(range(len(ROWS)), key=lambda at: digest.of("order", 3, 0, f"row-{at}"))
    ids = [["ab".index(letter) for letter in text] for _, _, text in ROWS]
    known = [logprob(START, prompt, text) if at == order[0] else None for at, (prompt, _, text) in enumerate(ROWS)]
    rows = written(tmp_path, chosen_ids=ids, chosen_logprob=known)
    found = trained(tmp_path, start, teacher, rows, trl={"per_device_train_batch_size": 1}).metrics
    assert "divergence_last" in found and not {"staleness_first", "staleness_last"} & found.keys()


# ---- what is refused, and dropped with its reason ----


def test_a_teacher_that_is_the_student_is_refused(tmp_path, start):
    same = [(prompt, prompt, text) for prompt, _, text in ROWS]
    for teacher in (start, None):
        with pytest.raises(UsageError, match="same model with the same prompt in every row"):
            trained(tmp_path, start, teacher, written(tmp_path, same))


def test_a_teachers_prompt_that_leaves_no_room_costs_the_row_with_its_length(tmp_path, start, teacher):
    rows = [*ROWS[:2], ("a", "ab" * 10, "abb")]
    found = trained(tmp_path, start, teacher, written(tmp_path, rows), max_length=20)
    assert found.drops == {"row-2": "23 tokens with the prompt of its teacher, limit 20"}


def test_no_row_left_behind_what_is_skipped_is_said_before_a_model_is_loaded(tmp_path, start, teacher):
    with pytest.raises(GuardError, match="none of 5 completions is longer than the 9 tokens"):
        trained(tmp_path, start, teacher, how={"skip": 9})


# ---- a whole model ----

TINY = {"learning_rate": 2e-3, "per_device_train_batch_size": 2, "num_train_epochs": 2, "lr_scheduler_type": "cosine"}
STEPS = 10  # 9 rows in steps of 2, twice


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return as_model(tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


def told(folder: Path, count: int = 9) -> list[Path]:
    """The teacher is told more than the student, and prompts and completions have several lengths."""
    rows = [
        (f"{n} + 1 = ?", f"Say it in words. {n} + 1 = ?" + "!" * n, f"Answer: {n + 1}" + "." * (n % 4)) for n in range(count)
    ]
    return written(folder, rows)


def distance(teacher: Model, child: Path, rows: list[Path]) -> float:
    """The mean KL of the child under its own prompt from the teacher under the teacher's, over all tokens, by transformers alone."""
    tok, values = tokens.tokenizer(teacher.path), []
    models = {"teacher_messages": opened(Path(teacher.path)), "messages": opened(child)}
    for row in pl.read_parquet(rows[0]).iter_rows(named=True):
        answer, tables = tok(row["chosen"], add_special_tokens=False)["input_ids"], []
        for name, model in models.items():
            prompt = tokens.encode_prompt(tok, row[name])
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            tables.append(torch.log_softmax(logits, -1))
        values += (tables[0].exp() * (tables[0] - tables[1])).sum(-1).tolist()
    return sum(values) / len(values)


def test_what_a_prompt_does_is_learned_without_the_prompt(tmp_path, tiny):
    """Context distillation: the trainer's figure is the divergence, and it falls."""
    rows = told(tmp_path, 8)
    found = trained(tmp_path, tiny, tiny, rows, trl={"num_train_epochs": 30, "learning_rate": 3e-3})
    before, after = distance(tiny, Path(tiny.path), rows), distance(tiny, found.folder, rows)
    assert found.metrics["divergence_first"] == pytest.approx(before, rel=1e-4)
    assert after < 0.3 * before and found.metrics["divergence_last"] == pytest.approx(after, rel=0.3)
    assert digest.of(dict(found.metrics))  # a record can hold them
    assert found.metrics["agreement_last"] > found.metrics["agreement_first"] and found.metrics["entropy_last"] > 0


@pytest.mark.parametrize("way", [{"how": {"kind": "jsd", "top_k": 20}}, {"lora": LoraSpec(r=2, alpha=4.0)}])
def test_micro_batches_of_any_size_make_the_same_step(tmp_path, tiny, way):
    rows, found = told(tmp_path, 8), []
    for micro, accumulation in ((8, 1), (2, 4)):
        trl = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
        found.append(trained(tmp_path / str(micro), tiny, tiny, rows, trl=trl, **way).metrics)
    for one in found[1:]:
        for name in ("loss_first", "loss_last", "grad_norm_max", "update_norm", "tokens", "divergence_first"):
            assert one[name] == pytest.approx(found[0][name], rel=2e-3), name


def test_a_few_tokens_of_logits_at_a_time_make_the_same_update(tmp_path, tiny, monkeypatch):
    whole = trained(tmp_path / "a", tiny, tiny, told(tmp_path), trl=TINY).metrics
    monkeypatch.setattr("selfkd.backend.trainer.distil.MOST_ELEMENTS", 5 * 99)
    cut = trained(tmp_path / "b", tiny, tiny, told(tmp_path), trl=TINY).metrics
    for name in ("loss_first", "loss_last", "grad_norm_max", "update_norm"):
        assert cut[name] == pytest.approx(whole[name], rel=1e-4), name


def test_beneath_an_adapter_the_teacher_is_the_same_weights_and_no_second_copy(tmp_path, tiny, monkeypatch):
    from selfkd.backend.trainer import opened

    loaded: list[str] = []
    load = opened.load
    monkeypatch.setattr(opened, "load", lambda path, *more: (loaded.append(path), load(path, *more))[1])
    lora = LoraSpec(r=2, alpha=4.0)
    found = trained(tmp_path / "a", tiny, tiny, told(tmp_path), trl=TINY, lora=lora)
    assert len(loaded) == 1
    assert found.metrics["divergence_last"] < found.metrics["divergence_first"]
    full = trained(tmp_path / "b", tiny, tiny, told(tmp_path), trl=TINY)
    assert len(loaded) == 3 and full.metrics["loss_first"] == pytest.approx(found.metrics["loss_first"], rel=1e-4)


def test_a_live_teacher_moves_with_the_model(tmp_path, tiny):
    fixed = trained(tmp_path / "a", tiny, tiny, told(tmp_path), trl=TINY).metrics
    live = trained(tmp_path / "b", tiny, None, told(tmp_path), trl=TINY).metrics
    assert live["loss_first"] == pytest.approx(fixed["loss_first"], rel=1e-5)
    assert live["loss_last"] != pytest.approx(fixed["loss_last"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_teacher_in_the_same_words_as_the_student_is_at_no_distance_at_the_first_step(tmp_path, tiny, precision):
    """Also where the student's weights are rounded in each pass and the teacher's once: one row differs, so that it may run."""
    rows = [(f"{n} + 1 = ?", f"{n} + 1 = ?", f"Answer: {n + 1}") for n in range(3)] + [("2", "What is 2?", "two, so it is")]
    trl = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    steps: list[Any] = []
    trained(tmp_path, tiny, tiny, written(tmp_path, rows), trl=trl, precision=precision, on_progress=steps.append)
    order = sorted(range(4), key=lambda at: digest.of("order", 3, 0, f"row-{at}"))
    assert order[0] != 3 and steps[0]["loss"] == 0.0
    assert steps[order.index(3)]["loss"] > 1e-3


@pytest.mark.parametrize(
    "way",
    [
        {"lora": LoraSpec(r=2, alpha=4.0), "how": {"kind": "reverse", "top_k": 8}},
        *(pytest.param(way, marks=pytest.mark.nightly) for way in ({}, {"live": True})),
    ],
)
def test_killed_in_the_middle_it_ends_on_the_same_bits(tmp_path, tiny, way):
    rows, way = told(tmp_path), dict(way)
    teacher = None if way.pop("live", False) else tiny
    saves = Saves(tmp_path / "update", "this update", 1e-9)
    with suppress(Enough):
        trained(tmp_path / "x", tiny, teacher, rows, trl=TINY, saves=saves, on_progress=stopped_at(7), **way)
    assert sealed.steps(tmp_path / "update")[0][0] == 6
    went_on = trained(tmp_path / "b", tiny, teacher, rows, trl=TINY, saves=saves, **way)
    whole = trained(tmp_path / "a", tiny, teacher, rows, trl=TINY, **way)
    assert went_on.metrics["continued_at"] == [6]
    assert digest.weights(went_on.folder) == digest.weights(whole.folder)
    assert went_on.metrics["loss_last"] == whole.metrics["loss_last"]


def killed_at(step: int) -> Any:
    def at(progress: Any) -> None:
        if progress["step"] >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def doomed(folder: Path, tiny: Model, rows: list[Path], saves: Saves) -> None:
    trained(folder, tiny, tiny, rows, trl=TINY, saves=saves, on_progress=killed_at(5))


@pytest.mark.nightly
def test_a_process_that_is_killed_goes_on_to_the_same_bits(tmp_path, tiny):
    rows, saves = told(tmp_path), Saves(tmp_path / "update", "this update", 1e-9)
    process = multiprocessing.get_context("spawn").Process(target=doomed, args=(tmp_path / "doomed", tiny, rows, saves))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    went_on = trained(tmp_path / "b", tiny, tiny, rows, trl=TINY, saves=saves)
    assert went_on.metrics["continued_at"] == [4]
    assert digest.weights(went_on.folder) == digest.weights(trained(tmp_path / "a", tiny, tiny, rows, trl=TINY).folder)


def test_segments_end_on_the_bits_of_one_piece(tmp_path, tiny):
    rows, saves = told(tmp_path), Saves(tmp_path / "update", "this update", 0)
    made = [trained(tmp_path / f"{until}", tiny, tiny, rows, trl=TINY, saves=saves, until=until) for until in (4, 12)]
    whole = trained(tmp_path / "whole", tiny, tiny, rows, trl=TINY)
    assert [(one.metrics["steps"], one.whole) for one in made] == [(4, False), (STEPS, True)]
    assert digest.weights(made[-1].folder) == digest.weights(whole.folder)


def rank(number: int, join: Any, folder: Path, tiny: Model, rows: list[Path], shard: bool) -> dict[str, Any]:
    join()
    trl = {"per_device_train_batch_size": 4, "num_train_epochs": 2}
    out = folder / ("shard" if shard else "ranks")
    return dict(trained(out, tiny, tiny, rows, trl=trl, numerics={"shard": shard}).metrics)


@pytest.mark.nightly
@pytest.mark.parametrize("shard", [False, True])
def test_two_ranks_make_the_steps_of_one(tmp_path, tiny, shard):
    rows = told(tmp_path)
    alone = trained(tmp_path / "alone", tiny, tiny, rows, trl={"per_device_train_batch_size": 4, "num_train_epochs": 2})
    found, _ = on_ranks(2, rank, tmp_path, tiny, rows, shard)
    for name in ("loss_first", "loss_last", "grad_norm_max", "update_norm", "tokens", "divergence_last"):
        assert found[name] == pytest.approx(alone.metrics[name], rel=1e-3), name


def test_completions_are_the_same_ids_behind_both_prompts(tiny, tmp_path):
    from selfkd.backend.trainer import batches

    tok = tokens.tokenizer(tiny.path)
    for record in pl.read_parquet(told(tmp_path)[0]).iter_rows(named=True):
        row = batches.encode(tok, record, False)
        assert row.teacher is not None and tok.decode(row.chosen) == record["chosen"]
        assert tok.decode(row.teacher).endswith(f"{record['teacher_messages'][0]['content']}\nassistant: ")
        assert row.longest == len(row.teacher) + len(row.chosen)
